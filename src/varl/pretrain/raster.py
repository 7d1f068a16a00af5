"""A raster transformer from scratch: cross-entropy of every token given all before it (LlamaGen). Its tokenizer's codes stand for
directions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from varl.errors import ConfigError
from varl.models.raster import CaptionEmbedding, Raster
from varl.policies.acting import CaptionEncoder, class_ids
from varl.policies.raster import pad_left, read_captions
from varl.pretrain.codebook import drawn_from
from varl.pretrain.family import Fit, fit_of
from varl.tokenizers.vq import VQ
from varl.types import Prompt


class RasterFamily:
    """A `CodebookFamily`. Rows are classes; or captions, as places among the different ones that were read."""

    def __init__(self, model: Raster, tokenizer: VQ, captions: CaptionEncoder | None = None) -> None:
        if model.config.captions is not None and captions is None:
            raise ConfigError("this model reads captions, and there is no encoder for them. Give `captions`, from texts to features.")
        self.model, self.tokenizer, self.captions = model, tokenizer, captions
        self.features: list[Float[Tensor, "_ C"]] = []
        """Of the captions that were read; the first are those of the empty one."""

    # -- tokenizer

    @property
    def codebook(self) -> nn.Embedding:
        return self.tokenizer.quantize.embedding

    def convolutions(self) -> nn.Module:
        return nn.ModuleDict({name: part for name, part in self.tokenizer.named_children() if name != "quantize"})

    def autoencode(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, ""]]:
        """The decoder sees unit vectors, which need nothing to keep them."""
        z = F.normalize(self.tokenizer.features(images), dim=1)
        return self.tokenizer.render(z), z.new_zeros(())

    def start_codebook(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> None:
        asked = F.normalize(self.tokenizer.features(images), dim=1).flatten(2).transpose(1, 2).flatten(0, 1)
        codes = self.codebook.weight.data
        codes.copy_(drawn_from(asked, len(codes), rng))

    def uses(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, " n"]:
        return ids.flatten()

    # -- transformer

    def keep(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        return self.tokenizer.encode(images)

    def read(self, prompts: Sequence[Prompt]) -> Int[Tensor, " N"]:
        embedding = self.model.cls_embedding
        if not isinstance(embedding, CaptionEmbedding):
            assert self.model.config.num_classes is not None
            return class_ids(prompts, self.model.config.num_classes)
        assert self.captions is not None
        nothing = embedding.uncond_embedding
        features, keys, _ = read_captions(prompts, self.model, self.captions)
        self.features = self.features or [nothing]
        places: dict[str | int, int] = {len(nothing): 0}
        for key in dict.fromkeys(keys):
            if key not in places:
                places[key] = len(self.features)
                self.features.append(features[key])
        return torch.tensor([places[key] for key in keys])

    def nothing(self, said: Int[Tensor, " b"]) -> Int[Tensor, ""]:
        return torch.tensor(self.model.config.num_classes or 0)

    def logits(self, said: Int[Tensor, " b"], ids: Int[Tensor, "b L"]) -> Float[Tensor, "b L V"]:
        """Of all tokens, each given those before it."""
        condition = (
            self.model.condition(*pad_left([self.features[row] for row in said.tolist()]))
            if self.model.config.captions is not None
            else self.model.condition(said)
        )
        return self.model.logits(self.model(condition, ids))

    def fit(self, said: Int[Tensor, " b"], kept: Int[Tensor, "b L"]) -> Fit:
        return fit_of(self.logits(said, kept), kept)

    def parts(self, losses: Float[Tensor, "N L"]) -> dict[str, float]:
        return {}
