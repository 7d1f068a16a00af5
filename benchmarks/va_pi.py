"""What VA-pi's step costs, against the form its release repeats for every draw: gradient, time, memory, operations; and drawing freely,
against a plain loop.

    python benchmarks/va_pi.py [--minutes 6]

Times are medians of alternating runs in one process, quartiles in brackets."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from common import alternate, arguments, machine, spread, table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varl.algorithms.advantages import group_advantages
from varl.algorithms.va_pi import VAPI
from varl.checkpoints.llamagen import SIZES
from varl.config import GRPOConfig, LawConfig, RasterConfig, ReconstructionConfig, VAPIConfig, VQConfig
from varl.models.raster import NORM_EPS, Raster
from varl.plan.cost import matmul_speed
from varl.plan.rewards import peak_bytes
from varl.policies.raster import RasterPolicy, corrupt
from varl.policies.sampling import draw
from varl.rewards.judge import judge_now
from varl.rewards.perceptual import STAGES, VGG16, feature_distance
from varl.rewards.reconstruction import ReconstructionReward, mean_squared_error
from varl.rng import Stream
from varl.tokenizers.vq import VQ
from varl.types import Judgement, Prompt, RewardFn

GROUP, PICTURES = 8, 16
NOISE, PRIOR, CLIP = 0.5, 0.1, 0.2
TIME_BAR, OPERATIONS_BAR, DECODE_BAR, SAME = 3.0, 4.0, 3.0, 1e-5

DIGEST = {"XL": (591, 136), "XXL": (995, 172)}
"""TFLOP of the released step and of one forward pass for each picture, as the method's digest counts them."""

TOKENIZER = VQConfig(vocab=2048, channels=8, latent=48, width=48, multipliers=(1, 2, 2), blocks=1, attention=False, patch=4)
SHAPES = {"small": (4, 128, 2), "middle": (8, 192, 3), "large": (12, 256, 4)}
"""Depth, width and heads beside one tokenizer: their forward passes stand to its decoder about as those of LlamaGen's B, L and XL do."""
LOOK = ((8, 8), (16, 16), (32, 32))
"""Of the perceptual network on the CPU."""


def raster(depth: int, width: int, heads: int, grid: int, tokenizer: VQConfig, classes: int = 1000) -> RasterConfig:
    return RasterConfig(depth=depth, width=width, heads=heads, grid=(grid, grid), num_classes=classes, tokenizer=tokenizer)


def new_policy(
    config: RasterConfig, device: torch.device, law: LawConfig = LawConfig(), dtype: torch.dtype = torch.float32
) -> RasterPolicy:
    """With random weights, also in the head, which begins at zero."""
    model, tokenizer = Raster(config).to(device), VQ(config.tokenizer).to(device)
    nn.init.normal_(model.output.weight, std=0.02)
    return RasterPolicy(model, tokenizer, sample_law=law, score_law=law, dtype=dtype)


# ---- a step, ours and repeated ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Now:
    """A Judge in the caller's own thread, where its operations are counted."""

    reward: RewardFn

    def submit(self, images: Tensor, prompts: Sequence[Prompt], group: int | None = None) -> "Future[Judgement]":
        future: Future[Judgement] = Future()
        future.set_result(judge_now(self.reward, images, prompts, group))
        return future


@dataclass(frozen=True)
class Step:
    """One step on `pictures` real pictures, by either side, with the same weights and dice: gradients are left in the model."""

    policy: RasterPolicy
    look: VGG16
    pictures: Tensor
    per_backward: int
    """Sequences that go through a backward pass together."""

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(label=i % 1000, image=f"{i}") for i in range(len(self.pictures))]

    @property
    def rng(self) -> Stream:
        return Stream(seed=0, path=("rollout", 0), rows=tuple(range(len(self.pictures))))

    def _pictures_of(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.pictures[[int(prompt.image or 0) for prompt in prompts]]

    def ours(self) -> None:
        """The classes that a run uses; references are looked at anew, as in a step on new pictures."""
        grpo = GRPOConfig(num_generations=GROUP, epsilon=CLIP, rollouts_per_chunk=GROUP * len(self.pictures), loss_type="dapo")
        algorithm = VAPI(VAPIConfig(grpo=grpo, prefix_noise=NOISE, prior_weight=PRIOR, drop_condition=0.0), self._pictures_of)
        judge = Now(ReconstructionReward(ReconstructionConfig(), self._pictures_of, self.look))
        model, size = self.policy.module, 0.0
        model.zero_grad()
        for piece in algorithm.collect(self.policy, self.prompts, judge, self.rng, 0):
            for part in piece.split(self.per_backward * (GROUP + 1)):
                objective, _ = algorithm.objective(self.policy, part)
                (-objective).backward()
                size += float(part.size.sum())
        for weight in model.parameters():
            weight.grad = None if weight.grad is None else weight.grad / size

    def repeated(self, frozen: Raster) -> None:
        """As released, dropout off: one forward pass to draw from, whose law is made anew for each draw; then every draw is a sequence of
        its own, forwarded with its gradient, with the cross-entropy of the picture's tokens, and once more by the frozen initial model, of
        which nothing is used. References are looked at once for every draw. Advantages have our soft deviation."""
        policy, model, tokenizer = self.policy, self.policy.module, self.policy.tokenizer
        model.zero_grad()
        pictures, batch, tokens = self.pictures, len(self.pictures), self.policy.layout.tokens
        labels = torch.arange(batch, device=policy.device) % 1000
        with torch.no_grad():
            own = tokenizer.encode(pictures * 2 - 1)
            context = corrupt(
                own, self.rng.repeat(GROUP).select(range(0, GROUP * batch, GROUP)).at("prefix").uniform(tokens, 2), NOISE, policy.vocab
            )
            uniform = self.rng.repeat(GROUP).at("tokens").uniform(tokens).unflatten(0, (batch, GROUP))
            logits = model.logits(model(model.condition(labels), context)).float()
            drawn, old = [], []
            for g in range(GROUP):
                logp = logits.log_softmax(-1)
                drawn.append(draw(logp, uniform[:, g]))
                old.append(logp.gather(-1, drawn[-1][..., None])[..., 0])
            ids, old_logp = torch.stack(drawn, 1).flatten(0, 1), torch.stack(old, 1).flatten(0, 1)
            shown = torch.cat([tokenizer.render(tokenizer.codes(some, model.config.grid)) for some in ids.split(GROUP)])
            shown, wanted = shown.add(1).div(2).clamp(0, 1), pictures.repeat_interleave(GROUP, 0)
            far = torch.cat(
                [feature_distance(self.look(a), self.look(b)) for a, b in zip(shown.split(GROUP), wanted.split(GROUP), strict=True)]
            )
            reward = -(mean_squared_error(shown, wanted) + far).unflatten(0, (batch, GROUP))
            advantage = group_advantages(reward).clamp(-5, 5).flatten()
        for rows in torch.arange(batch * GROUP).split(self.per_backward):
            of = rows // GROUP
            logits = model.logits(model(model.condition(labels[of]), context[of])).float()
            with torch.no_grad():
                frozen.logits(frozen(frozen.condition(labels[of]), context[of])).float()
            logp = logits.log_softmax(-1).gather(-1, ids[rows][..., None])[..., 0]
            ratio, credit = (logp - old_logp[rows]).exp(), advantage[rows][:, None]
            policy_loss = torch.maximum(-credit * ratio, -credit * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            loss = policy_loss + PRIOR * F.cross_entropy(logits.flatten(0, 1), own[of].flatten())
            (loss * len(rows) / (batch * GROUP)).backward()


def gradients(step: Callable[[], None], model: nn.Module) -> Tensor:
    step()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def operations(call: Callable[[], object]) -> float:
    """TFLOP of the products in one call; attention spelled out, so that it is counted on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def against_repeated(device: torch.device, budget: float) -> tuple[list[list[object]], list[list[object]]]:
    """A table of times and memory, and one of operations and gradients, a row for each of SHAPES."""
    times, sums = [], []
    for name, (depth, width, heads) in SHAPES.items():
        torch.manual_seed(0)
        config = raster(depth, width, heads, 12, TOKENIZER)
        policy, frozen = new_policy(config, device), Raster(config).to(device).requires_grad_(False)
        step = Step(policy, VGG16(LOOK).eval().requires_grad_(False).to(device), torch.rand(4, 3, *config.image_size, device=device), GROUP)
        sides: Mapping[str, Callable[[], None]] = {"ours": step.ours, "repeated": lambda step=step, frozen=frozen: step.repeated(frozen)}
        ours, repeated = (gradients(side, policy.module) for side in sides.values())
        gap = ((ours - repeated).norm() / repeated.norm()).item()
        few, many = (operations(side) for side in sides.values())
        by_part = sum(n * parts_of(config, LOOK)[part] for part, (n, _) in passes(4).items())
        sums.append([name, f"{many:.3f}", f"{few:.3f}", f"{by_part:.3f}", f"{many / few:.1f}", f"{gap:.1e}"])
        taken = alternate(sides, device, budget / len(SHAPES), least=3)
        peaks = {side: peak_bytes(device, call) / 2**20 for side, call in sides.items()}
        ratio = taken["repeated"] / taken["ours"]
        cells = [spread(taken["repeated"]), spread(taken["ours"]), f"**{ratio.median():.1f}** ({spread(ratio, digits=1)})"]
        memory = [f"{peaks['repeated']:.0f}", f"{peaks['ours']:.0f}", f"{peaks['repeated'] / peaks['ours']:.1f}"]
        times.append([f"{name}: {depth} x {width}", len(taken["ours"]), *cells, *memory])
    return times, sums


# ---- operations at the released sizes, without memory -----------------------------------------------------------------------------------


def parts_of(config: RasterConfig, look: Sequence[Sequence[int]]) -> dict[str, float]:
    """TFLOP of one picture, or one sequence, by part."""
    with torch.device("meta"):
        model, tokenizer, network = Raster(config), VQ(config.tokenizer), VGG16(look)
        image, label, ids = torch.empty(1, 3, *config.image_size), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1).long()
        ids = ids.expand(1, model.tokens)

        def forward() -> Tensor:
            return model.logits(model(model.condition(label), ids))

        def quietly(call: Callable[[], object]) -> float:
            with torch.no_grad():
                return operations(call)

        return {
            "encode": quietly(lambda: tokenizer.features(image).flatten(2).mT @ tokenizer.quantize.embedding.weight.T),
            "forward": quietly(forward),
            "train": operations(lambda: forward().sum().backward()),
            "decode": quietly(lambda: tokenizer.render(tokenizer.codes(ids, config.grid))),
            "look": quietly(lambda: network(image)),
        }


def passes(pictures: int, *, encode: bool = True) -> dict[str, tuple[int, int]]:
    """How many pictures or sequences go through each part, in our step and in the repeated form; `encode`: tokens are not kept."""
    draws = pictures * GROUP
    return {
        "encode": (pictures if encode else 0, pictures),
        "forward": (pictures, pictures + draws),
        "train": (pictures, draws),
        "decode": (draws, draws),
        "look": (draws + pictures, 2 * draws),
    }


PARTS = {
    "encode": "encode",
    "forward": "forward to draw from; the frozen model's",
    "train": "forward and backward",
    "decode": "decode",
    "look": "perceptual network",
}


def released_sizes() -> list[list[object]]:
    """TFLOP of a step on 16 pictures of 384 pixels, ours with tokens kept, by part and in all."""
    rows = []
    for name, (theirs, least) in DIGEST.items():
        parts = parts_of(raster(*SIZES[name], 24, VQConfig()), STAGES)
        counts = passes(PICTURES, encode=False)
        for part, title in PARTS.items():
            few, many = counts[part]
            rows.append([name, title, f"{many * parts[part]:.1f}", f"{few * parts[part]:.1f}", "", "", ""])
        few, many = (sum(both[side] * parts[part] for part, both in counts.items()) for side in (0, 1))
        encoding = passes(PICTURES)["encode"][0] * parts["encode"]
        merged = few - counts["forward"][0] * parts["forward"]
        ratio = f"**{many / few:.2f}** ({many / (few + encoding):.2f} with encoding, {many / merged:.2f} with one forward pass)"
        rows.append([name, "all", f"{many:.1f}", f"{few:.1f}", ratio, theirs, least])
    return rows


# ---- drawing freely ---------------------------------------------------------------------------------------------------------------------

GUIDED = LawConfig(cfg_scale=(2.0,))
LAWS = {"guided": GUIDED, "not guided": LawConfig()}
DECODED = {"256 tokens": (6, 128, 2, 16), "576 tokens": (2, 256, 4, 24), "wide, 256 tokens": (1, 768, 12, 16)}
"""Depth, width, heads and grid."""
Pick = Callable[[Tensor, int], Tensor]
"""From probabilities [B, V] and the token's place to ids [B]."""


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + NORM_EPS)).type_as(x) * weight


def plain_rotation(x: Tensor, turns: Tensor) -> Tensor:
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


@torch.no_grad()
def plain_loop(policy: RasterPolicy, labels: Tensor, pick: Pick) -> Tensor:
    """Tokens drawn as released samplers write it, of our model only the weights: both branches of the guidance in one batch, keys and
    values joined anew at every step, one token longer, softmax over the vocabulary."""
    model, guided, (scale,) = policy.module, policy.sample_law.guided, policy.sample_law.cfg_scale
    given = torch.cat([labels, torch.full_like(labels, model.config.num_classes or 0)]) if guided else labels
    cache: list[tuple[Tensor, Tensor] | None] = [None] * len(model.layers)
    ids: list[Tensor] = []
    for at in range(model.tokens):
        x = model.tok_embeddings((torch.cat([ids[-1], ids[-1]]) if guided else ids[-1])[:, None]) if ids else model.condition(given).tokens
        for place, block in enumerate(model.layers):
            attention, mlp = block.attention, block.feed_forward
            parts = attention.wqkv(plain_norm(x, block.attention_norm.weight)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in parts)
            q, k = (plain_rotation(part, model.turns[at : at + 1]) for part in (q, k))
            if (before := cache[place]) is not None:
                k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
            cache[place] = k, v
            x = x + attention.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            inner = plain_norm(x, block.ffn_norm.weight)
            x = x + mlp.w2(F.silu(mlp.w1(inner)) * mlp.w3(inner))
        logits = model.output(plain_norm(x, model.norm.weight))[:, -1].float()
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + scale * (cond - uncond)
        ids.append(pick(logits.softmax(-1), at))
    return torch.stack(ids, 1)


def drawing(device: torch.device, budget: float) -> list[list[object]]:
    """Whole pictures, 16 at once. Ours draws with its own uniforms; the plain loop with `multinomial` where it is timed, and with our
    uniforms where tokens are compared."""
    rows = []
    for (name, (depth, width, heads, grid)), (title, law) in product(DECODED.items(), LAWS.items()):
        torch.manual_seed(0)
        policy = new_policy(raster(depth, width, heads, grid, TOKENIZER), device, law)
        prompts, rng = [Prompt(label=i) for i in range(PICTURES)], Stream(seed=0, path=("rollout", 0), rows=tuple(range(PICTURES)))
        labels, uniform = torch.arange(PICTURES, device=device), rng.at("tokens").uniform(policy.layout.tokens).to(device)
        theirs = plain_loop(policy, labels, lambda p, at, uniform=uniform: draw(p.log(), uniform[:, at]))
        same = (policy.rollout(prompts, rng).actions == theirs).float().mean().item()
        sides: Mapping[str, Callable[[], object]] = {
            "ours": lambda policy=policy, prompts=prompts, rng=rng: policy.rollout(prompts, rng),
            "plain": lambda policy=policy, labels=labels: plain_loop(policy, labels, lambda p, _: p.multinomial(1)[:, 0]),
        }
        taken = alternate(sides, device, budget / len(DECODED) / len(LAWS), least=2)
        ratio = taken["plain"] / taken["ours"]
        cells = [spread(taken["plain"]), spread(taken["ours"]), f"**{ratio.median():.2f}** ({spread(ratio)})"]
        rows.append([f"{name}: {depth} x {width}", title, len(ratio), *cells, f"{same:.4f}"])
    return rows


# ---- on a GPU ---------------------------------------------------------------------------------------------------------------------------


def real_sizes(device: torch.device) -> list[list[object]]:
    """One step of a released size from random weights, in bf16, and drawing freely beside the time that reading weights and cache takes."""
    rows = []
    peak, bandwidth = matmul_speed(device, torch.bfloat16, 4096), copy_speed(device)
    for name in DIGEST:
        torch.manual_seed(0)
        config = raster(*SIZES[name], 24, VQConfig())
        policy = new_policy(config, device, GUIDED, torch.bfloat16)
        step = Step(
            policy, VGG16().eval().requires_grad_(False).to(device), torch.rand(PICTURES, 3, *config.image_size, device=device), PICTURES
        )
        parts, counts = parts_of(config, STAGES), passes(PICTURES)
        work = sum(few * parts[part] for part, (few, _) in counts.items())
        (took,) = alternate({"step": step.ours}, device, 20, least=3).values()
        memory = peak_bytes(device, step.ours) / 2**30
        prompts, rng = [Prompt(label=i) for i in range(PICTURES)], Stream(seed=0, path=("free",), rows=tuple(range(PICTURES)))
        (drew,) = alternate(
            {"rollout": lambda policy=policy, prompts=prompts, rng=rng: policy.rollout(prompts, rng)}, device, 20, least=2
        ).values()
        depth, width, _ = SIZES[name]
        cache = 2 * PICTURES * depth * 2 * width * policy.layout.tokens // 2 * 2  # both branches; half full in the mean; bf16
        weights = sum(weight.numel() for block in policy.module.layers for weight in block.parameters()) * 2
        floor = policy.layout.tokens * (weights + cache) / bandwidth
        rows.append(
            [
                name,
                spread(took),
                f"{PICTURES * GROUP / took.median():.1f}",
                f"{memory:.0f}",
                f"{1e12 * work / took.median() / peak:.0%}",
                spread(drew),
                f"{floor / drew.median():.0%}",
            ]
        )
        del policy, step
    return rows


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some copies of a GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = alternate({"copy": lambda: target.copy_(source)}, device, 1.0)["copy"]
    return 2 * source.numel() / taken.min().item()


def main() -> None:
    given = arguments(__doc__ or "", 6.0, model=None)
    budget = 60 * given.minutes / 2
    print(f"## VA-pi step\n\n{machine(given.device)}.")
    print("Medians (quartiles) of alternating runs; seconds of this process's own time on a CPU.\n")

    print(f"### {GROUP} draws of each picture: one pass, and a pass for each (bar at the largest: {TIME_BAR:.0f} times)\n")
    times, sums = against_repeated(given.device, budget)
    head = ["size", "rounds", "repeated, s", "ours, s", "repeated / ours", "repeated, peak MiB", "ours, peak MiB", "repeated / ours"]
    print(table(head, times))
    head = ["size", "repeated, TFLOP", "ours, TFLOP", "ours by part", "repeated / ours", f"gradients differ by (bar: {SAME:g})"]
    print(table(head, sums))

    print(f"### TFLOP of a step at the released sizes (bar at XL: {OPERATIONS_BAR:.0f} times)\n")
    head = ["size", "part", "repeated", "ours, tokens kept", "repeated / ours", "digest: repeated", "digest: ours"]
    print(table(head, released_sizes()))

    print(f"### {PICTURES} pictures drawn freely (bar: {DECODE_BAR:.0f} times)\n")
    head = ["model", "law", "rounds", "plain loop, s", "ours, s", "plain / ours", "same tokens"]
    print(table(head, drawing(given.device, budget)))

    print("### The released sizes, random weights, on a GPU\n")
    if given.device.type != "cuda":
        print("Not measured on a GPU.")
        return
    head = ["size", "step, s", "draws/s", "peak GiB", "share of bf16 peak", "16 pictures drawn freely, s", "share of bandwidth floor"]
    print(table(head, real_sizes(given.device)))


if __name__ == "__main__":
    main()
