"""The benchmark of estimators runs from first to last, on a model and a reward that take no time."""

import sys
from pathlib import Path

import pytest
import torch

from tabular import InstantJudge
from tiny import TINY
from varl.checkpoints.model import fresh
from varl.policies.next_scale import NextScalePolicy
from varl.rewards.toy import brightness
from varl.types import Prompt


@pytest.fixture
def estimators(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import estimators

    yield estimators
    for name in ("estimators", "common"):
        sys.modules.pop(name, None)


def test_every_table_has_its_rows(estimators):
    torch.manual_seed(0)
    bench = estimators.Bench(NextScalePolicy(*fresh(TINY)), InstantJudge(brightness), [Prompt(text="CAT"), Prompt(text="DOG")])
    while not bench.enough:
        bench.round()
    tables = {**estimators.plain_tables(bench), **estimators.tree_tables(bench), **estimators.mask_table(bench)}
    rows = [text.splitlines()[2:] for text in tables.values()]
    plain, scales, pairs, seconds, settled, continuations, masks = (len([r for r in t if r.startswith("|")]) for t in rows)
    assert (scales, pairs, seconds, settled, masks) == (3, 3, 1, 2, 6)
    assert plain == len(estimators.PLAIN) + len(estimators.ALPHAS) - 1 + 2 + 1
    assert continuations == 2 * (len(estimators.VMR) + 1)
