"""A next-scale transformer from scratch: cross-entropy of every token given all coarser scales (VAR). Its tokenizer's codes stand for the
residuals of every scale."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from varl.models.next_scale import NextScale
from varl.policies.next_scale import model_ids
from varl.pretrain.codebook import drawn_from
from varl.pretrain.family import Fit, fit_of
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.types import Prompt


class NextScaleFamily:
    """A `CodebookFamily`. Rows are classes, or characters."""

    def __init__(self, model: NextScale, tokenizer: MultiScaleVQ) -> None:
        self.model, self.tokenizer = model, tokenizer

    # -- tokenizer

    @property
    def codebook(self) -> nn.Embedding:
        return self.tokenizer.quantize.embedding

    def convolutions(self) -> nn.Module:
        parts = nn.ModuleDict({name: part for name, part in self.tokenizer.named_children() if name != "quantize"})
        parts["phi"] = self.tokenizer.quantize.quant_resi
        return parts

    def autoencode(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""]]:
        f = self.tokenizer.features(images)
        return self.tokenizer.render(f), 1e-3 * f.square().mean()

    def start_codebook(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> None:
        """Codes drawn from the residuals at every scale, scale by scale, half of them from the finest."""
        vq, codes, f = self.tokenizer, self.codebook.weight.data, self.tokenizer.features(images)
        vocab, scales, f_hat, start = len(codes), len(vq.grids), torch.zeros_like(f), 0
        share = [vocab // (2 * (scales - 1))] * (scales - 1) if scales > 1 else []
        share.append(vocab - sum(share))
        codes.fill_(1e4)  # not yet placed: never nearest
        for scale, (grid, count) in enumerate(zip(vq.grids, share, strict=True)):
            asked = F.interpolate(f - f_hat, size=grid, mode="area").flatten(2).transpose(1, 2).flatten(0, 1)
            codes[start : start + count] = drawn_from(asked, count, rng)
            start += count
            ids = vq.quantize.nearest(asked).view(len(f), -1)
            f_hat = f_hat + vq.quantize.contribution(vq.quantize.embedding(ids), scale)

    def uses(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, " n"]:
        """Scale by scale."""
        return torch.cat([part.flatten() for part in self.tokenizer.split(ids)])

    # -- transformer

    def keep(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        return self.tokenizer.encode(images)

    def read(self, prompts: Sequence[Prompt]) -> Int[Tensor, "N ..."]:
        return model_ids(prompts, self.model.config)

    def nothing(self, said: Int[Tensor, "b ..."]) -> Int[Tensor, "..."]:
        empty = model_ids([Prompt()], self.model.config)[0]
        return empty if said.ndim == 1 else F.pad(empty, (0, said.shape[1] - len(empty)))

    def fit(self, said: Int[Tensor, "b ..."], kept: Int[Tensor, "b L"]) -> Fit:
        with torch.no_grad():
            inputs = self.tokenizer.inputs(kept)
        condition = self.model.condition(said)
        return fit_of(self.model.logits(self.model(condition, inputs), condition), kept)

    def parts(self, losses: Float[Tensor, "N L"]) -> dict[str, float]:
        """By scale."""
        return {f"scale{s}": float(part.mean()) for s, part in enumerate(self.tokenizer.split(losses))}
