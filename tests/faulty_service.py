"""A reward service that fails on command: one word for each request, read from a file, the last of them for all that follow. No torch, so
that it starts at once. Run: python faulty_service.py PORT FILE."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from varl.rewards.service import Service, pack, unpack


def score(images, prompts):
    """Every pixel counts, each by another weight, as in `tabular.brightness`; and all that an answer may hold."""
    flat = images.reshape(len(images), -1)
    value = (flat * np.linspace(0.1, 1.2, flat.shape[1], dtype="<f4")).sum(1)
    words = [[SimpleNamespace(text=prompt["text"], confidence=0.5, box=[0, 0, 1, 1])] for prompt in prompts]
    share = np.stack([value / 4, 3 * value / 4], 1)
    box = np.ones((len(images), 2, 4))
    return SimpleNamespace(value=value, parts={"first": flat[:, 0]}, region_value=share, region_box=box, found=words)


class Faulty(Service):
    moods = Path(sys.argv[-1])
    asked = 0

    def answer(self, data, arrived):
        moods = self.moods.read_text().split()
        mood = moods[min(self.asked, len(moods) - 1)]
        self.asked += 1
        arrays, said = unpack(bytearray(super().answer(data, arrived)))
        match mood:
            case "well":
                pass
            case "die":
                os._exit(1)
            case "garbage":
                return bytes(range(256))
            case "nan":
                arrays["value"][0] = np.nan
            case "short":
                arrays, said["ids"] = {name: array[:-1] for name, array in arrays.items()}, said["ids"][:-1]
            case "shuffled":
                arrays, said["ids"] = {name: array[::-1] for name, array in arrays.items()}, said["ids"][::-1]
            case "strange":
                said["ids"][0] = "0" * 16
            case "broken":
                raise TimeoutError("not now")
            case seconds:
                time.sleep(float(seconds))
        return pack(arrays, said)


if __name__ == "__main__":
    Faulty("faulty", "127.0.0.1", int(sys.argv[1])).run(lambda: score, (2, 2))
