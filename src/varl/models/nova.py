"""NOVA's transformer (arXiv 2412.14169), as far as it makes a single picture: of a caption a prefix, and of that and some of the picture's
tokens a vector z for every place, from which the diffusion head draws those that are missing.

    prefix     caption + a place for every 2 x 2 tokens             (the video encoder, which reads no picture here)
    encoder    prefix + known tokens in its first half, prefix + all places, a mask in those that are not known, in its second

Blocks are normalised after each layer. Module and parameter names are those of the released checkpoints. The grid need not be square."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Real
from torch import Tensor, nn

from varl.config import NOVA_CAPTION, AncestralConfig, CaptionConfig, FlowConfig, NOVAConfig, NOVAHeadConfig, ViTConfig, settled_counts
from varl.errors import ConfigError, DataError
from varl.models import mar
from varl.models.diffusion_head import (
    STEPS,
    TIME_WIDTH,
    Process,
    cosine_betas,
    evenly,
    full_precision,
    mixed,
    posterior_mean,
    predicted_start,
    require_denoising,
    sinusoid,
    through,
)
from varl.models.flow import LEVELS, flow_factors, flow_levels
from varl.models.layers import rotate

NORM_EPS, MODULATED_EPS = 1e-5, 1e-6
PERIOD = 10000.0
MOTION, FRAMES_PER_SECOND = 5.0, 12.0
"""What the authors set where nothing is asked for."""
WELL_CONDITIONED = 10.0
"""Largest `leverage` of a move that is scored; ours. Of MAR's 25 or 100 steps it keeps all but the first and the last two."""

# ---- positions ------------------------------------------------------------------------------------------------------------------------


def waves(places: Real[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """[sin, cos] of p / 10000^(i / half), i = 0 .. half - 1, half the width each."""
    half = width // 2
    angle = places.float()[:, None] / PERIOD ** (torch.arange(half).float() / half)
    return torch.cat([angle.sin(), angle.cos()], 1)


def absolute(grid: tuple[int, int], width: int) -> Float[Tensor, "L D"]:
    """What is added to the tokens of a grid, row by row: the column's waves, then the row's, half the width each."""
    h, w = grid
    row, column = (waves(torch.arange(n), width // 2) for n in (h, w))
    return torch.cat([column[None].expand(h, -1, -1), row[:, None].expand(-1, w, -1)], 2).flatten(0, 1)


def rotations(grid: tuple[int, int], head_width: int) -> Float[Tensor, "L pairs 2"]:
    """(cos, sin) by which each pair of channels turns: the first 1/8 with the frame, which is 0 for a picture, then half of the others with
    the token's row, half with its column, by p / 10000^(2i / d) for pair i of a part of d channels."""
    h, w = grid
    still = head_width // 8
    each = (head_width - still) // 2
    frequency = PERIOD ** -(torch.arange(0, each, 2).float() / each)
    row, column = (torch.outer(torch.arange(n).float(), frequency) for n in (h, w))
    angle = torch.cat([torch.zeros(h, w, still // 2), row[:, None].expand(-1, w, -1), column[None].expand(h, -1, -1)], 2).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()], -1)


def positions(config: NOVAConfig) -> tuple[Tensor, Tensor]:
    """Of the prefix's places and of the picture's: `rotations` if they are rotary, else `absolute` ones."""
    grids = (config.grid[0] // 2, config.grid[1] // 2), config.grid
    prefix, picture = (
        rotations(grid, part.width // part.heads) if config.rotary else absolute(grid, part.width)
        for grid, part in zip(grids, (config.prefix, config.encoder), strict=True)
    )
    return prefix, picture


def after(count: int, turns: Float[Tensor, "... l pairs 2"]) -> Float[Tensor, "... n pairs 2"]:
    """`turns` after `count` places that do not turn."""
    still = torch.tensor([1.0, 0.0], device=turns.device).expand(*turns.shape[:-3], count, *turns.shape[-2:])
    return torch.cat([still, turns], -3)


# ---- layers ---------------------------------------------------------------------------------------------------------------------------


class Attention(mar.Attention):
    """Of each token to all; `turns` are rotary positions."""

    def forward(self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "... l pairs 2"] | None = None) -> Float[Tensor, "B l D"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + LN(attention(x)), x + LN(mlp(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=NORM_EPS) for _ in range(2))
        self.attn, self.mlp = Attention(config.width, config.heads), mar.MLP(config.width)

    def forward(self, x: Float[Tensor, "B l D"], turns: Float[Tensor, "... l pairs 2"] | None) -> Float[Tensor, "B l D"]:
        x = x + self.norm1(self.attn(x, turns))
        return x + self.norm2(self.mlp(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size, on patches that were cut out: tokens, vector after vector."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, tokens: Float[Tensor, "*B d"]) -> Float[Tensor, "*B D"]:
        return F.linear(tokens, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class ViT(nn.Module):
    def __init__(self, config: ViTConfig, channels: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, config.width, patch)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.depth))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)


class TextEmbed(nn.Module):
    """Features of captions, each filled up with the rows of a table, which is "none" where there is no caption."""

    weight: Tensor

    def __init__(self, config: CaptionConfig, places: int, width: int) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.register_buffer("weight", 0.02 * torch.randn(places, config.width))
        self.proj, self.norm = nn.Linear(config.width, width), nn.LayerNorm(width, eps=NORM_EPS)

    def filled(self, captions: Sequence[Float[Tensor, "_ C"]]) -> Float[Tensor, "B N C"]:
        """Raises DataError for a caption that is too long, or that another encoder read."""
        longest, width = max((len(features) for features in captions), default=0), self.weight.shape[1]
        if longest > self.tokens:
            raise DataError(f"a caption has {longest} tokens, and NOVA reads {self.tokens}. Shorten it.")
        if other := next((features.shape[1] for features in captions if features.shape[1] != width), None):
            raise DataError(f"a caption's features are {other} wide, and NOVA reads {width}. Read it with the encoder it was trained with.")
        rows = [torch.cat([features.to(self.weight), self.weight[len(features) : self.tokens]]) for features in captions]
        return torch.stack(rows)

    def forward(self, features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        return self.norm(self.proj(features))


class MaskEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bos_token, self.mask_token = (nn.Parameter(0.02 * torch.randn(1, width)) for _ in range(2))


def wave_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))


class FrameEmbed(nn.Module):
    """What is added to the first frame's places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.time_proj = nn.LayerNorm(width, eps=NORM_EPS), wave_mlp(width)

    def forward(self) -> Float[Tensor, "1 D"]:
        return self.norm(self.time_proj(waves(torch.zeros(1), TIME_WIDTH).to(self.norm.weight)))


class MotionEmbed(nn.Module):
    """Two tokens of a video model: how much shall move, and how many frames a second has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.flow_proj, self.fps_proj = wave_mlp(width), wave_mlp(width)

    def forward(self) -> Float[Tensor, "2 D"]:
        usual = waves(torch.tensor([MOTION, FRAMES_PER_SECOND]), TIME_WIDTH).to(next(self.parameters()))
        return torch.cat([self.flow_proj(usual[:1]), self.fps_proj(usual[1:])])


# ---- the head -------------------------------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(before, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*B n"]) -> Float[Tensor, "*B W"]:
        return self.fc2(F.silu(self.fc1(x)))


class Modulated(nn.Module):
    """LN(x) (1 + scale) + shift, and the further ones of `parts` vectors, all made of the condition y."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts, self.proj = parts, nn.Linear(width, parts * width)

    def forward(self, x: Float[Tensor, "*B W"], y: Float[Tensor, "*B W"]) -> tuple[Float[Tensor, "*B W"], ...]:
        scale, shift, *others = self.proj(F.silu(y)).chunk(self.parts, -1)
        return F.layer_norm(x, x.shape[-1:], eps=MODULATED_EPS) * (1 + scale) + shift, *others


class HeadBlock(nn.Module):
    """x + gate * LN(mlp(LN(x) (1 + scale) + shift))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.proj = Modulated(width, 3), Projector(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "*B W"], y: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        h, gate = self.norm1(x, y)
        return x + gate * self.norm2(self.proj(h))


class NOVAHead(nn.Module):
    """What a token is made of noise with: says the noise in x, or the velocity."""

    def __init__(self, config: NOVAHeadConfig, channels: int, patch: int, condition: int) -> None:
        """`channels` of a cell, `patch` cells per token and side, `condition` the width of z."""
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.time_cond_embed = nn.ModuleDict({"timestep_proj": Projector(TIME_WIDTH, width), "condition_proj": Projector(condition, width)})
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.depth))
        self.norm, self.head = Modulated(width, 2), nn.Linear(width, channels * patch**2)

    def time(self, timesteps: Real[Tensor, "*B"]) -> Float[Tensor, "*B W"]:
        """Of times from 0 to 1000."""
        return self.time_cond_embed["timestep_proj"](sinusoid(timesteps))

    def read(self, z: Float[Tensor, "*B D"]) -> Float[Tensor, "*B W"]:
        return self.time_cond_embed["condition_proj"](z)

    def forward(self, x: Float[Tensor, "*B d"], timesteps: Real[Tensor, "*B"], z: Float[Tensor, "*B D"]) -> Float[Tensor, "*B d"]:
        return self.denoise(x, self.time(timesteps) + self.read(z))

    def denoise(self, x: Float[Tensor, "*B d"], y: Float[Tensor, "*B W"]) -> Float[Tensor, "*B d"]:
        """The same, with the embeddings of time and z added up already."""
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, y)
        return self.head(self.norm(x, y)[0])

    def chain(self, steps: int) -> "NoiseChain | FlowChain":
        """Raises ConfigError unless there are 1 to 1000 steps."""
        require_denoising(steps)
        drawn = self.config.drawn
        return NoiseChain(self, ancestral(drawn, steps)) if isinstance(drawn, AncestralConfig) else FlowChain(self, drawn, steps)


# ---- its chains -----------------------------------------------------------------------------------------------------------------------


def trained_betas(config: AncestralConfig) -> Float64[Tensor, " N"]:
    """Of the 1000 steps."""
    if config.beta_schedule == "squaredcos_cap_v2":
        return cosine_betas()
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
    return torch.linspace(config.beta_start**power, config.beta_end**power, STEPS, dtype=torch.float64) ** (1 / power)


def spaced(config: AncestralConfig, steps: int) -> tuple[int, ...]:
    """Which of the 1000 steps are drawn, ascending. Raises ConfigError for what goes beyond them."""
    if config.timestep_spacing == "leading":
        kept = tuple(i * (STEPS // steps) + config.steps_offset for i in range(steps))
    elif config.timestep_spacing == "trailing":
        kept = tuple(round(STEPS - i * STEPS / steps) - 1 for i in reversed(range(steps)))
    else:
        kept = evenly(steps)
    if kept[-1] >= STEPS:
        raise ConfigError(f"steps_offset={config.steps_offset} moves {steps} steps up to {kept[-1]} of {STEPS}. Lower one of the two.")
    return kept


def ancestral(config: AncestralConfig, steps: int) -> Process:
    """The process that is drawn. Each step leads to the next one that is drawn; the authors' scheduler always takes it to be 1000 // N
    lower, which is the same unless the spacing is linspace, or trailing with N that does not divide 1000."""
    kept = torch.tensor(spaced(config, steps))
    return through(kept, (1 - trained_betas(config)).cumprod(0)[kept])


def leverage(process: Process) -> Float64[Tensor, " N"]:
    """How far an error of the noise that the network says moves the mean of each step, in its standard deviations, squared: (d mean / d
    eps)^2 / variance. A density's gradient grows with its root. It means nothing at the first step, which has no variance."""
    return (process.mean_of_start * process.start_of_eps).square() / process.log_variances.exp()


class _Chain:
    """What a head says along a chain, whose times, of the moves in turn, are embedded beforehand."""

    def __init__(self, head: NOVAHead, times: Real[Tensor, " N"]) -> None:
        device = head.head.weight.device
        self.head, self.moves = head, len(times)
        with full_precision(device):
            self.time: Float[Tensor, "N W"] = head.time(times.to(device))

    def read(self, z: Float[Tensor, "R E"]) -> Float[Tensor, "R W"]:
        with full_precision(z.device):
            return self.head.read(z.float())

    def says(
        self,
        x: Float[Tensor, "R d"],
        move: Int[Tensor, " R"],
        read: Float[Tensor, "R W"],
        unguided: Float[Tensor, "R W"] | None,
        guidance: Float[Tensor, "R 1"] | None,
    ) -> Float[Tensor, "R d"]:
        """The noise in x or its velocity; under guidance, that of "none" + s (it - that of "none")."""
        with full_precision(x.device):
            time = self.time[move]
            said = self.head.denoise(x.float(), time + read)
            if unguided is None or guidance is None:
                return said
            return mixed(said, self.head.denoise(x.float(), time + unguided), guidance)


class NoiseChain(_Chain):
    """A `Denoiser` by ancestral steps: each the posterior given the x_0 that the network's noise leads to. Move 0 is the last step."""

    def __init__(self, head: NOVAHead, process: Process) -> None:
        super().__init__(head, process.timesteps.flip(0))
        self.noisy: Bool[Tensor, " N"] = torch.arange(self.moves) < self.moves - 1
        self.admissible: Bool[Tensor, " N"] = self.noisy & (leverage(process).flip(0) <= WELL_CONDITIONED)
        self.process = process.to(self.time.device)

    def law(
        self,
        x: Float[Tensor, "R d"],
        move: Int[Tensor, " R"],
        read: Float[Tensor, "R W"],
        unguided: Float[Tensor, "R W"] | None,
        guidance: Float[Tensor, "R 1"] | None,
    ) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]]:
        t = self.moves - 1 - move
        start = predicted_start(self.process, x, self.says(x, move, read, unguided, guidance), t)
        mean = posterior_mean(self.process, start, x, t)
        return mean, (0.5 * self.process.log_variances[t].float())[:, None].expand_as(mean)


class FlowChain(_Chain):
    """A `Denoiser` by the stochastic moves of `models/flow.py`. All of them are noisy, and well-conditioned."""

    def __init__(self, head: NOVAHead, config: FlowConfig, steps: int) -> None:
        self.levels = flow_levels(steps, config.shift)
        super().__init__(head, LEVELS * self.levels[:-1].float())
        at = self.levels.tolist()
        factors = torch.tensor([flow_factors(now, following, at[1]) for now, following in pairwise(at)])
        self.of_x, self.of_velocity, std = factors.to(self.time.device)[..., None].unbind(1)
        self.log_std = std.log()
        self.noisy: Bool[Tensor, " N"] = torch.ones(steps, dtype=torch.bool)
        self.admissible: Bool[Tensor, " N"] = self.noisy.clone()

    def law(
        self,
        x: Float[Tensor, "R d"],
        move: Int[Tensor, " R"],
        read: Float[Tensor, "R W"],
        unguided: Float[Tensor, "R W"] | None,
        guidance: Float[Tensor, "R 1"] | None,
    ) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]]:
        mean = self.of_x[move] * x.float() + self.of_velocity[move] * self.says(x, move, read, unguided, guidance)
        return mean, self.log_std[move].expand_as(mean)


# ---- the model ------------------------------------------------------------------------------------------------------------------------


class NOVA(nn.Module):
    prefix_places: Tensor
    places: Tensor

    def __init__(self, config: NOVAConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.grid[0] * config.grid[1]
        """L, of a picture."""
        self.channels = config.tokenizer.token_width
        """d, of a token."""
        width, channels, patch = config.encoder.width, config.tokenizer.channels, config.tokenizer.fold
        self.video_encoder, self.image_encoder = ViT(config.prefix, channels, 2 * patch), ViT(config.encoder, channels, patch)
        self.image_decoder = NOVAHead(config.head, channels, patch, width)
        self.mask_embed, self.text_embed = MaskEmbed(width), TextEmbed(config.captions, NOVA_CAPTION, width)
        self.video_pos_embed = None if config.rotary else FrameEmbed(width)
        self.motion_embed = MotionEmbed(width) if config.motion else None
        for name, where in zip(("prefix_places", "places"), positions(config), strict=True):
            self.register_buffer(name, where, persistent=False)

    @classmethod
    def unfilled(cls, config: NOVAConfig) -> "NOVA":
        """A model on the CPU whose weights are still to be loaded: to draw initial ones takes minutes at the largest size."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to_empty(device="cpu")
        model.prefix_places, model.places = positions(config)
        return model

    @property
    def head(self) -> NOVAHead:
        return self.image_decoder

    @property
    def blocks(self) -> list[Block]:
        """What is split over processes, one by one."""
        return [*self.video_encoder.blocks, *self.image_encoder.blocks]

    def schedule(self, steps: int) -> tuple[int, ...]:
        """How many tokens each step settles; steps that would settle none are left out. Raises ConfigError for more steps than tokens."""
        return settled_counts(self.tokens, steps, "round")

    def denoiser(self, steps: int) -> NoiseChain | FlowChain:
        """The head as a chain of `steps` moves."""
        return self.head.chain(steps)

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    def condition(self, captions: Sequence[Float[Tensor, "_ C"]]) -> Float[Tensor, "B p D"]:
        """The prefixes of captions, each as its features, of which the empty caption has none. They do not depend on the picture."""
        text = self.text_embed(self.text_embed.filled(captions))
        if self.motion_embed is not None:
            text = torch.cat([text, self.motion_embed().to(text.dtype).expand(len(text), -1, -1)], 1)
        return self.prefix(text)

    def prefix(self, text: Float[Tensor, "B N D"]) -> Float[Tensor, "B p D"]:
        x = torch.cat([text, self.opening().to(text.dtype).expand(len(text), -1, -1)], 1)
        turns = after(text.shape[1], self.prefix_places) if self.config.rotary else None
        for block in self.video_encoder.blocks:
            x = block(x, turns)
        return self.video_encoder.norm(x[:, text.shape[1] :])

    def opening(self) -> Float[Tensor, "p D"]:
        """What the prefix's places hold at first."""
        bos = self.mask_embed.bos_token.expand(len(self.prefix_places), -1)
        return bos if self.video_pos_embed is None else bos + self.video_pos_embed() + self.prefix_places

    # -- one set of tokens -------------------------------------------------------------------------------------------------------------

    def forward(
        self, condition: Float[Tensor, "B p D"], tokens: Float[Tensor, "B L d"], known: Int[Tensor, "B n"]
    ) -> Float[Tensor, "B L D"]:
        """z of every place, having seen the tokens at the places `known`; the others are not read."""
        rotary, encoder, before = self.config.rotary, self.image_encoder, condition.shape[1]
        half, some, every = len(encoder.blocks) // 2, None, None
        read = encoder.patch_embed(tokens.gather(1, known[..., None].expand(-1, -1, tokens.shape[2])))
        places = self.mask_embed.mask_token.to(read.dtype).expand(self.tokens, -1)
        if rotary:
            some, every = after(before, self.places[known])[:, None], after(before, self.places)
        else:
            read, places = read + self.places[known], places + self.places
        x = torch.cat([condition.to(read.dtype), read], 1)
        for block in encoder.blocks[:half]:
            x = block(x, some)
        places = places.to(x.dtype).expand(len(x), -1, -1).scatter(1, known[..., None].expand(-1, -1, x.shape[2]), x[:, before:])
        x = torch.cat([x[:, :before], places], 1)
        for block in encoder.blocks[half:]:
            x = block(x, every)
        return encoder.norm(x[:, before:])
