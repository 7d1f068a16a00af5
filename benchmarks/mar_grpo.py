"""What MAR-GRPO costs, and what its estimators are: drawing against the released loop over the whole grid, memory, further paths, the
gradient of the released expectation, and that of single moves.

    python benchmarks/mar_grpo.py [--minutes 8] [--part all]

All with random weights. Times are medians of alternating runs in one process, quartiles in brackets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from common import alternate, arguments, machine, spread, table
from torch import Tensor, nn

from varl.algorithms.mar_grpo import MARGRPO
from varl.checkpoints.mar import released
from varl.config import DiffusionHeadConfig, GRPOConfig, KLConfig, LawConfig, MARConfig, MARGRPOConfig, UnmaskingConfig, ViTConfig
from varl.errors import ConfigError
from varl.models.diffusion_head import DiffusionHead, drawn, guided, mixed, reverse_step, velocity_step
from varl.models.mar import MAR, known
from varl.plan.families import MaskedFamily, family_of
from varl.plan.rewards import peak_bytes
from varl.policies import masked
from varl.policies.masked import Head, Latents, MaskedPolicy, Moves, settled_at, walk
from varl.rewards.judge import RewardJudge
from varl.rng import Stream
from varl.tokenizers.kl import KL
from varl.types import Prompt

ROLLOUT_BAR = 5.0
GUIDED = LawConfig(cfg_scale=(3.0,))
PLAIN = LawConfig()
Target = Literal["noise", "velocity"]


@torch.no_grad()
def lively(module: nn.Module) -> None:
    """Weights that begin at 0 would make every picture alike."""
    for weight in module.parameters():
        weight.add_(0.02 * torch.randn_like(weight))


def new_policy(
    grid: int, steps: int, moves: int, *, width: int, depth: int, head: int, target: Target = "velocity", law: LawConfig = PLAIN
) -> MaskedPolicy:
    torch.manual_seed(0)
    half = ViTConfig(depth=depth, width=width, heads=max(1, width // 32))
    config = MARConfig(
        encoder=half,
        decoder=half,
        head=head_config(head, 3, target),
        grid=(grid, grid),
        buffer=8,
        tokenizer=KLConfig(width=32, multipliers=(1,), blocks=1, attention=False, patch=4),
    )
    model = MAR(config)
    lively(model)
    unmasking = UnmaskingConfig(steps=steps, denoise_steps=moves)
    return MaskedPolicy(model, KL(config.tokenizer), unmasking=unmasking, sample_law=law, score_law=law)


def head_config(width: int, depth: int, target: Target) -> DiffusionHeadConfig:
    return DiffusionHeadConfig(depth=depth, width=width, target=target, least_signal=2e-4 if target == "velocity" else 0.0)


def asked(count: int) -> tuple[list[Prompt], Stream]:
    return [Prompt(label=i) for i in range(count)], Stream(seed=0, path=("rollout", 0), rows=tuple(range(count)))


# ---- drawing ----------------------------------------------------------------------------------------------------------------------------

ROLLOUTS = {
    "6x6, n = 16": (6, 16, 25, 16, 96, 96),
    "16x16, n = 16": (16, 16, 25, 8, 96, 96),
    "16x16, n = 64": (16, 64, 25, 8, 96, 96),
    "16x16, n = 64, long": (16, 64, 100, 4, 96, 96),
}
"""Grid, steps, moves, pictures, width of the transformer, of the head."""


@torch.no_grad()
def full_grid(policy: MaskedPolicy, prompts: Sequence[Prompt], rng: Stream) -> Tensor:
    """As released: at every step the head makes every token of the grid, of which those of the step's set are kept; it reads time and
    latent anew at every move. Log-densities are left out."""
    model, head = policy.module, policy.module.head
    denoiser, tokens = model.denoiser(policy.unmasking.denoise_steps), policy.layout.tokens
    noise = rng.at("path").normal(tokens, denoiser.moves + 1, model.channels)
    step = settled_at(rng.at("order").uniform(tokens), policy.counts)
    labels = torch.tensor([prompt.label for prompt in prompts])
    canvas = torch.zeros(len(prompts), tokens, model.channels)
    follows = velocity_step if head.config.target == "velocity" else reverse_step
    (scale,), two = policy.sample_law.cfg_scale, policy.sample_law.guided
    for i in range(policy.layout.steps):
        seen = known(step >= i)
        if two:
            both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
            z = model(model.condition(both), canvas.repeat(2, 1, 1), seen.repeat(2, 1))
        else:
            z = model(model.condition(labels), canvas, seen)
        x = noise[:, :, 0]
        for n in range(denoiser.moves):
            t = torch.full(x.shape[:2], denoiser.moves - 1 - n)
            out = head(x.repeat(2, 1, 1) if two else x, denoiser.process.timesteps[t].repeat(1 + two, 1), z)
            if two:
                out = (mixed if head.config.target == "velocity" else guided)(*out.chunk(2), scale)
            mean, log_variance = follows(denoiser.process, out, x, t)
            x = drawn(mean, log_variance, noise[:, :, n + 1]) if n + 1 < denoiser.moves else mean
        canvas = torch.where((step == i)[..., None], x, canvas)
    return canvas


def drawing(device: torch.device, budget: float) -> list[list[object]]:
    rows = []
    for name, (grid, steps, moves, count, width, head) in ROLLOUTS.items():
        for law in (PLAIN, GUIDED) if steps == 16 else (PLAIN,):
            policy = new_policy(grid, steps, moves, width=width, depth=2, head=head, law=law)
            prompts, rng = asked(count)
            apart = (policy.rollout(prompts, rng).actions[:, :, -1] - full_grid(policy, prompts, rng)).abs().max().item()
            sides: Mapping[str, Callable[[], object]] = {
                "ours": lambda policy=policy, prompts=prompts, rng=rng: policy.rollout(prompts, rng),
                "grid": lambda policy=policy, prompts=prompts, rng=rng: full_grid(policy, prompts, rng),
            }
            taken = alternate(sides, device, budget / 6, least=2)
            ratio = taken["grid"] / taken["ours"]
            cells = [spread(taken["grid"]), spread(taken["ours"]), f"**{ratio.median():.1f}** ({spread(ratio, digits=1)})", f"{apart:.0e}"]
            rows.append([f"{name}, T = {moves}, {count} pictures{', guided' if law.guided else ''}", len(ratio), *cells])
    return rows


def released_rollouts() -> list[list[object]]:
    """TFLOP of a picture by the released sizes, without guidance, by part."""
    rows = []
    for size in ("B", "L"):
        for steps, moves in ((64, 100), (64, 25), (16, 25)):
            family = family_of(released(size), UnmaskingConfig(steps=steps, denoise_steps=moves))
            assert isinstance(family, MaskedFamily)
            transformer = sum(family.seeing(n).flops for n in family.known)
            chain = family.layout.tokens * (family.reading().flops + moves * family.moving().flops)
            whole, ours = transformer + family.layout.steps * chain, transformer + chain
            cells = [f"{part / 1e12:.2f}" for part in (transformer, chain, family.layout.steps * chain)]
            rows.append([f"MAR-{size}, n = {steps}, T = {moves}", *cells, f"**{whole / ours:.1f}**"])
    return rows


# ---- memory -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One training step on 4 pictures of 16x16 tokens, at 4 of 16 steps."""

    trajectories: int
    moves: int
    train_head: bool = False

    def peak(self, device: torch.device) -> float:
        """MiB that score and backward pass hold at most."""
        policy = new_policy(16, 16, 25, width=96, depth=2, head=96)
        policy.train_head(self.train_head)
        grpo = GRPOConfig(num_generations=4)
        mode = "include_primary" if self.trajectories else "precision_weight"
        uncertain = 1.0 if self.trajectories == 1 else 0.3
        algorithm = MARGRPO(
            MARGRPOConfig(
                grpo=grpo,
                ar_steps=4,
                denoise_moves=self.moves,
                num_trajectories=self.trajectories,
                trajectories=mode,
                uncertain_fraction=uncertain,
                train_head=self.train_head,
            )
        )
        judge = RewardJudge({"red": (1.0, lambda images, prompts: images[:, 0].mean((1, 2)))})
        prompts, rng = asked(1)
        (batch,) = algorithm.collect(policy, prompts, judge, rng, 0)
        judge.close()

        def step() -> None:
            (-algorithm.objective(policy, batch)[0]).backward()

        step()
        return peak_bytes(device, step) / 2**20


def memory(device: torch.device) -> list[list[object]]:
    """With slices of the head as they are, which hold all of it at this width, and of a 64th, which hold as many rows as those of a head of
    6144 numbers would."""
    rows = []
    steps = {
        "M = 0, k = 5": Training(0, 5),
        "M = 1 (all tokens), k = 5": Training(1, 5),
        "M = 4, k = 5": Training(4, 5),
        "M = 16, k = 5": Training(16, 5),
        "M = 16, k = 10": Training(16, 10),
        "M = 16, k = 20": Training(16, 20),
    }
    whole = masked.CHUNK_ELEMENTS
    for name, step in steps.items():
        masked.CHUNK_ELEMENTS = whole // 64
        small = step.peak(device)
        masked.CHUNK_ELEMENTS = whole
        full, autograd = step.peak(device), replace(step, train_head=True).peak(device)
        rows.append([name, f"{small:.0f}", f"{full:.0f}", f"{autograd:.0f}", f"{autograd / small:.1f}"])
    return rows


# ---- the gradient of further paths ------------------------------------------------------------------------------------------------------


def new_head(target: Target, width: int = 64) -> DiffusionHead:
    """Of MAR's shape, with what begins at 0 filled."""
    torch.manual_seed(0)
    head = DiffusionHead(head_config(width, 3, target), 16, 32).requires_grad_(False)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return head


def gradients(head: DiffusionHead, moves: int, paths: int, law: LawConfig, scored: Tensor | None) -> Tensor:
    """Gradient by z of the log-density of so many paths from one z, scored without guidance at the admissible moves or at those `scored`,
    [paths, E]; one more axis where each of `scored` is a row of its own."""
    denoiser, rng = head.chain(moves), torch.Generator().manual_seed(1)
    z = torch.randn(1, 32, generator=rng).expand(paths, -1)
    nothing = torch.randn(1, 32, generator=rng).expand(paths, -1) if law.guided else None
    step = torch.zeros(paths, dtype=torch.long)
    noise = torch.randn(paths, moves + 1, 16, generator=rng)
    with torch.no_grad():
        path, _ = walk([Head(denoiser=denoiser, law=law)], Latents(asked=z, nothing=nothing), step, noise)
    found = []
    for some in denoiser.admissible[None] if scored is None else scored:
        leaf = z.clone().requires_grad_()
        moved = Moves(path=path, scored=some.expand(paths, -1), step=step)
        logp, _ = moved.score(Head(denoiser=denoiser, law=PLAIN), Latents(asked=leaf, nothing=None), None)
        found.append(torch.autograd.grad(logp.sum(), leaf)[0].double())
    return found[0] if scored is None else torch.stack(found)


def expectation(paths: int) -> list[list[object]]:
    """The released estimator, the mean of M scores, with one advantage: its squared norm over that of one score, 95 % intervals from
    disjoint groups of M; and how much of one score's squared norm its mean is, without bias."""
    rows = []
    for target in ("noise", "velocity"):
        for name, law in (("off", PLAIN), ("3, scored without", GUIDED)):
            g = gradients(new_head(target), 25, paths, law, None)
            one, total = g.square().sum(1).mean(), g.sum(0)
            mean = ((total.square().sum() - g.square().sum()) / (paths * (paths - 1)) / one).item()
            cells = []
            for m in (1, 4, 16, 64):
                norms = g.unflatten(0, (-1, m)).mean(1).square().sum(1) / one
                cells.append(f"{norms.mean():.4f} ± {1.96 * norms.std() / len(norms) ** 0.5:.4f} ({mean + (1 - mean) / m:.4f})")
            rows.append([target, name, *cells, f"{mean:.4f}"])
    return rows


# ---- the gradient of single moves -------------------------------------------------------------------------------------------------------


def spikes(paths: int) -> list[list[object]]:
    """Root mean square of the gradient of each move that adds noise, over the median of the admissible ones."""
    rows = []
    for target in ("noise", "velocity"):
        for moves in (25, 100):
            head = new_head(target)
            denoiser = head.chain(moves)
            noisy = denoiser.noisy.nonzero()[:, 0]
            each = torch.zeros(len(noisy), moves, dtype=torch.bool)
            each[torch.arange(len(noisy)), noisy] = True
            norm = torch.full((moves,), torch.nan, dtype=torch.float64)
            norm[noisy] = gradients(head, moves, paths, PLAIN, each).square().sum(-1).mean(1).sqrt()
            admitted = norm[denoiser.admissible]
            middle, all_noisy = admitted.median(), norm[noisy]
            lost = 1 - admitted.square().sum() / all_noisy.square().sum()
            first = [f"{norm[n] / middle:.2g}" for n in (0, 1, moves // 2, moves - 3, moves - 2)]
            rows.append([target, moves, *first, f"**{all_noisy.max() / middle:.2g}**", f"**{admitted.max() / middle:.2g}**", f"{lost:.1%}"])
    return rows


# ---- further paths, and the head's own cost ---------------------------------------------------------------------------------------------


def further(device: torch.device, budget: float) -> list[list[object]]:
    rows = []
    for grid, steps, count, copies in ((6, 16, 2, 4), (6, 16, 8, 4), (16, 16, 2, 4)):
        policy = new_policy(grid, steps, 25, width=96, depth=2, head=96)
        prompts, rng = asked(count)
        rollout = policy.rollout(prompts, rng)

        def one_by_one(policy=policy, rollout=rollout, rng=rng, copies=copies) -> None:
            for m in range(copies):
                policy.redraw(rollout, rng.at("further", m))

        sides: Mapping[str, Callable[[], object]] = {
            "loop": one_by_one,
            "batch": lambda policy=policy, rollout=rollout, rng=rng, copies=copies: policy.redraw(
                rollout, rng.at("further").repeat(copies)
            ),
        }
        taken = alternate(sides, device, budget / 3, least=3)
        ratio = taken["loop"] / taken["batch"]
        cells = [spread(taken["loop"]), spread(taken["batch"]), f"**{ratio.median():.2f}** ({spread(ratio)})"]
        rows.append([f"{count} pictures of {grid}x{grid}, M = {copies}", len(ratio), *cells])
    return rows


BUCKET = 256


def buckets(device: torch.device, budget: float) -> list[list[object]]:
    """A move of the head for some rows: as it is; filled up to a bucket of 256 rows; compiled for the bucket."""
    rows = []
    head = new_head("velocity", 96)
    compiled = torch.compile(head.denoise, dynamic=False)
    for count in (8, 64, 200):
        x, y = torch.randn(count, 16), torch.randn(count, 96)
        full_x, full_y = torch.zeros(BUCKET, 16), torch.zeros(BUCKET, 96)
        full_x[:count], full_y[:count] = x, y

        def times(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    for _ in range(20):
                        call(x, y)

            return run

        sides = {
            "own": times(head.denoise, x, y),
            "bucket": times(head.denoise, full_x, full_y),
            "compiled": times(compiled, full_x, full_y),
        }
        taken = alternate(sides, device, budget / 3, least=5)
        rows.append(
            [
                count,
                *(spread(taken[side] / 20, 1e3, 2) for side in sides),
                *(spread(taken["own"] / taken[side]) for side in ("bucket", "compiled")),
            ]
        )
    return rows


def main() -> None:
    given = arguments(__doc__ or "", 8.0, model=None, part=("all", "rollout", "memory", "expectation", "spikes", "further", "buckets"))
    budget, device = 60 * given.minutes, given.device
    if device.type != "cpu":
        raise ConfigError(f"--device {device}: these are tables for a CPU. Give --device cpu.")

    def wanted(part: str) -> bool:
        return given.part in ("all", part)

    print(f"## MAR-GRPO step\n\n{machine(device)}.")
    print("Medians (quartiles) of alternating runs; seconds of this process's own time.\n")
    if wanted("rollout"):
        print(f"### Drawing: the step's tokens alone, and all tokens at every step (bar: {ROLLOUT_BAR:.0f} times)\n")
        head = ["setting", "rounds", "whole grid, s", "ours, s", "whole grid / ours", "tokens differ by at most"]
        print(table(head, drawing(device, 0.6 * budget)))
        print("### TFLOP of a picture at the released sizes, without guidance\n")
        print(table(["model", "transformer", "head, ours", "head, whole grid", "whole grid / ours"], released_rollouts()))
    if wanted("memory"):
        print("### A training step, peak MiB (torch's profiler)\n")
        head = ["further paths, moves", "frozen head, slices of 2^20", "frozen head, slices of 2^26", "autograd through the head", "ratio"]
        print(table(head, memory(device)))
    if wanted("expectation"):
        print("### The released expectation: E|mean of M|^2 / E|one|^2 ± 95 % (mean + (1 - mean) / M), and its mean\n")
        head = ["target", "guidance", "M = 1", "M = 4", "M = 16", "M = 64", "squared norm of the mean"]
        print(table(head, expectation(4096)))
    if wanted("spikes"):
        print("### Gradient of single moves, over the median of the admissible ones\n")
        head = ["target", "T", "t = T-1", "T-2", "middle", "t = 2", "t = 1", "largest, all", "largest, admissible", "squared norm left out"]
        print(table(head, spikes(256)))
    if wanted("further"):
        print("### M further paths: one after another, and at once\n")
        print(table(["setting", "rounds", "loop, s", "at once, s", "loop / at once"], further(device, 0.2 * budget)))
    if wanted("buckets"):
        print(f"### A move of a head of 3 blocks of 96, ms: own rows, a bucket of {BUCKET}, a compiled bucket\n")
        head = ["rows", "own", "bucket", "compiled", "own / bucket", "own / compiled"]
        print(table(head, buckets(device, 0.1 * budget)))


if __name__ == "__main__":
    main()
