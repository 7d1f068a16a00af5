"""The Inception-v3 of 2015 that published FID and Inception scores are measured with; module and parameter names are those of its released
PyTorch weights. What sets it apart from later ones: average pools do not count the padding, the last block pools by maximum, there are 1008
classes, and pictures are resized as TensorFlow 1 did."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varl.checkpoints.folder import file_sha256, strict_load
from varl.checkpoints.released import read_weights
from varl.errors import CheckpointError

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""The same file, as pytorch-fid and as torch-fidelity name it; the last part is how its sha256 begins."""
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAMES[0]}"
SIZE = 299

Kernel = int | tuple[int, int]
Chain = Sequence[tuple[int, *tuple[Kernel, ...]]]
"""Convolutions one after the other: output channels and kernel; two kernels are two convolutions side by side."""


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, and last a pool: followed by a convolution (`pool` channels) where the grid keeps its size, on
    its own where the last convolution of every chain halves it (`pool` 0)."""

    def __init__(self, width: int, chains: Mapping[str, Chain], pool: int, max_pool: bool = False) -> None:
        super().__init__()
        self.halves, self.max_pool = pool == 0, max_pool or pool == 0
        self.chains: list[list[list[str]]] = []
        for name, chain in chains.items():
            inputs, steps = width, []
            for number, (out, *kernels) in enumerate(chain, 1):
                stride = 2 if self.halves and number == len(chain) else 1
                steps.append([])
                for letter, kernel in zip(("a", "b") if len(kernels) == 2 else ("",), kernels, strict=True):
                    full = name if len(chain) == 1 else f"{name}_{number}{letter}"
                    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
                    self.add_module(full, Conv(inputs, out, kernel, stride, (high // 2, wide // 2) if stride == 1 else 0))
                    steps[-1].append(full)
                inputs = out * len(kernels)
            self.chains.append(steps)
        if pool:
            self.branch_pool = Conv(width, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.chains:
            y = x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.halves:
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def block_a(width: int, pool: int) -> Mixed:
    double: Chain = [(64, 1), (96, 3), (96, 3)]
    return Mixed(width, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": double}, pool)


def block_c(inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    single: Chain = [(inner, 1), (inner, row), (192, column)]
    double: Chain = [(inner, 1), (inner, column), (inner, row), (inner, column), (192, row)]
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": single, "branch7x7dbl": double}, 192)


def block_e(width: int, max_pool: bool) -> Mixed:
    fork = (384, (1, 3), (3, 1))
    chains: dict[str, Chain] = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}
    return Mixed(width, chains, 192, max_pool)


def resize_tf1(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 size size"]:
    """Bilinear as TensorFlow 1 did it: output pixel i reads at i * (input size / output size), not at pixel centres, with no smoothing."""

    def along(x: Tensor, axis: int) -> Tensor:
        length = x.shape[axis]
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (length / size)
        low = at.long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        start, end = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=length - 1))
        return start + (end - start) * weight

    return along(along(images, 3), 2)


class Inception(nn.Module):
    """2048 features of pictures of any size, and what it takes them for."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, 0)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = block_c(128), block_c(160), block_c(160), block_c(192)
        long: Chain = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": long}, 0)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, False), block_e(2048, True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2048"]:
        """`images` in [0, 1]. Features of the last average pool."""
        x = (resize_tf1(images * 255, SIZE) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def classify(self, features: Float[Tensor, "B 2048"]) -> Float[Tensor, "B 1008"]:
        """Log-probabilities, of logits without their bias: so the released evaluators measure Inception score."""
        return F.linear(features, self.fc.weight).log_softmax(-1)


def load_inception(path: Path | str | None = None) -> Inception:
    """The net with released weights from `path` or, without one, from torch's cache, where pytorch-fid and torch-fidelity put them."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = next((cache / name for name in NAMES if (cache / name).is_file()), None) if path is None else Path(path)
    if file is None or not file.is_file():
        where = f"not in {cache} under {' or '.join(NAMES)}" if file is None else f"there is no file {file}"
        raise CheckpointError(
            f"Inception weights: {where}. Download {URL} where there is a network and give the file's path, or judge by another extractor."
        )
    promised = file.stem.rpartition("-")[2]
    if file.name in NAMES and not (found := file_sha256(file)).startswith(promised):
        raise CheckpointError(f"{file}: its sha256 begins with {found[:8]}, must begin with {promised}. Download it again: {URL}.")
    model = Inception().eval().requires_grad_(False)
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".num_batches_tracked")}
    strict_load(model, counters | read_weights(file), str(file))
    return model
