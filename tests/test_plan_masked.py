"""What NOVA and Harmon cost, counted without memory, against a pass that is counted at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varl.config import NOVAConfig, UnmaskingConfig, ViTConfig
from varl.models.nova import NOVA
from varl.plan.families import CAPTION, MaskedFamily, as_family, decoder_cost, family_of
from varl.tokenizers.kl import KL

UNMASKING = UnmaskingConfig(steps=4, denoise_steps=8)
SHALLOW = ViTConfig(depth=2, width=1024, heads=16)
NOVA_512 = replace(NOVAConfig(), prefix=SHALLOW, encoder=SHALLOW)
"""The released one, but for its depth."""


def harmon(folder: Path) -> MaskedFamily:
    pytest.importorskip("transformers")
    from tiny_harmon import save_harmon
    from varl.checkpoints.harmon import without_memory

    family = as_family(without_memory(save_harmon(folder / "harmon")), UNMASKING)
    assert isinstance(family, MaskedFamily)
    return family


def nova(folder: Path) -> MaskedFamily:
    family = family_of(NOVA_512, UNMASKING)
    assert isinstance(family, MaskedFamily)
    assert isinstance(family.model, NOVA)
    return family


@pytest.mark.parametrize("make", [nova, harmon])
def test_a_pass_after_some_tokens_costs_what_a_pass_counts(make, tmp_path):
    """The polynomial through 0, 1 and 2 known tokens holds at 5."""
    family = make(tmp_path)
    with torch.device("meta"):
        condition, tokens = family.model.condition(family.asked), torch.empty(1, family.model.tokens, family.model.channels)
        with FlopCounterMode(display=False) as counter:
            family.model(condition, tokens, torch.zeros(1, 5, dtype=torch.long))
    assert family.seeing(5).flops == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert family.layout.steps == len(family.counts) == 4
    assert family.asked[0].shape[0] == CAPTION


def test_novas_autoencoder_works_on_twice_the_tokens_grid(tmp_path):
    """Four latents a token: 64 x 64 of them for 32 x 32 tokens."""
    family = nova(tmp_path)
    with torch.device("meta"):
        kl = KL(NOVAConfig().tokenizer)
        with FlopCounterMode(display=False) as counter:
            kl.decode(torch.empty(1, 4, 64, 64))
    assert family.layout.grids == ((32, 32),)
    assert decoder_cost(family).flops == counter.get_total_flops()
