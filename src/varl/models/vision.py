"""CLIP (arXiv 2103.00020) and DINOv2 (arXiv 2304.07193) as `transformers` has them, looking at pictures that stay on their device."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""By which CLIP's pictures were normalised, and those of networks that began as one."""
TEXTS_KEPT = 16384
"""Captions whose features are kept, the latest: 64 MiB of a CLIP-H."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a network wants its pictures."""

    side: int
    """Pixels to which the shorter side is scaled; the longer one where `whole`."""
    crop: tuple[int, int]
    """(H, W) of the middle that is cut out."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    whole: bool = False
    """Nothing is cut off: the picture lies in the middle of `crop`, on black."""
    rounded: bool = False
    """Where the middle begins is rounded as torchvision does: of 3 pixels too many, 2 are cut off before it. Else 1 is."""


def preprocess(images: Float[Tensor, "B 3 H W"], wanted: Preprocessing) -> Float[Tensor, "B 3 h w"]:
    """Pictures in [0, 1], scaled (bicubic, antialiased, first across and then down, kept in [0, 1]), their middle cut out, and normalised
    by channel. As CLIPImageProcessor does with bytes, but that it rounds to bytes after each direction: its pixels differ by less than
    1.5/255."""
    shape = images.shape[2:]
    if wanted.whole:
        size = [round(wanted.side * pixels / max(shape)) for pixels in shape]
    else:
        size = [wanted.side * pixels // min(shape) for pixels in shape]
    edges: list[int] = []
    for have, want in zip(size, wanted.crop, strict=True):
        before = round((want - have) / 2) if wanted.rounded else int((want - have) / 2)
        edges = [before, want - have - before, *edges]
    return normalise(F.pad(resized(images, (size[0], size[1])), edges), wanted.mean, wanted.std)


def normalise(images: Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "B 3 H W"]:
    """(pixel - mean) / std, by channel."""
    by_mean, by_std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - by_mean) / by_std


def resized(images: Float[Tensor, "B 3 H W"], size: tuple[int, int], mode: str = "bicubic") -> Float[Tensor, "B 3 h w"]:
    """Pictures in [0, 1] at another size: antialiased, first across and then down, kept in [0, 1] after each."""
    images = images.float()
    for to in ((images.shape[2], size[1]), size):
        if to != tuple(images.shape[2:]):
            images = F.interpolate(images, to, mode=mode, antialias=True).clamp(0, 1)
    return images


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How a network wants its pictures, if it wants them whole."""

    size: tuple[int, int]
    """(H, W), whatever their shape; where `keep`, pixels to which the shorter side is scaled, and the most that the longer one may have."""
    keep: bool
    """Whether they keep their shape."""
    multiple: int = 1
    """Both sides are rounded up to multiples of this, where they keep their shape."""
    bicubic: bool = False
    """Else bilinear."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that a picture of `size` has afterwards."""
        if not self.keep:
            return self.size
        shorter, longer = min(size), max(size)
        side = min(float(self.size[0]), self.size[1] * shorter / longer)
        scaled = round(side), int(side * longer / shorter)
        height, width = scaled if size[0] <= size[1] else scaled[::-1]
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple


def scale(images: Float[Tensor, "B 3 H W"], wanted: Scaling) -> Float[Tensor, "B 3 h w"]:
    """Pictures in [0, 1], scaled (as `resized` does) and normalised by channel. The image processors of `transformers` do so with bytes,
    and round after each direction: their pixels differ by less than 1.5/255."""
    size = wanted.of((images.shape[2], images.shape[3]))
    return normalise(resized(images, size, "bicubic" if wanted.bicubic else "bilinear"), wanted.mean, wanted.std)


class CLIP(nn.Module):
    """`transformers`' CLIPModel with its tokenizer and what it wants of pictures; frozen, in fp32."""

    def __init__(self, model: Any, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.projection_dim

    @property
    def logit_scale(self) -> float:
        """By what its training multiplied cosines."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Unit feature vectors of pictures in [0, 1]."""
        return self.encode_prepared(self.prepare(images))

    def prepare(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures in [0, 1] as the network wants them."""
        return preprocess(images, self.preprocessing)

    @torch.no_grad()
    def encode_prepared(self, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        """Unit feature vectors of what `prepare` made."""
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Unit feature vectors of captions; what is beyond the model's 77 tokens is cut off. Each caption is encoded once, and alone, so
        that its features do not depend on its neighbours."""
        found = []
        for text in texts:
            if text not in self._texts:
                self._texts[text] = self._encode(text)
                if len(self._texts) > TEXTS_KEPT:
                    self._texts.popitem(last=False)
            self._texts.move_to_end(text)
            found.append(self._texts[text])
        return torch.stack(found).to(self.model.device)

    def _encode(self, text: str) -> Float[Tensor, " D"]:
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=most, return_tensors="pt").to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(features[0], dim=0)


class AestheticHead(nn.Module):
    """The linear layers of LAION's aesthetic predictor, version 2, and of ImageReward, with the names of their released files. What lay
    between them while they were trained was dropout alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        places = (0, 2, 4, 6, 7)
        self.layers = nn.ModuleDict({str(place): nn.Linear(a, b) for place, a, b in zip(places, sizes, sizes[1:], strict=False)})

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """One number for each row; of unit CLIP features how much people would like the pictures, about 1 to 10."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]


class DINO(nn.Module):
    """`transformers`' Dinov2Model with what it wants of pictures; frozen, in fp32."""

    def __init__(self, model: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing = model.eval().requires_grad_(False), preprocessing

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Unit vectors of the class token's features after the last layer norm, of pictures in [0, 1]."""
        found = self.model(pixel_values=preprocess(images, self.preprocessing))
        return F.normalize(found.last_hidden_state[:, 0], dim=1)
