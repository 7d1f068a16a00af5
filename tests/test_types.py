import pytest
import torch

from varl.types import BranchingPolicy, Judgement, Layout, Policy, Prompt, RedrawingPolicy, Region, Rollout, TeacherForcedPolicy, TrainBatch


def a_rollout(rows: int) -> Rollout:
    ids = torch.arange(rows * 5).view(rows, 5)
    return Rollout(
        prompts=tuple(Prompt(text=str(i)) for i in range(rows)),
        actions=ids,
        logp=-ids.float(),
        step=torch.tensor([0, 1, 1, 1, 1]).expand(rows, -1),
        sampled=ids % 2 == 0,
        index=torch.arange(rows) + 100,
        state=object(),
    )


def a_batch(rows: int) -> TrainBatch:
    ones = torch.ones(rows, 5)
    value = torch.arange(rows).float()
    judgement = Judgement(value=value, parts={"ocr": value + 10}, found=tuple(() for _ in range(rows)))
    return TrainBatch(
        rollout=a_rollout(rows),
        advantage=ones * value[:, None],
        weight=ones,
        kl_weight=ones,
        judgement=judgement,
        size=value,
        stage="prefix",
        metrics={"reward": 1.0},
        shown={"spread": ones * value[:, None]},
    )


def test_cells_by_hand():
    cells = Layout(grids=((1, 1), (1, 2), (2, 2)), steps=3).cells()
    assert cells.tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0.5, 1],
        [0.5, 0, 1, 1],
        [0, 0, 0.5, 0.5],
        [0.5, 0, 1, 0.5],
        [0, 0.5, 0.5, 1],
        [0.5, 0.5, 1, 1],
    ]


def test_every_grid_tiles_the_picture():
    layout = Layout(grids=((1, 3), (2, 5), (4, 16)), steps=3)
    cells = layout.cells()
    assert len(cells) == layout.tokens == 3 + 10 + 64
    area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    assert [part.sum().item() for part in area.split([3, 10, 64])] == pytest.approx([1, 1, 1], abs=1e-6)


def test_words_of_a_prompt_go_region_by_region():
    prompt = Prompt(regions=(Region(text="OPEN DAILY"), Region(text="CAFE")))
    assert prompt.words == ("OPEN", "DAILY", "CAFE")


def test_rows_select_all_that_belongs_to_a_row():
    rollout = a_rollout(4).rows([3, 1])
    assert [p.text for p in rollout.prompts] == ["3", "1"]
    assert rollout.actions.tolist() == [[15, 16, 17, 18, 19], [5, 6, 7, 8, 9]]
    assert rollout.index.tolist() == [103, 101]
    assert rollout.sample_logp is None
    assert rollout.state is None, "a state belongs to exactly the rows that it was made for"


def test_rows_may_repeat():
    assert a_rollout(2).rows([1, 1, 0]).index.tolist() == [101, 101, 100]


def test_pieces_of_a_batch_are_the_batch():
    batch = a_batch(5)
    pieces = batch.split(2)
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([piece.size for piece in pieces]), batch.size)
    assert torch.equal(torch.cat([piece.rollout.actions for piece in pieces]), batch.rollout.actions)
    assert torch.equal(torch.cat([piece.judgement.parts["ocr"] for piece in pieces]), batch.judgement.parts["ocr"])
    assert torch.equal(torch.cat([piece.shown["spread"] for piece in pieces]), batch.shown["spread"])
    assert all(piece.stage == "prefix" and piece.metrics == {"reward": 1.0} for piece in pieces)


def test_shapes_are_checked():
    """The way in which the tests run checks them; a wrong shape must not get past."""
    with pytest.raises(Exception, match="logp"):
        Rollout(
            prompts=(Prompt(),),
            actions=torch.zeros(1, 3),
            logp=torch.zeros(1, 3, 1),
            step=torch.zeros(1, 3, dtype=torch.long),
            sampled=torch.ones(1, 3, dtype=torch.bool),
            index=torch.zeros(1, dtype=torch.long),
        )


def test_powers_are_told_by_protocol():
    class Acts:
        module, layout = None, None
        rollout = score = decode = lambda self: None

    class Branches(Acts):
        prefix = complete = lambda self: None

    assert isinstance(Acts(), Policy)
    assert not isinstance(Acts(), BranchingPolicy)
    assert isinstance(Branches(), BranchingPolicy)
    assert not isinstance(Branches(), TeacherForcedPolicy | RedrawingPolicy)
