"""Rewards tried on real pictures, from the command line and by hand."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tiny import status
from varl.config import ClassScoreConfig, PicturesConfig, PythonRewardConfig, RunConfig, ServedRewardConfig, SSIMConfig, WeightedReward
from varl.errors import ConfigError, DataError
from varl.plan.rewards import peak_bytes, said, try_reward, try_rewards
from varl.rewards.toy import brightness
from varl.settings import to_yaml
from varl.types import Prompt


@pytest.fixture
def folder(tmp_path):
    """Grey pictures of twelve classes, two of each, brighter from class to class."""
    for label in range(12):
        place = tmp_path / "pictures" / f"{label:02d}"
        place.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (24, 24), (20 * label + k,) * 3).save(place / f"{k}.png")
    return tmp_path / "pictures"


def run(folder) -> RunConfig:
    rewards = {
        "bright": WeightedReward(reward=PythonRewardConfig(target="varl.rewards.toy:brightness")),
        "class": WeightedReward(reward=ClassScoreConfig(classifier="bundled:glyphs_reward")),
        "like": WeightedReward(reward=SSIMConfig()),
    }
    return RunConfig(model="bundled:glyphs", data=PicturesConfig(path=str(folder), image_size=(24, 24)), rewards=rewards)


def test_what_rewards_say_of_pictures_and_of_noise(folder):
    bright, named, like = try_rewards(run(folder), folder, 100)
    want = torch.tensor([(20 * label + k) / 255 for label in range(12) for k in range(2)])
    torch.testing.assert_close(bright.pictures, want)
    torch.testing.assert_close(bright.noise, torch.full((24,), 0.5), rtol=0, atol=0.05)
    torch.testing.assert_close(like.pictures, torch.ones(24), rtol=0, atol=1e-5)
    assert (like.noise < 0.2).all()
    assert ((named.pictures >= -8) & (named.pictures <= 0)).all()
    for one in (bright, named, like):
        assert one.alone > 0
        assert one.together > 0
    assert named.memory > bright.memory


def test_from_the_command_line(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yaml").write_text(to_yaml(run(folder)))
    assert status("reward-check", str(tmp_path / "run.yaml"), "--pictures", str(folder), "--most", "6") == 0
    told = capfd.readouterr().out
    for name in ("bright", "class", "like"):
        assert name in told
    assert "0 of 6" in told
    assert status("reward-check", str(tmp_path / "run.yaml"), "--pictures", str(tmp_path / "none")) == 2
    assert "there is no such folder" in capfd.readouterr().err


def test_a_judge_that_is_not_there_is_not_a_reward_that_fails(folder):
    rewards = {**run(folder).rewards, "far": WeightedReward(reward=ServedRewardConfig(url="http://127.0.0.1:9"))}
    with pytest.raises(ConfigError, match=r"no reward service answers at http://127\.0\.0\.1:9"):
        try_rewards(replace(run(folder), rewards=rewards), folder, 4)


def test_failures_are_counted_and_readers_closed():
    closed = []

    class Picky:
        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)).where(torch.tensor([prompt.label == 1 for prompt in prompts]), torch.nan)

        def close(self):
            closed.append(self)

    tried = try_reward("picky", Picky(), torch.full((3, 3, 4, 4), 0.25), [Prompt(label=i) for i in (0, 1, 2)])
    head, (row,) = said([tried])
    assert row[:2] == ["picky", "0.25 to 0.25, mean 0.25"]
    assert row[3] == "2 of 3"
    assert len(head) == len(row)
    assert len(closed) == 1
    nothing = try_reward("none", lambda images, prompts: torch.full((1,), torch.nan), torch.zeros(1, 3, 4, 4), [Prompt()])
    assert said([nothing])[1][0][1] == "nothing"


def test_peak_memory_is_that_of_tensors():
    def call():
        first = torch.zeros(1 << 18)
        del first
        return torch.zeros(1 << 19)

    assert 4 << 19 <= peak_bytes(torch.device("cpu"), call) < (4 << 19) + 4096
    assert brightness(torch.ones(1, 3, 2, 2), [Prompt()]).item() == 1.0


def test_pictures_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        try_rewards(run(tmp_path), tmp_path / "none", 4)
