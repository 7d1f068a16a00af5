"""MAR's transformer (arXiv 2406.11838): of a class and some of a picture's tokens, a vector z for every place, from which the diffusion
head draws those that are missing. Tokens are vectors, drawn a set at a time in any order.

    encoder    buffer (the class, 64 times) + known tokens
    decoder    buffer + all places, a mask in those that are not known

Module and parameter names are those of the released checkpoints. The grid need not be square."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from varl.config import MARConfig, ViTConfig, settled_counts
from varl.models.diffusion_head import Ancestral, DiffusionHead

NORM_EPS = 1e-6
MLP_RATIO = 4

# ---- which tokens are known -----------------------------------------------------------------------------------------------------------


def masked(order: Int[Tensor, "B L"], count: int) -> Bool[Tensor, "B L"]:
    """Where a token is missing while `count` of each picture are: the first in its order, which is drawn from its end."""
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)


def known(missing: Bool[Tensor, "B L"], count: int) -> Int[Tensor, "B n"]:
    """The places of the other tokens, ascending, `count` in each picture. On the CPU raises ValueError where there are more or fewer; a GPU
    would have to be waited for."""
    if missing.device.type == "cpu" and (wrong := [there for there in (~missing).sum(1).tolist() if there != count]):
        raise ValueError(f"known: a picture of the batch knows {wrong[0]} tokens, not {count}. Take those together that know as many.")
    return missing.int().argsort(dim=1, stable=True)[:, :count]


# ---- layers ---------------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Of each token to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B l D"]) -> Float[Tensor, "B l D"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=NORM_EPS) for _ in range(2))
        self.attn, self.mlp = Attention(config.width, config.heads), MLP(config.width)

    def forward(self, x: Float[Tensor, "B l D"]) -> Float[Tensor, "B l D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# ---- the model ------------------------------------------------------------------------------------------------------------------------


class MAR(nn.Module):
    def __init__(self, config: MARConfig, grid: tuple[int, int] | None = None) -> None:
        """`grid` (h, w) of the pictures, where it is not the config's, for which the tables of positions are made: they are resized."""
        super().__init__()
        self.config = config
        self.grid = grid or config.grid
        self.tokens = self.grid[0] * self.grid[1]
        """L, of a picture."""
        self.channels = config.tokenizer.channels
        """d, of a token."""
        learned = config.grid[0] * config.grid[1]
        width, after, places = config.encoder.width, config.decoder.width, config.buffer + learned
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(self.channels, width), nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, width))
        self.encoder_blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config.encoder) for _ in range(config.encoder.depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(width, after)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, after))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, after))
        self.decoder_blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config.decoder) for _ in range(config.decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(after, eps=NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, learned, after))
        for module in self.modules():  # as released
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ):
            nn.init.normal_(weight, std=0.02)
        self.diffloss = nn.ModuleDict({"net": DiffusionHead(config.head, self.channels, after)})

    @classmethod
    def unfilled(cls, config: MARConfig) -> "MAR":
        """A model on the CPU whose weights are still to be loaded: to draw initial ones takes minutes at the largest size."""
        with torch.device("meta"):
            model = cls(config)
        return model.to_empty(device="cpu")

    @property
    def head(self) -> DiffusionHead:
        return cast(DiffusionHead, self.diffloss["net"])

    @property
    def blocks(self) -> list[Block]:
        """What is split over processes, one by one."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    # -- how it is drawn ---------------------------------------------------------------------------------------------------------------

    def schedule(self, steps: int) -> tuple[int, ...]:
        """How many tokens each step settles. Raises ConfigError unless there are 1 to L."""
        return settled_counts(self.tokens, steps)

    def denoiser(self, steps: int) -> Ancestral:
        """The head as a chain of `steps` moves."""
        return self.head.chain(steps)

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    def condition(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Of classes; num_classes is "none"."""
        none = labels == self.config.num_classes
        return torch.where(none[:, None], self.fake_latent, self.class_emb(labels.masked_fill(none, 0)))

    # -- one set of tokens -------------------------------------------------------------------------------------------------------------

    def forward(self, condition: Float[Tensor, "B D"], tokens: Float[Tensor, "B L C"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B L E"]:
        """z of every place, having seen the tokens at the places `known`; the others are not read."""
        return self.decode(self.encode(condition, tokens, known), known)

    def encode(self, condition: Float[Tensor, "B D"], tokens: Float[Tensor, "B L C"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B m D"]:
        """The buffer, and then the known tokens in the order in which they are given."""
        batch, buffer = len(tokens), self.config.buffer
        read = self.z_proj(tokens.gather(1, known[..., None].expand(-1, -1, tokens.shape[2])))
        x = torch.cat([condition[:, None].expand(-1, buffer, -1).to(read.dtype), read], 1)
        position = self.positions(self.encoder_pos_embed_learned)[0]
        x = self.z_proj_ln(x + torch.cat([position[:buffer].expand(batch, -1, -1), position[buffer:][known]], 1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Float[Tensor, "B m D"], known: Int[Tensor, "B n"]) -> Float[Tensor, "B L E"]:
        x, buffer = self.decoder_embed(encoded), self.config.buffer
        places = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1)
        places = places.scatter(1, known[..., None].expand(-1, -1, x.shape[2]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], places], 1) + self.positions(self.decoder_pos_embed_learned)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.positions(self.diffusion_pos_embed_learned)

    def positions(self, table: Float[Tensor, "1 m D"]) -> Float[Tensor, "1 n D"]:
        """A table of the buffer's places, if it has those, and the picture's, as it is for `grid`: the picture's resized bilinearly."""
        if self.grid == self.config.grid:
            return table
        learned = self.config.grid[0] * self.config.grid[1]
        buffer, places = table.split([table.shape[1] - learned, learned], 1)
        maps = places.transpose(1, 2).unflatten(2, self.config.grid)
        return torch.cat([buffer, F.interpolate(maps, self.grid, mode="bilinear").flatten(2).transpose(1, 2)], 1)
