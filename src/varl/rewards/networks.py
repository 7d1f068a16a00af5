"""Networks that look at pictures for a reward, by the names that settings give them."""

from pathlib import Path
from typing import cast

from varl.checkpoints.folder import strict_load
from varl.checkpoints.model import classifier_path, load_classifier
from varl.checkpoints.released import read_weights
from varl.config import ReconstructionConfig
from varl.models.classifier import FeatureMaps
from varl.rewards.perceptual import VGG16, Distance, Features, Heads, feature_distance
from varl.rewards.toy import load_callable


def open_network(config: ReconstructionConfig) -> tuple[Features | None, Distance]:
    """What looks at pictures, and how far apart it finds them: LPIPS from released files, `features`, or nothing."""
    if config.vgg is not None and config.heads is not None:
        vgg, heads = VGG16().eval(), Heads()
        weights = read_weights(Path(config.vgg)).items()
        strict_load(vgg, {name: tensor for name, tensor in weights if not name.startswith("classifier.")}, config.vgg)
        strict_load(heads, read_weights(Path(config.heads)), config.heads)
        return vgg.requires_grad_(False), heads.requires_grad_(False)
    return None if config.features is None else open_features(config.features), feature_distance


def open_features(name: str) -> Features:
    """The feature maps of the classifier in the folder `name` or in `bundled:NAME`, or the callable at `module:function`."""
    if name.startswith("bundled:") or Path(name).is_dir():
        return FeatureMaps(load_classifier(classifier_path(name, "reconstruction.features"))).eval()
    return cast(Features, load_callable(name))
