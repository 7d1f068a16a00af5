"""How an Infinity is pre-trained: bits, self-correction, and what it has learned in seconds."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from test_captions import save_t5
from tiny import status
from tiny_infinity import CAPTIONS, captions
from varl.checkpoints import model as model_folder
from varl.config import BSQConfig, ClassifierConfig, FolderConfig, InfinityConfig, OptimConfig, PretrainConfig
from varl.data.folder import write_folder
from varl.errors import ConfigError, DataError
from varl.models.infinity import Infinity
from varl.plan import plan
from varl.plan.families import family_of
from varl.pretrain.data import Shown, pictures, psnr
from varl.pretrain.infinity import (
    COMMITMENT,
    ENTROPY,
    SHARPNESS,
    BitsPhase,
    CorrectingPhase,
    InfinityFamily,
    autoencode,
    bit_entropy,
    bit_probability,
    entropy_penalty,
    flips,
    straight_through,
)
from varl.pretrain.run import pretrain
from varl.pretrain.transformer import TransformerPhase, without_prompts
from varl.rng import Stream, generator
from varl.settings import from_yaml, to_yaml
from varl.tokenizers.bsq import BSQ
from varl.train.optim import lr_at, set_lr
from varl.types import Prompt

MODEL = InfinityConfig(
    depth=1,
    width=16,
    heads=2,
    chunks=1,
    mlp_width=32,
    grids=((1, 1), (2, 2), (4, 4)),
    reach=(4, 4),
    captions=CAPTIONS,
    tokenizer=BSQConfig(channels=4, width=8, multipliers=(1,), blocks=1, patch=4),
)
"""21 tokens of 4 bits on 3 scales, 16x16 pixels."""
PAIR = replace(MODEL, grids=((1, 1), (1, 2)), reach=(1, 2), tokenizer=replace(MODEL.tokenizer, channels=2))
"""3 tokens of 2 bits on 2 scales."""
COLOURS = {"a red ball": (200, 20, 20), "a green ball": (20, 200, 20), "a cube": (30, 30, 220), "red on green": (200, 200, 20)}
CPU = torch.device("cpu")


def squares(count: int, seed: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Pictures of 16 x 16 pixels: a square of its caption's colour, anywhere."""
    rng = torch.Generator().manual_seed(seed)
    noise, said = torch.rand(count, 3, 16, 16, generator=rng) * 30, []
    for i, picture in enumerate(noise):
        text, colour = list(COLOURS.items())[i % len(COLOURS)]
        y, x = torch.randint(9, (2,), generator=rng).tolist()
        picture[:, y : y + 8, x : x + 8] += torch.tensor(colour)[:, None, None]
        said.append(Prompt(text=text))
    return noise.to(torch.uint8), said


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.pretrain.run.LOG_EVERY", 1)
        patch.setattr("varl.pretrain.data.HELDOUT_PICTURES", 16)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", *squares(64, 0))
    write_folder(folder / "heldout", *squares(16, 1))
    return PretrainConfig(
        model=MODEL,
        data=FolderConfig(path=str(folder / "train"), heldout=str(folder / "heldout")),
        tokenizer_steps=40,
        tokenizer_batch=16,
        tokenizer_lr=1e-2,
        steps=20,
        batch=8,
        optim=OptimConfig(name="muon", lr=1e-2, schedule="linear"),
        drop_prompt=0.2,
        save_every=4,
        device="cpu",
    )


@pytest.fixture(scope="module")
def base(config, tmp_path_factory) -> Path:
    """The directory of an unbroken pre-training."""
    out = tmp_path_factory.mktemp("base")
    assert pretrain(config, out, captions=captions) == out / "model"
    return out


@pytest.fixture(scope="module")
def bsq(base) -> BSQ:
    return model_folder.load(base / "model")[1]


def fresh(config: InfinityConfig = MODEL, seed: int = 0) -> tuple[Infinity, BSQ]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Infinity(config), BSQ(config.tokenizer, config.grids)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / "model" / "model.safetensors").read_bytes(), (out / "model" / "tokenizer.safetensors").read_bytes()


def signed(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


# ---- the equations of the autoencoder


def test_a_code_by_hand_and_its_derivative():
    u = torch.tensor([0.6, -0.8, 0.0, 1.0]).view(2, 2, 1, 1).requires_grad_()
    code = straight_through(u)
    assert code.flatten().tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5])
    upstream = torch.tensor([3.0, -2.0, 0.5, 0.1]).view(2, 2, 1, 1)
    code.backward(upstream)
    assert torch.equal(u.grad, upstream)


def test_a_bits_probability_is_that_of_the_codes_together():
    """Of all codes of three bits, with softmax(t u.c)."""
    u = F.normalize(torch.tensor([0.05, -0.02, 0.9]), dim=0)
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=3))) / 3**0.5
    joint = (SHARPNESS * 3 / 2 * codes @ u).softmax(0)
    want = torch.stack([joint[codes[:, d] > 0].sum() for d in range(3)])
    torch.testing.assert_close(bit_probability(u.view(1, 3, 1, 1)).flatten(), want, rtol=1e-5, atol=1e-6)
    corner = bit_probability(torch.tensor([0.5, -0.5, 0.0, 0.5]).view(1, 4, 1, 1)).flatten()
    assert corner.logit(eps=1e-9)[:3].tolist() == pytest.approx([SHARPNESS, -SHARPNESS, 0.0], rel=1e-2)


def test_the_entropy_of_a_bit():
    p = torch.tensor([0.5, 0.25, 0.0, 1.0], requires_grad=True)
    entropy = bit_entropy(p)
    assert entropy.tolist() == pytest.approx([math.log(2), 0.25 * math.log(4) + 0.75 * math.log(4 / 3), 0, 0], abs=2e-5)
    entropy.sum().backward()
    assert p.grad.tolist() == pytest.approx([0, math.log(3), 0, 0], abs=1e-6)


def test_the_entropy_penalty_by_hand():
    """Least where bits are certain and half of them 1; nothing where all cells are alike."""

    def penalty(*cells: Sequence[float]) -> float:
        return entropy_penalty(torch.tensor(cells).T[None, :, :, None]).item()

    assert penalty([0.0, 1.0, 0.0], [1.0, 0.0, 1.0]) == pytest.approx(-3 * math.log(2), abs=1e-4)
    assert penalty([0.25, 0.5], [0.25, 0.5]) == pytest.approx(0, abs=1e-6)
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert penalty([0.25], [0.75]) == pytest.approx(quarter - math.log(2), abs=1e-6)


def test_the_factorised_entropy_bounds_that_of_whole_codes():
    """The first term is that of the codes' joint law; the second is never below it."""
    p = torch.rand(5, 3, generator=generator(0)) * 0.9 + 0.05
    bits = torch.tensor(list(product((0.0, 1.0), repeat=3)))
    joint = torch.stack([(bits * row + (1 - bits) * (1 - row)).prod(1) for row in p])
    torch.testing.assert_close(bit_entropy(p).sum(1), torch.special.entr(joint).sum(1), rtol=1e-5, atol=1e-6)
    assert bit_entropy(p.mean(0)).sum() > torch.special.entr(joint.mean(0)).sum()


def test_what_is_trained_is_what_is_decoded(bsq):
    """The picture of the bits that `encode` gives; and the losses of each scale's directions, by way of them."""
    images = signed(squares(6, 3)[0])
    with torch.no_grad():
        picture, loss, codes = autoencode(bsq, images)
        bits, sums = bsq.residual_bits(f := bsq.features(images))
        torch.testing.assert_close(picture, bsq.render(sums[-1]), rtol=0, atol=1e-5)
        want = []
        for scale, part in enumerate(bsq.split(bits)):
            assert torch.equal(codes[scale], bsq.codes(part, scale))
            u = F.normalize(bsq.rest(f, sums[scale - 1] if scale else torch.zeros_like(f), scale), dim=1)
            distance = (u - codes[scale]).square().mean()
            want.append(COMMITMENT * distance + ENTROPY * entropy_penalty(torch.sigmoid(SHARPNESS * 2 * u)))
    torch.testing.assert_close(loss, torch.stack(want).mean(), rtol=1e-5, atol=1e-7)


def test_every_weight_of_the_autoencoder_learns(bsq):
    images = signed(squares(6, 3)[0])
    picture, loss, _ = autoencode(bsq, images)
    (F.mse_loss(picture, images) + loss).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bsq.parameters())
    assert bsq.encoder.conv_in.weight.grad.abs().max() > 0
    bsq.zero_grad(set_to_none=True)


# ---- both phases


def test_both_phases_learn(base):
    lines = metrics(base)
    assert [line["stage"] for line in lines] == ["tokenizer"] * 40 + ["transformer"] * 20
    tokenizer, transformer = lines[:40], lines[40:]
    assert tokenizer[-1]["pretrain/psnr"] > tokenizer[0]["pretrain/psnr"] + 3
    assert 0 < tokenizer[-1]["pretrain/bit_usage"] <= 1
    assert transformer[0]["pretrain/heldout_loss"] == pytest.approx(math.log(2), abs=0.1), "a fresh head is nearly 0"
    assert transformer[-1]["pretrain/heldout_loss"] < transformer[0]["pretrain/heldout_loss"] - 0.05
    assert 0.5 < transformer[-1]["pretrain/accuracy"] <= 1
    by_scale = sum(transformer[-1][f"pretrain/heldout_loss_scale{s}"] * n for s, n in enumerate((1, 4, 16))) / 21
    assert transformer[-1]["pretrain/heldout_loss"] == pytest.approx(by_scale, rel=1e-5)
    assert model_folder.load(base / "model")[0].config == MODEL


def test_interrupted_in_either_phase_it_ends_where_the_unbroken_one_does(config, base, tmp_path):
    class Interrupted(Exception):
        pass

    for step in (3, 40, 46):

        def tick(values, step=step):
            if values["step"] == step:
                raise Interrupted

        with pytest.raises(Interrupted):
            pretrain(config, tmp_path, tick, captions)
    pretrain(config, tmp_path, captions=captions)
    assert metrics(tmp_path) == metrics(base)
    assert files(tmp_path) == files(base)


def test_init_keeps_the_autoencoder(config, base, tmp_path):
    pretrain(replace(config, init=str(base / "model"), steps=2), tmp_path, captions=captions)
    assert [line["stage"] for line in metrics(tmp_path)] == ["transformer"] * 2
    assert files(tmp_path)[1] == files(base)[1]
    assert files(tmp_path)[0] != files(base)[0]


# ---- self-correction


def marked(model: Infinity) -> Infinity:
    """The log-odds of a 1 are 2, of every bit: then the loss of a bit tells which is the right one."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 2.0]).repeat(model.config.tokenizer.bits))
    return model


def seen(family: InfinityFamily, kept: torch.Tensor, flip) -> tuple[list, list]:
    """The right bits, as the losses tell them, and what the transformer was shown."""
    shown = []
    hook = family.model.word_embed.register_forward_pre_hook(lambda module, given: shown.append(given[0].clone()))
    losses, _ = family.fit(family.read([Prompt(text="a b")]), kept, flip)
    hook.remove()
    return (losses < 1).int().view(-1, 2).tolist(), shown[0][0].tolist()


def test_two_scales_of_two_bits_by_hand():
    """Features (1, -.4) and (.2, -.6), of mean (.6, -.5): bits 1 0, code r (1, -1) with r = .7071. What is left is (.2929, .3071) and
    (-.5071, .1071). With the first bit turned round the code is r (-1, -1), and (1.7071, .3071) and (.9071, .1071) are left."""
    family, r = InfinityFamily(marked(fresh(PAIR)[0]), fresh(PAIR)[1], captions), 0.5**0.5
    kept = torch.tensor([[[[1.0, 0.2]], [[-0.4, -0.6]]]])
    right, inputs = seen(family, kept, lambda scale: None)
    assert right == [[1, 0], [1, 1], [0, 1]]
    assert inputs == [pytest.approx([r, -r])] * 2
    right, inputs = seen(family, kept, lambda scale: torch.tensor([[[True, False]]]) if scale == 0 else None)
    assert right == [[1, 0], [1, 1], [1, 1]], "its own scale's right bits stay; of the finer one a bit of the second token changes"
    assert inputs == [pytest.approx([-r, -r])] * 2
    right, inputs = seen(family, kept, lambda scale: torch.ones(1, 2, 2, dtype=torch.bool) if scale == 1 else None)
    assert (right, inputs) == ([[1, 0], [1, 1], [0, 1]], [pytest.approx([r, -r])] * 2), "nothing comes after the last scale"


def test_shares_are_uniform_and_of_each_picture_and_scale():
    bsq = BSQ(BSQConfig(channels=64, width=4, multipliers=(1,), blocks=1), ((1, 1), (4, 4), (4, 4)))
    flip = flips(bsq, 0.3, Stream(seed=3, rows=tuple(range(200))), CPU)
    first, second, third = (flip(scale).float().mean((1, 2)) for scale in range(3))
    for share, bits in ((first, 64), (second, 1024), (third, 1024)):  # uniform on [0, .3], and of so many bits
        spread = (0.3**2 / 12 + 0.15 * 0.85 / bits) ** 0.5
        assert share.mean().item() == pytest.approx(0.15, abs=4 * spread / 200**0.5)
        assert share.std().item() == pytest.approx(spread, rel=0.15)
    assert second.max() < 0.3 + 4 * (0.3 * 0.7 / 1024) ** 0.5
    assert torch.corrcoef(torch.stack([second, third]))[0, 1].abs() < 0.3


def test_flips_are_a_pictures_own_whatever_its_batch():
    bsq = BSQ(PAIR.tokenizer, PAIR.grids)
    alone, together = (flips(bsq, 0.5, Stream(seed=0, path=("flips", 4), rows=rows), CPU) for rows in ((7,), (2, 7)))
    other = flips(bsq, 0.5, Stream(seed=0, path=("flips", 5), rows=tuple(range(8))), CPU)
    again = flips(bsq, 0.5, Stream(seed=0, path=("flips", 4), rows=tuple(range(8))), CPU)
    assert all(torch.equal(alone(scale)[0], together(scale)[1]) for scale in range(2))
    assert not torch.equal(other(1), again(1))


def test_without_flips_it_is_plain_training_to_the_bit(config, bsq):
    shown, trained = pictures(config), []
    for kind, share in ((TransformerPhase, None), (CorrectingPhase, 0.0), (CorrectingPhase, 0.3)):
        phase = kind(replace(config, self_correction=share), InfinityFamily(fresh()[0], bsq, captions), shown, CPU)
        phase.begin()
        for step in range(3):
            phase.step(step)
        trained.append(phase.family.model.state_dict())
    plain, zero, some = trained
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert not torch.equal(plain["head.weight"], some["head.weight"])


def test_a_corrected_model_knows_better_what_comes_after_wrong_bits(config, bsq):
    """Of held-out pictures, 20 % of whose bits of the first scale are turned round; or of the second."""
    shown, after = pictures(config), {}
    wrong = bsq.split(Stream(seed=9, rows=tuple(range(16))).uniform(21, 4) < 0.2)
    for seed, share in product(range(3), (0.0, 0.3)):
        phase = CorrectingPhase(replace(config, self_correction=share), InfinityFamily(fresh(seed=seed)[0], bsq, captions), shown, CPU)
        phase.begin()
        for step in range(60):
            phase.step(step)
        for turned in (0, 1):
            with torch.no_grad():
                losses, _ = phase.family.fit(*phase.held[::-1], lambda scale, turned=turned: wrong[scale] if scale == turned else None)
            after[seed, share, turned] = phase.family.parts(losses)[f"scale{turned + 1}"]
    for seed in range(3):
        assert after[seed, 0.3, 0] < 0.85 * after[seed, 0.0, 0]
    corrected, plain = (sum(after[seed, share, 1] for seed in range(3)) for share in (0.3, 0.0))
    assert corrected < 0.95 * plain


# ---- the loss


class Exact(Infinity):
    """Says 2 tokens of 2 bits by the law `ODDS`: of the second token's bits, given those of the first."""

    def forward(self, condition, inputs, scales=None):
        return torch.cat([inputs.new_zeros(len(inputs), 1, 2), inputs], 1)

    def logits(self, hidden, condition):
        first = (hidden[:, 1] > 0).long()
        ones = torch.stack([ODDS[0].expand(len(hidden), 2), SECOND[first[:, 0], first[:, 1]]], 1).flatten(1)
        return torch.stack([torch.zeros_like(ones), ones], 2)


ODDS = torch.tensor([[0.4, -1.3]])
SECOND = torch.tensor([[[2.0, -0.5], [0.3, 1.0]], [[-1.0, -3.0], [0.7, 0.1]]])
"""Log-odds of the second token's bits [2, 2, 2], by the first token's two."""


def test_with_exact_logits_the_loss_is_the_entropy():
    """Of all 16 pictures, each with its probability. In one number: sign, and then whether it is above or below 1 / sqrt(2)."""
    twice = replace(PAIR, grids=((1, 1), (1, 1)), reach=(1, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = InfinityFamily(Exact(twice), BSQ(twice.tokenizer, twice.grids), captions)
    one = {(0, 0): -1.2, (0, 1): -0.2, (1, 0): 0.2, (1, 1): 1.2}
    codes = list(product((0, 1), repeat=4))
    kept = torch.tensor([[one[a, c], one[b, d]] for a, b, c, d in codes])[:, :, None, None]
    assert family.tokenizer.residual_bits(kept)[0].flatten(1).tolist() == [list(code) for code in codes]
    p = []
    for a, b, c, d in codes:
        of_one = [*torch.sigmoid(ODDS[0]).tolist(), *torch.sigmoid(SECOND[a, b]).tolist()]
        p.append(math.prod(q if bit else 1 - q for q, bit in zip(of_one, (a, b, c, d), strict=True)))
    assert sum(p) == pytest.approx(1)
    losses, right = family.fit(family.read([Prompt(text="a")] * 16), kept)
    entropy = -sum(q * math.log(q) for q in p)
    assert (losses.mean(1) * torch.tensor(p)).sum().item() == pytest.approx(entropy / 4, rel=1e-6)
    most_probable = torch.cat([(ODDS[0] > 0).expand(16, 2), SECOND[[c[0] for c in codes], [c[1] for c in codes]] > 0], 1)
    assert torch.equal(right, torch.tensor(codes).bool() == most_probable)


def test_four_captioned_pictures_are_learned_by_heart(bsq):
    images, said = squares(4, 5)
    shown = Shown(images, said, images, said)
    optim = OptimConfig(name="muon", lr=2e-2, schedule="linear")
    config = PretrainConfig(model=MODEL, steps=120, batch=4, optim=optim, self_correction=0.0, device="cpu")
    phase = CorrectingPhase(config, InfinityFamily(fresh()[0], bsq, captions), shown, CPU)
    phase.begin()
    for step in range(config.steps):
        set_lr(phase.optimizer, lr_at(step, config.steps, optim))
        found = phase.step(step)
    assert found()["pretrain/accuracy"] > 0.99
    with torch.no_grad():
        other = phase.family.fit(phase.held.said.roll(1), phase.held.kept)[1].float().mean()
    assert other < 0.9, "by its caption"


# ---- captions


def test_captions_and_none(bsq):
    """Each is encoded once; "none" is as long as what it stands for, and its vectors are the model's own as they are now."""
    asked = []

    def encoder(texts):
        asked.extend(texts)
        return captions(texts)

    family = InfinityFamily(fresh()[0], bsq, encoder)
    said = family.read([Prompt(text="a b c"), Prompt(), Prompt(text="a b c"), Prompt(text="d")])
    assert asked == ["a b c", "d"]
    assert said.tolist() == [0, -CAPTIONS.tokens, 0, 1]
    assert family.nothing(said).tolist() == [-3, -CAPTIONS.tokens, -3, -1]
    kept = bsq.features(signed(squares(4, 3)[0])).detach()
    together = family.fit(said, kept)[0]
    for row in range(4):
        torch.testing.assert_close(family.fit(said[row][None], kept[row][None])[0][0], together[row], rtol=1e-4, atol=1e-5)
    family.fit(family.nothing(said[:1]), kept[:1])[0].mean().backward()
    learned = family.model.cfg_uncond.grad.abs().sum(1)
    assert (learned > 0).tolist() == [True] * 3 + [False] * 3
    with torch.no_grad():
        family.model.cfg_uncond.add_(1)
    assert torch.equal(family.caption(-2), family.model.cfg_uncond[:2])


def test_a_share_of_the_captions_is_dropped(config, bsq):
    family = InfinityFamily(fresh()[0], bsq, captions)
    said = family.read([Prompt(text="a b c"), Prompt(text="d e")] * 50)
    dropped = without_prompts(said, family.nothing(said), replace(config, drop_prompt=0.5), 0)
    assert set(dropped[::2].tolist()) == {0, -3}
    assert set(dropped[1::2].tolist()) == {1, -2}
    assert 30 < int((dropped < 0).sum()) < 70


# ---- from the command line


def test_pretrain_and_then_train(tmp_path, monkeypatch):
    """Two steps of GRPO on what was just made, read by a T5; the replay gate holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(tmp_path / "data", *squares(8, 0))
    t5 = str(save_t5(tmp_path / "t5", width=128))
    config = PretrainConfig(
        name="infinity",
        model=replace(MODEL, captions=replace(CAPTIONS, encoder=t5)),
        data=FolderConfig(path=str(tmp_path / "data")),
        tokenizer_steps=3,
        tokenizer_batch=4,
        steps=3,
        batch=4,
        drop_prompt=0.1,
        device="cpu",
    )
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    assert status("pretrain", tmp_path / "base.yaml", "--out", tmp_path / "base", "--quiet") == 0
    run = {
        "model": str(tmp_path / "base" / "model"),
        "data": {"kind": "folder", "path": str(tmp_path / "data")},
        "rewards": {"red": {"reward": {"kind": "python", "target": "varl.rewards.toy:redness"}}},
        "algorithm": {"kind": "grpo", "num_generations": 4},
        "sample_law": {"cfg_scale": [2.0]},
        "score_law": {"cfg_scale": [2.0]},
        "train": {"steps": 2, "prompts_per_step": 2, "image_every": 0, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert status("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet") == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 <= line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


# ---- settings, plans, bad input


def test_its_config_is_the_yaml_it_writes(config):
    for share in (None, 0.2):
        made = replace(config, self_correction=share)
        assert from_yaml(to_yaml(made), PretrainConfig) == made
    assert (config.flipped, replace(config, self_correction=0.0).flipped) == (0.3, 0.0)


def test_its_plan(config, tmp_path):
    none = replace(config, model=replace(MODEL, captions=replace(CAPTIONS, encoder=str(tmp_path / "none"))))
    found = plan(none, calibrate=False)
    (problem,) = found.problems
    assert problem.startswith(f"captions.encoder='{tmp_path}/none': there is no such folder")
    assert [(u.name, u.count, u.trained) for u in found.updates] == [("tokenizer", 40, 16 * 21), ("transformer", 20, 8 * 21)]
    assert found.updates[1].flops["train"] == 3 * 8 * family_of(MODEL).forward(3).flops


def test_shares_that_cannot_be(config):
    for share in (-0.1, 0.6):
        with pytest.raises(ConfigError, match=rf"self_correction={share}.*0 to 0.5, where bits say nothing more"):
            replace(config, self_correction=share)
    with pytest.raises(ConfigError, match=r"self_correction=0\.3: turns bits round, of an Infinity\. Leave it out"):
        replace(config, model=ClassifierConfig(num_classes=3, image_size=(16, 16)), self_correction=0.3)


def test_an_autoencoder_must_be_trained(config):
    with pytest.raises(ConfigError, match="tokenizer_steps=0: the bits of an untrained autoencoder"):
        BitsPhase(replace(config, tokenizer_steps=0), fresh()[1], pictures(config), CPU)


def test_what_it_cannot_read_is_named_before_anything_is_trained(config, tmp_path):
    with pytest.raises(ConfigError, match="this model reads captions, and there is no encoder"):
        pretrain(config, tmp_path / "none")
    for name, prompt, said in (
        ("long", Prompt(text="a b c d e f g"), "has 7 tokens, the model takes 1 to 6"),
        ("class", Prompt(label=1), "label 1"),
    ):
        write_folder(tmp_path / name, squares(16, 0)[0], [prompt] * 16)
        with pytest.raises(DataError, match=said):
            pretrain(replace(config, data=FolderConfig(path=str(tmp_path / name))), tmp_path / f"run of {name}", captions=captions)
        assert metrics(tmp_path / f"run of {name}") == []


def test_the_reconstruction_is_measured_as_it_will_be_decoded(config, base, bsq):
    """The held-out pictures', by the bits alone, is not far below what was measured while it was trained."""
    images = signed(pictures(config).held_images)
    with torch.no_grad():
        error = F.mse_loss(bsq.render(bsq.f_hat(bsq.encode(images))), images)
    assert psnr(float(error)) > metrics(base)[39]["pretrain/psnr"] - 2
