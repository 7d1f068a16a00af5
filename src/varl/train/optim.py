"""How weights move: AdamW, Muon, and the learning rate over a run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

from varl.config import OptimConfig
from varl.distributed.shard import laid_like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic: steep at 0, so that five steps are enough; singular values end near 1, between about 0.7 and 1.2."""
MUON_MOMENTUM = 0.95


def orthogonalise(matrix: Float[Tensor, "*B R C"], steps: int = 5) -> Float[Tensor, "*B R C"]:
    """U V^T of each matrix U S V^T, approximately: every singular value pushed to about 1 by Newton-Schulz iterations.

        X <- X / |X|_F,  then `steps` times  X <- a X + (b A + c A^2) X,  A = X X^T        Muon (Jordan et al. 2024)

    In fp32 on the CPU, bf16 on CUDA; the result has the dtype of `matrix`."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def muon_scale(rows: int, columns: int) -> float:
    """sqrt(max(1, rows / columns)): makes the update of a tall matrix as large per output as that of a square one."""
    return max(1.0, rows / columns) ** 0.5


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Factor on every learning rate at 0-based `step`: (step + 1) / warmup_steps while warming up; then 1, or for the linear schedule
    (total - step) / (total - warmup), which is 1 at the first step after the warm-up and would be 0 one step after the last."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    return max(total_steps - step, 0) / max(total_steps - config.warmup_steps, 1)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's lr becomes `factor` times the one that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others, as one optimizer with one state dict.

    muon     m <- mu m + (1 - mu) g,   u = mu m + (1 - mu) g,   w <- (1 - lr wd) w - lr scale orthogonalise(u)
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"muon": False, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "momentum": MUON_MOMENTUM})
        for group in self.param_groups:
            group["fused"] = not group["muon"]  # load_state_dict then leaves AdamW's step counters in fp32

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(moved, group)
            elif moved:
                self._adamw(moved, group)
        return loss

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        for same in _by_shape(parameters):
            updates = []
            for p in same:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
                assert p.grad is not None
                buffer = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum))
            scale = muon_scale(*same[0].shape)
            directions = orthogonalise(torch.stack([whole(update) for update in updates]))
            for p, direction in zip(same, directions.unbind(), strict=True):
                p.mul_(1 - lr * group["weight_decay"]).add_(laid_like(direction, p), alpha=-lr * scale)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The matrices inside the transformer's `blocks`, whatever the family calls them; none where there are no blocks."""
    return [p for block in getattr(module, "blocks", ()) for p in block.parameters() if p.ndim == 2]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Moves every parameter of `module` that requires grad. Weight decay falls on matrices and convolutions, not on biases and norms.
    Muon takes the matrices inside `blocks`, at `muon_lr`; what embeds and what reads out stays with AdamW."""
    moved = [p for p in module.parameters() if p.requires_grad]
    chosen = {id(p) for p in block_matrices(module)} if config.name == "muon" else set()
    inside, rest = [p for p in moved if id(p) in chosen], [p for p in moved if id(p) not in chosen]
    parts = [
        {"params": inside, "muon": True, "lr": config.muon_lr, "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim >= 2], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "lr": config.lr, "weight_decay": 0.0},
    ]
    groups = [{**part, "initial_lr": part["lr"], "betas": config.betas} for part in parts if part["params"]]
    if config.name == "muon":
        return Muon(groups)
    return torch.optim.AdamW(groups, fused=True)


def _by_shape(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of equal shape together, so that their matrices are multiplied in one batch."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for p in parameters:
        shapes.setdefault(p.shape, []).append(p)
    return list(shapes.values())
