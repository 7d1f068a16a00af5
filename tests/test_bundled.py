"""The bundled models are what their recipes make."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varl.build import model_path
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_config, load_notes
from varl.config import ClassifierConfig, PretrainConfig
from varl.data import glyphs
from varl.data.glyphs import SPLITS, faces_of
from varl.models.mar import MAR
from varl.models.raster import Raster
from varl.pretrain.classifier import labels_of
from varl.pretrain.data import pictures
from varl.pretrain.masked import MaskedPhase
from varl.pretrain.next_scale import NextScaleFamily
from varl.pretrain.raster import RasterFamily
from varl.pretrain.run import pretrain
from varl.pretrain.transformer import known
from varl.recipes.pretrain import GLYPHS, glyphs_cpu, glyphs_judge, glyphs_mar_cpu, glyphs_reward, words_cpu
from varl.settings import classifier_from_yaml, model_from_yaml

RECIPES = {
    "words": words_cpu(),
    "glyphs": glyphs_cpu(),
    "glyphs_mar": glyphs_mar_cpu(),
    "glyphs_reward": glyphs_reward(),
    "glyphs_judge": glyphs_judge(),
}
HELDOUT_LOSS = {"words": 1.5201, "glyphs": 2.1553, "glyphs_mar": 0.63657, "glyphs_reward": 0.0017231, "glyphs_judge": 0.12006}
"""Of the bundled weights, on the recipe's first 64 held-out pictures: nats per token, or per picture of a classifier; of a MAR the head's
squared error."""


@torch.no_grad()
def heldout_loss(config: PretrainConfig, folder) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.pretrain.data.HELDOUT_PICTURES", 64)
        shown = pictures(replace(config, pictures=1))
    images, prompts = shown.held_images, shown.held_prompts
    if isinstance(config.model, ClassifierConfig):
        classifier = model_folder.load_classifier(folder)
        logp = classifier.classify(classifier(images.float() / 255))
        return float(F.nll_loss(logp, labels_of(prompts, classifier.config.num_classes)))
    model, tokenizer = model_folder.load(folder)
    if isinstance(model, MAR):
        phase = MaskedPhase(config, model, tokenizer, shown, torch.device("cpu"))
        phase.begin()
        return phase.heldout_loss()
    family = RasterFamily(model, tokenizer) if isinstance(model, Raster) else NextScaleFamily(model, tokenizer)
    ids, said = known(family, images, family.read(prompts), torch.device("cpu"))
    return float(family.fit(said, ids)[0].mean())


def config_of(folder):
    text = load_config(folder)
    return classifier_from_yaml(text) if "kind: classifier" in text else model_from_yaml(text)


@pytest.mark.parametrize("name", RECIPES)
def test_its_config_and_steps_are_the_recipes(name):
    recipe, notes = RECIPES[name], load_notes(model_path(f"bundled:{name}"))
    assert config_of(model_path(f"bundled:{name}")) == recipe.model
    assert (notes["recipe"], notes["seed"], notes["step"]) == (recipe.name, recipe.seed, recipe.total_steps)


@pytest.mark.parametrize("name", RECIPES)
def test_its_heldout_loss(name):
    assert heldout_loss(RECIPES[name], model_path(f"bundled:{name}")) == pytest.approx(HELDOUT_LOSS[name], rel=1e-3)


def test_letters_are_judged_by_other_hands_than_those_that_train_and_reward():
    families = {split: {face.family for face in faces_of(GLYPHS, split)} for split in SPLITS}
    assert all(families.values())
    assert sum(map(len, families.values())) == len(set().union(*families.values()))
    splits = {name: recipe.data.split for name, recipe in RECIPES.items() if name != "words"}
    assert splits == {"glyphs": "train", "glyphs_mar": "train", "glyphs_reward": "reward", "glyphs_judge": "judge"}
    assert len({recipe.seed for name, recipe in RECIPES.items() if name != "words"}) == 3


def test_the_classifiers_know_letters_of_hands_that_they_have_not_seen():
    """Of 1008 held-out pictures they name more than 97 in 100 right."""
    held = glyphs.pictures(GLYPHS, "heldout", 1008, 7)
    images, labels = held.images(held.prompts), labels_of(held.prompts, len(GLYPHS.letters))
    for name in ("glyphs_reward", "glyphs_judge"):
        classifier = model_folder.load_classifier(model_path(f"bundled:{name}"))
        assert (classifier.classify(classifier(images)).argmax(1) == labels).float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_makes_it(name, tmp_path):
    """Minutes on one core. On another processor sums round otherwise, so weights are not compared, but what they can do is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = heldout_loss(RECIPES[name], pretrain(RECIPES[name], tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert made == pytest.approx(HELDOUT_LOSS[name], rel=0.05)
