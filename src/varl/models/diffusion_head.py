"""MAR's diffusion head (arXiv 2406.11838): each token's vector is drawn from noise in N steps, given what the transformer says of it.

    x_N ~ N(0, 1)        x_t-1 ~ N(mean_t, exp(log_variance_t))        mean and log variance from the network's (eps, v) = net(x_t, t, z)

Or the network says the velocity u alone (arXiv 2202.00512), and the log variance is the posterior's; small models learn better from it.

A process of 1000 steps is trained (cosine betas, arXiv 2102.09672), and fewer of its steps are drawn. Tables are made in float64 and looked
up in fp32, in which all here is computed. `t` counts the steps that were kept, from 0, the last to be drawn; the network is told which of
the 1000 that is. Module and parameter names are those of the released checkpoints."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Real
from torch import Tensor, nn

from varl.config import DiffusionHeadConfig
from varl.errors import ConfigError

STEPS = 1000
"""Of the process that is trained."""
MAX_BETA = 0.999
OFFSET = 0.008
"""Of the cosine, so that the first betas are not too small."""
TIME_WIDTH, LONGEST_PERIOD = 256, 10000.0
NORM_EPS = 1e-6
BIN = 1 / 255
"""Half the distance of two neighbouring values of a quantised vector's element, as released (which takes it for a byte in [-1, 1])."""
LEAST_MASS = 1e-12

# ---- the process ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Process:
    """Tables of the steps that were kept. a is the product of 1 - beta up to the step, a' up to the one before it (1 at the first)."""

    timesteps: Int[Tensor, " N"]
    """Which of the 1000 each is."""
    betas: Float64[Tensor, " N"]
    signal: Float64[Tensor, " N"]
    """sqrt(a): the share of x_0 in x_t."""
    noise: Float64[Tensor, " N"]
    """sqrt(1 - a)."""
    start_of_x: Float64[Tensor, " N"]
    """1 / sqrt(a): x_0 = start_of_x x_t - start_of_eps eps."""
    start_of_eps: Float64[Tensor, " N"]
    """sqrt(1 / a - 1)."""
    mean_of_start: Float64[Tensor, " N"]
    """beta sqrt(a') / (1 - a): the posterior's mean is mean_of_start x_0 + mean_of_x x_t."""
    mean_of_x: Float64[Tensor, " N"]
    """(1 - a') sqrt(1 - beta) / (1 - a)."""
    log_betas: Float64[Tensor, " N"]
    """The largest log variance of a step."""
    log_variances: Float64[Tensor, " N"]
    """The posterior's, the smallest: log(beta (1 - a') / (1 - a)). At the first step, where that is log 0, the second step's; log beta, if
    there is no second."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Process":
        return Process(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def cosine_betas() -> Float64[Tensor, " N"]:
    """1 - f((i + 1) / 1000) / f(i / 1000) with f(u) = cos(pi / 2 * (u + 0.008) / 1.008)^2, at most 0.999: arXiv 2102.09672 Eq. 17."""

    def f(u: float) -> float:
        return math.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    return torch.tensor([min(1 - f((i + 1) / STEPS) / f(i / STEPS), MAX_BETA) for i in range(STEPS)], dtype=torch.float64)


def require_denoising(steps: int) -> None:
    """ConfigError for more steps than were trained, or none."""
    if not 1 <= steps <= STEPS:
        raise ConfigError(f"{steps} denoising steps of {STEPS}: set 1 to {STEPS}.")


def evenly(steps: int) -> tuple[int, ...]:
    """So many of the 1000 steps, the first and the last among them, as evenly as can be: what MAR draws with, 100. Raises ConfigError
    unless there are 1 to 1000."""
    require_denoising(steps)
    stride = (STEPS - 1) / max(steps - 1, 1)
    return tuple(round(i * stride) for i in range(steps))


def respaced(kept: Sequence[int], least_signal: float = 0.0) -> Process:
    """The process that goes through x at the `kept` steps alone: a is theirs, and beta = 1 - a / a'. All of a is lifted to least_signal +
    (1 - least_signal) a, so that it still falls at each step and no beta is 0. Raises ValueError unless `kept` ascends within 0 .. 999."""
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= STEPS:
        raise ValueError(f"respaced: {list(kept)[:8]} ... must be steps within 0 .. {STEPS - 1}, each once, in ascending order.")
    timesteps = torch.tensor(kept)
    return through(timesteps, least_signal + (1 - least_signal) * (1 - cosine_betas()).cumprod(0)[timesteps])


def through(timesteps: Int[Tensor, " N"], whole: Float64[Tensor, " N"]) -> Process:
    """The process whose a at these steps is `whole`."""
    one = torch.ones_like(whole[:1])
    betas = 1 - whole / torch.cat([one, whole[:-1]])
    a = (1 - betas).cumprod(0)
    before = torch.cat([one, a[:-1]])
    variances = betas * (1 - before) / (1 - a)
    return Process(
        timesteps=timesteps,
        betas=betas,
        signal=a.sqrt(),
        noise=(1 - a).sqrt(),
        start_of_x=(1 / a).sqrt(),
        start_of_eps=(1 / a - 1).sqrt(),
        mean_of_start=betas * before.sqrt() / (1 - a),
        mean_of_x=(1 - before) * (1 - betas).sqrt() / (1 - a),
        log_betas=betas.log(),
        log_variances=torch.cat([variances[1:2], variances[1:]]).log() if len(betas) > 1 else betas.log(),
    )


def _at(table: Float64[Tensor, " N"], t: Int[Tensor, "*B"]) -> Float[Tensor, "*B 1"]:
    return table[t].float()[..., None]


# ---- one step -------------------------------------------------------------------------------------------------------------------------


def noised(process: Process, x_0: Float[Tensor, "*B C"], noise: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"]:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise."""
    return _at(process.signal, t) * x_0.float() + _at(process.noise, t) * noise.float()


def predicted_start(
    process: Process, x_t: Float[Tensor, "*B C"], eps: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]
) -> Float[Tensor, "*B C"]:
    """x_0 = x_t / sqrt(a) - sqrt(1 / a - 1) eps. Not clipped."""
    return _at(process.start_of_x, t) * x_t.float() - _at(process.start_of_eps, t) * eps.float()


def posterior_mean(process: Process, x_0: Float[Tensor, "*B C"], x_t: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"]:
    """Of x_t-1 given x_0 and x_t: beta sqrt(a') / (1 - a) x_0 + (1 - a') sqrt(1 - beta) / (1 - a) x_t."""
    return _at(process.mean_of_start, t) * x_0.float() + _at(process.mean_of_x, t) * x_t.float()


def learned_log_variance(process: Process, v: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"]:
    """f log beta + (1 - f) log(posterior variance) with f = (v + 1) / 2: arXiv 2102.09672 Eq. 15. v = 1 is the first, v = -1 the second."""
    f = (v.float() + 1) / 2
    return f * _at(process.log_betas, t) + (1 - f) * _at(process.log_variances, t)


def reverse_step(
    process: Process, out: Float[Tensor, "*B out"], x_t: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B C"], Float[Tensor, "*B C"]]:
    """Mean and log variance of x_t-1 given x_t, of what the network put out, (eps, v). At t = 0 the mean is the result, and no noise is
    added: its Gaussian has no density of what was drawn."""
    eps, v = out.chunk(2, -1)
    return posterior_mean(process, predicted_start(process, x_t, eps, t), x_t, t), learned_log_variance(process, v, t)


def velocity(process: Process, x_0: Float[Tensor, "*B C"], noise: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"]:
    """u = sqrt(a) noise - sqrt(1 - a) x_0: arXiv 2202.00512."""
    return _at(process.signal, t) * noise.float() - _at(process.noise, t) * x_0.float()


def velocity_step(
    process: Process, u: Float[Tensor, "*B C"], x_t: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B C"], Float[Tensor, "*B C"]]:
    """`reverse_step` of a network that says the velocity: x_0 = sqrt(a) x_t - sqrt(1 - a) u, and the log variance is the posterior's."""
    x_0 = _at(process.signal, t) * x_t.float() - _at(process.noise, t) * u.float()
    return posterior_mean(process, x_0, x_t, t), _at(process.log_variances, t).expand_as(x_0)


def mixed(cond: Float[Tensor, "*B C"], uncond: Float[Tensor, "*B C"], cfg_scale: float | Float[Tensor, "*B 1"]) -> Float[Tensor, "*B C"]:
    """uncond + s (cond - uncond)."""
    return uncond + cfg_scale * (cond - uncond)


def guided(
    cond: Float[Tensor, "*B out"], uncond: Float[Tensor, "*B out"], cfg_scale: float | Float[Tensor, "*B 1"]
) -> Float[Tensor, "*B out"]:
    """(eps, v) under guidance: eps is `mixed`; v is the condition's own, as released."""
    return torch.cat([mixed(cond.chunk(2, -1)[0], uncond.chunk(2, -1)[0], cfg_scale), cond.chunk(2, -1)[1]], -1)


def drawn(
    mean: Float[Tensor, "*B C"], log_variance: Float[Tensor, "*B C"], noise: Float[Tensor, "*B C"], temperature: float = 1.0
) -> Float[Tensor, "*B C"]:
    """mean + temperature exp(log_variance / 2) noise."""
    return mean + temperature * (0.5 * log_variance).exp() * noise


def log_density(
    x: Float[Tensor, "*B C"], mean: Float[Tensor, "*B C"], log_variance: Float[Tensor, "*B C"], temperature: float = 1.0
) -> Float[Tensor, "*B C"]:
    """log N(x; mean, (temperature exp(log_variance / 2))^2) of each element, in nats and fp32; not summed over channels."""
    log_std = 0.5 * log_variance.float() + math.log(temperature)
    return -0.5 * ((x.float() - mean.float()) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


# ---- what it is trained on ------------------------------------------------------------------------------------------------------------


def gaussian_kl(
    mean: Float[Tensor, "*B C"], log_variance: Float[Tensor, "*B C"], other: Float[Tensor, "*B C"], other_log: Float[Tensor, "*B C"]
) -> Float[Tensor, "*B C"]:
    """KL(N(mean, exp(log_variance)) || N(other, exp(other_log))) of each element, in nats."""
    return 0.5 * (other_log - log_variance - 1 + (log_variance - other_log).exp() + (mean - other).square() * (-other_log).exp())


def log_mass(x: Float[Tensor, "*B C"], mean: Float[Tensor, "*B C"], log_variance: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
    """Log of the Gaussian's mass within 1/255 of x, in nats; below -0.999 and above 0.999 of the whole tail, as released: it was made for
    pixels, and the vectors of a latent go beyond. The distribution function is the released approximation."""
    scale = (-0.5 * log_variance).exp()
    above, below = (_normal_cdf(scale * (x - mean + side)) for side in (BIN, -BIN))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=LEAST_MASS).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def noise_loss(out: Float[Tensor, "*B out"], noise: Float[Tensor, "*B C"]) -> Float[Tensor, "*B"]:
    """Mean over channels of (eps - noise)^2."""
    return (out.chunk(2, -1)[0].float() - noise.float()).square().mean(-1)


def variance_loss(
    process: Process, out: Float[Tensor, "*B out"], x_0: Float[Tensor, "*B C"], x_t: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """The term of the variational bound, in bits per channel, from which v learns, and eps does not: KL of the posterior to the step, and
    at t = 0 the surprise of x_0. MAR's loss of a token is `noise_loss` + this."""
    eps, v = out.chunk(2, -1)
    mean, log_variance = reverse_step(process, torch.cat([eps.detach(), v], -1), x_t, t)
    true = posterior_mean(process, x_0, x_t, t)
    true_log = _at(process.log_variances, t).expand_as(true)
    nats = torch.where(t[..., None] == 0, -log_mass(x_0.float(), mean, log_variance), gaussian_kl(true, true_log, mean, log_variance))
    return nats.mean(-1) / math.log(2)


def velocity_loss(
    process: Process, out: Float[Tensor, "*B C"], x_0: Float[Tensor, "*B C"], noise: Float[Tensor, "*B C"], t: Int[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """Mean over channels of (out - u)^2: all of the loss of a network that says the velocity."""
    return (out.float() - velocity(process, x_0, noise, t)).square().mean(-1)


# ---- the network ----------------------------------------------------------------------------------------------------------------------


def sinusoid(timesteps: Real[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
    """[cos, sin] of t / 10000^(i / 128), i = 0 .. 127."""
    half = TIME_WIDTH // 2
    frequency = torch.exp(-math.log(LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angle = timesteps[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Int[Tensor, "*B"]) -> Float[Tensor, "*B W"]:
        return self.mlp(sinusoid(timesteps))


def modulation(width: int, parts: int) -> nn.Sequential:
    """From the condition to `parts` vectors, all 0 at first."""
    last = nn.Linear(width, parts * width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.SiLU(), last)


class ResBlock(nn.Module):
    """x + gate * mlp(LN(x) (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = modulation(width, 3)

    def forward(self, x: Float[Tensor, "*B W"], y: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """linear(LN(x) (1 + scale) + shift); 0 at first."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = modulation(width, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*B W"], y: Float[Tensor, "*B W"]) -> Float[Tensor, "*B out"]:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    def __init__(self, config: DiffusionHeadConfig, channels: int, condition: int) -> None:
        """`channels` C of a token's vector, `condition` the width D of what the transformer says of its place."""
        super().__init__()
        self.config = config
        width = config.width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, channels if config.target == "velocity" else 2 * channels)
        plain = [self.cond_embed, self.input_proj, *(m for block in self.res_blocks for m in block.get_submodule("mlp").modules())]
        for module in plain:  # as released
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.time_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "*B C"], timesteps: Int[Tensor, "*B"], z: Float[Tensor, "*B D"]) -> Float[Tensor, "*B out"]:
        """(eps, v), twice as wide as x, or the velocity; `timesteps` are of the 1000."""
        return self.denoise(x, self.time_embed(timesteps) + self.cond_embed(z))

    def denoise(self, x: Float[Tensor, "*B C"], y: Float[Tensor, "*B W"]) -> Float[Tensor, "*B out"]:
        """The same, with the embeddings of time and z added up already: over a chain z's is always the same, and time's for all tokens."""
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def chain(self, steps: int) -> "Ancestral":
        """As drawn with so many steps of the 1000. Raises ConfigError unless there are 1 to 1000."""
        return Ancestral(self, respaced(evenly(steps), self.config.least_signal))


# ---- the chain ------------------------------------------------------------------------------------------------------------------------


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """fp32, whatever the caller computes in. The meta device, where costs are counted, has no other precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Ancestral:
    """The head as a `Denoiser`: move 0 is the step t = N - 1, and the last, t = 0, adds no noise."""

    def __init__(self, head: DiffusionHead, process: Process) -> None:
        device = head.cond_embed.weight.device
        self.head, self.process, self.moves = head, process.to(device), len(process)
        with full_precision(device):
            self.time: Float[Tensor, "N W"] = head.time_embed(self.process.timesteps)
        self.noisy: Bool[Tensor, " N"] = torch.arange(self.moves) < self.moves - 1
        self.admissible: Bool[Tensor, " N"] = self.noisy.clone()
        """t in {2 .. N - 2}: at t = 1 and t = N - 1 what the network says counts too much. Shorter chains than 4 have no others."""
        if self.moves >= 4:
            self.admissible[[0, -2]] = False

    def read(self, z: Float[Tensor, "R E"]) -> Float[Tensor, "R W"]:
        with full_precision(z.device):
            return self.head.cond_embed(z.float())

    def law(
        self,
        x: Float[Tensor, "R d"],
        move: Int[Tensor, " R"],
        read: Float[Tensor, "R W"],
        unguided: Float[Tensor, "R W"] | None,
        guidance: Float[Tensor, "R 1"] | None,
    ) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]]:
        says_velocity = self.head.config.target == "velocity"
        with full_precision(x.device):
            x, t = x.float(), self.moves - 1 - move
            time = self.time[t]
            if unguided is None or guidance is None:
                out = self.head.denoise(x, time + read)
            else:  # rows do not see one another
                cond, uncond = self.head.denoise(torch.cat([x, x]), torch.cat([time + read, time + unguided])).chunk(2)
                out = mixed(cond, uncond, guidance) if says_velocity else guided(cond, uncond, guidance)
            mean, log_variance = velocity_step(self.process, out, x, t) if says_velocity else reverse_step(self.process, out, x, t)
        return mean, 0.5 * log_variance
