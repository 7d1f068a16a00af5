import math

import pytest
import torch
import torch.nn.functional as F

from varl.build import build_reward
from varl.checkpoints import model as model_folder
from varl.config import ClassifierConfig, ReconstructionConfig
from varl.errors import CheckpointError, ConfigError
from varl.eval import features
from varl.models.classifier import Classifier, FeatureMaps
from varl.rewards.networks import open_features
from varl.rewards.perceptual import feature_distance
from varl.settings import classifier_from_yaml, model_from_yaml, model_to_yaml
from varl.types import Prompt

CONFIG = ClassifierConfig(num_classes=5, image_size=(10, 13), widths=(6, 8, 7))
IMAGES = torch.rand(4, 3, 10, 13, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    return model_folder.save_classifier(tmp_path_factory.mktemp("classifier") / "model", classifier, {"seed": 0})


def test_each_layer_after_the_first_halves_the_picture(classifier):
    assert [tuple(layer.shape) for layer in classifier.maps(IMAGES)] == [(4, 6, 10, 13), (4, 8, 5, 7), (4, 7, 3, 4)]
    assert classifier(IMAGES).shape == (4, 7)


def test_a_layer_by_hand(classifier):
    """The second: 8 channels are normalised in 4 groups."""
    first, second, _ = classifier.maps(IMAGES)
    layer = classifier.layers[1]
    x = F.conv2d(first, layer.conv.weight, layer.conv.bias, stride=2, padding=1)
    grouped = x.view(4, 4, -1)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(second, normed.view_as(x).relu(), rtol=1e-4, atol=1e-5)


def test_it_is_a_classifier_of_the_evaluation(classifier):
    assert isinstance(classifier, features.Classifier)
    logp = classifier.classify(classifier(IMAGES))
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(4))
    found = features.extract(features.open_pictures((IMAGES * 255).to(torch.uint8)), classifier, batch=3)
    torch.testing.assert_close(found, classifier((IMAGES * 255).to(torch.uint8).float() / 255), rtol=1e-4, atol=1e-5)


def test_no_picture_depends_on_those_beside_it(classifier):
    alone = torch.cat([classifier(image[None]) for image in IMAGES])
    torch.testing.assert_close(classifier(IMAGES), alone, rtol=1e-4, atol=1e-6)


def test_a_fresh_one_is_undecided(classifier):
    entropy = -(logp := classifier.classify(classifier(IMAGES))).exp().mul(logp).sum(1)
    assert bool((entropy > 0.8 * math.log(5)).all())


def test_a_folder_gives_it_back_frozen(classifier, folder):
    again = model_folder.load_classifier(folder)
    assert again.config == CONFIG
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(IMAGES), classifier(IMAGES))


def test_a_folder_of_another_kind_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="kind='classifier': names what a picture shows, and draws nothing"):
        model_folder.load(folder)
    with pytest.raises(ConfigError, match="kind='next_scale': draws pictures, and names none"):
        model_folder.load_classifier(model_folder.model_path("bundled:words"))
    (folder / "config.yaml").rename(tmp_path / "kept")
    (folder / "config.yaml").write_text(model_to_yaml(ClassifierConfig(num_classes=6, image_size=(10, 13), widths=(6, 8, 7))))
    try:
        with pytest.raises(CheckpointError, match="do not fit Classifier"):
            model_folder.load_classifier(folder)
    finally:
        (tmp_path / "kept").rename(folder / "config.yaml")


def test_its_config_is_the_yaml_it_writes():
    assert classifier_from_yaml(model_to_yaml(CONFIG)) == CONFIG
    with pytest.raises(ConfigError, match="draws nothing"):
        model_from_yaml(model_to_yaml(CONFIG))


# ---- as what a reward looks with


def test_features_by_folder_are_its_maps(classifier, folder):
    look = open_features(str(folder))
    assert isinstance(look, FeatureMaps)
    for have, want in zip(look(IMAGES), classifier.maps(IMAGES), strict=True):
        assert torch.equal(have, want)


def test_features_by_name_are_the_callable():
    assert open_features("varl.rewards.perceptual:normalise_channels")(IMAGES).shape == IMAGES.shape


def test_a_reward_looks_with_it(classifier, folder):
    reward = build_reward(ReconstructionConfig(features=str(folder), lpips_weight=2.0), lambda prompts: IMAGES[: len(prompts)])
    prompts = [Prompt(image="a")]
    told = reward(IMAGES[1:2], prompts)
    want = feature_distance(classifier.maps(IMAGES[1:2]), classifier.maps(IMAGES[:1]))
    torch.testing.assert_close(told.parts["perceptual"], want.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(told.value, -(told.parts["mse"] + 2 * told.parts["perceptual"]))
