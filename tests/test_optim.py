import copy

import pytest
import torch
from torch import nn

from varl.config import OptimConfig
from varl.train.optim import build_optimizer, lr_at, muon_scale, orthogonalise, set_lr


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(5, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 5)
        loss.backward()
        set_lr(optimizer, lr_at(step, 40, OptimConfig(warmup_steps=3, schedule="linear")))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64), (3, 24, 8)], ids=str)
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    got = torch.linalg.svdvals(orthogonalise(matrix))
    assert got.min() > 0.5
    assert got.max() < 1.3
    in_their_basis = u.mT @ orthogonalise(matrix) @ vh.mT
    off_diagonal = in_their_basis - torch.diag_embed(in_their_basis.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(off_diagonal, torch.zeros_like(off_diagonal), rtol=0, atol=1e-4)


def test_orthogonalise_is_the_published_quintic_on_a_diagonal():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64) / 5
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonalise(torch.diag(torch.tensor([3.0, 4.0]))).diagonal(), x.float(), rtol=1e-5, atol=0)


def test_orthogonalise_ignores_scale_and_is_batched():
    batch = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(1e4 * batch), orthogonalise(batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalise(batch), torch.stack([orthogonalise(m) for m in batch]), rtol=1e-5, atol=1e-6)


def test_scale_by_hand():
    assert (muon_scale(8, 32), muon_scale(8, 8), muon_scale(32, 8)) == (1.0, 1.0, 2.0)


def test_first_muon_step_by_hand():
    model = net()
    before = model.blocks[0].up.weight.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(name="muon", muon_lr=0.02, weight_decay=0.5))
    train_step_grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    model.blocks[0].up.weight.grad = train_step_grad
    optimizer.step()
    # m = 0.05 g, u = 0.95 m + 0.05 g: a positive multiple of g, which orthogonalise ignores
    want = before * (1 - 0.02 * 0.5) - 0.02 * 2.0 * orthogonalise(train_step_grad)
    torch.testing.assert_close(model.blocks[0].up.weight.detach(), want, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest():
    model = net()
    muon, matrices, vectors = build_optimizer(model, OptimConfig(name="muon", lr=3e-3, muon_lr=0.02, weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in muon["params"]] == [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")]
    assert [names[id(p)] for p in matrices["params"]] == ["embed.weight", "head.weight"]
    assert all(name.endswith("bias") for name in (names[id(p)] for p in vectors["params"]))
    assert (muon["lr"], matrices["lr"], vectors["weight_decay"]) == (0.02, 3e-3, 0.0)


def test_the_adamw_half_is_torch_adamw():
    model = net()
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, OptimConfig(name="muon", lr=1e-2, muon_lr=0.0, weight_decay=0.1))
    for p in (p for block in twin.blocks for layer in (block.up, block.down) for p in [layer.weight]):
        p.requires_grad_(False)
    theirs = build_optimizer(twin, OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1))
    assert train(model, ours, range(6)) == train(twin, theirs, range(6))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_optimizer_goes_on_bit_identically(name):
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.01)
    model = net()
    optimizer = build_optimizer(model, config)
    first = train(model, optimizer, range(5))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    unbroken = train(model, optimizer, range(5, 12))

    other = net(seed=9)
    other.load_state_dict(weights)
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(state)
    assert train(other, resumed, range(5, 12)) == unbroken
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert unbroken[-1] < first[0]


def test_frozen_parameters_and_missing_gradients_stay():
    model = net()
    model.head.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    before = copy.deepcopy(model.state_dict())
    model.blocks[0].up(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"blocks.0.up.weight", "blocks.0.up.bias"}


def test_learning_rate_by_hand():
    warm = OptimConfig(warmup_steps=4)
    assert [lr_at(step, 10, warm) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = OptimConfig(warmup_steps=2, schedule="linear")
    assert [lr_at(step, 6, linear) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert lr_at(0, 1, OptimConfig(schedule="linear")) == 1.0


@pytest.mark.gpu
def test_bf16_orthogonalise_is_near_fp32():
    matrix = torch.randn(6, 128, 128, generator=torch.Generator().manual_seed(0))
    low = orthogonalise(matrix.cuda()).cpu()
    assert (low - orthogonalise(matrix)).norm() / low.norm() < 0.05
