"""The bundled base model is what its recipe makes."""

import pytest
import torch

from varl.build import model_path
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_notes
from varl.data.words import dataset, split, word_list
from varl.pretrain.next_scale import token_loss
from varl.pretrain.run import model_ids, pretrain, signed
from varl.recipes.pretrain import words_cpu

RECIPE = words_cpu()
HELDOUT_LOSS = 1.5201
"""Nats per token on the recipe's first 64 held-out pictures, of the bundled weights."""


def heldout_loss(folder):
    model, tokenizer = model_folder.load(folder)
    words = split(word_list(RECIPE.data), RECIPE.data)
    images, prompts = dataset(RECIPE.data, words.heldout, 64, RECIPE.data.seed + 9)
    with torch.no_grad():
        ids = tokenizer.encode(signed(images, torch.device("cpu")))
        return float(token_loss(model, model_ids(prompts, model.config), tokenizer.inputs(ids), ids).mean())


def test_its_config_and_steps_are_the_recipes():
    model, _ = model_folder.load(model_path("bundled:words"))
    notes = load_notes(model_path("bundled:words"))
    assert model.config == RECIPE.model
    assert (notes["recipe"], notes["seed"], notes["step"]) == (RECIPE.name, RECIPE.seed, RECIPE.tokenizer_steps + RECIPE.steps)


def test_its_heldout_loss():
    assert heldout_loss(model_path("bundled:words")) == pytest.approx(HELDOUT_LOSS, rel=1e-3)


@pytest.mark.slow
def test_the_recipe_makes_it(tmp_path):
    """Four minutes on one core. On another processor sums round otherwise, so weights are not compared, but what they can do is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert heldout_loss(pretrain(RECIPE, tmp_path)) == pytest.approx(HELDOUT_LOSS, rel=0.05)
    finally:
        torch.set_num_threads(threads)
