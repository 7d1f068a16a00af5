import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from varl.checkpoints import model as model_folder
from varl.checkpoints.convert import load_released
from varl.checkpoints.nova import OLD_NAMES, load_nova, released_names, sampler_config
from varl.config import AncestralConfig, CaptionConfig, FlowConfig, KLConfig, NOVAConfig, NOVAHeadConfig, ViTConfig
from varl.errors import CheckpointError, ConfigError, DataError
from varl.models.diffusion_head import evenly, respaced
from varl.models.flow import flow_move
from varl.models.masked import MaskedModel
from varl.models.nova import (
    NOVA,
    WELL_CONDITIONED,
    FlowChain,
    NoiseChain,
    absolute,
    ancestral,
    leverage,
    rotations,
    spaced,
    trained_betas,
)
from varl.tokenizers.kl import KL, folded

SMALL = ViTConfig(depth=2, width=16, heads=2)
TINY = NOVAConfig(
    prefix=SMALL,
    encoder=replace(SMALL, depth=3),
    head=NOVAHeadConfig(depth=1, width=8),
    grid=(4, 6),
    captions=CaptionConfig(tokens=5, width=7, encoder="microsoft/phi-2", lowercase=False),
    tokenizer=KLConfig(channels=3, width=8, multipliers=(1, 2), blocks=1, levels_attend=False, scale=0.5, fold=2),
)
TURNED = replace(TINY, prefix=replace(SMALL, width=32, heads=1), encoder=replace(SMALL, width=32, heads=1), rotary=True)
MOVING = replace(TINY, motion=True)
both = pytest.mark.parametrize("config", [TINY, TURNED], ids=["absolute", "rotary"])

State = dict[str, torch.Tensor]


def tiny(config: NOVAConfig = TINY) -> NOVA:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = NOVA(config)
    for weight in [*model.parameters(), model.text_embed.weight]:
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captions(*lengths: int) -> list[torch.Tensor]:
    return [noise(length, 7, seed=length) for length in lengths]


def orders(batch: int) -> torch.Tensor:
    return torch.rand(batch, 24, generator=torch.Generator().manual_seed(1)).argsort(1)


# ---- positions


def test_added_positions_by_hand():
    """Row 2, column 3 of a grid of 3 x 5, width 8: sin and cos of 3 and 3/100, then of 2 and 2/100."""
    want = [f(angle) for place in (3, 2) for f in (math.sin, math.cos) for angle in (place, place / 100)]
    assert absolute((3, 5), 8)[2 * 5 + 3].tolist() == pytest.approx(want)


def test_turns_by_hand():
    """A head of 32: 2 pairs of the frame, which is 0, 7 of the row, 7 of the column."""
    turns = rotations((3, 5), 32)
    assert turns.shape == (15, 16, 2)
    angle = turns[2 * 5 + 3, :, 1].atan2(turns[2 * 5 + 3, :, 0])
    frequencies = [10000 ** (-i / 7) for i in range(7)]
    assert angle.tolist() == pytest.approx([0, 0, *(2 * f for f in frequencies), *(3 * f for f in frequencies)], abs=1e-6)


def test_attention_knows_rotary_places_by_their_differences_alone():
    model, x = tiny(TURNED), noise(1, 6, 32)
    attention, turns = model.image_encoder.blocks[0].attn, rotations((4, 6), 32).view(4, 6, 16, 2)
    one, other = (attention(x, turns[row : row + 2, column : column + 3].flatten(0, 1)) for row, column in ((0, 0), (2, 3)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (attention(x) - one).abs().max() > 1e-3


# ---- the model


@both
def test_it_is_a_masked_model(config):
    model = tiny(config)
    assert isinstance(model, MaskedModel)
    assert (model.tokens, model.channels, config.image_size, config.num_classes) == (24, 12, (16, 24), None)
    assert {id(p) for block in model.blocks for p in block.parameters()} < {id(p) for p in model.parameters()}
    assert sum(model.schedule(5)) == 24
    with pytest.raises(ConfigError, match="25 steps for 24 tokens"):
        model.schedule(25)


def test_the_released_schedule():
    with torch.device("meta"):
        counts = NOVA(NOVAConfig()).schedule(64)
    assert (len(counts), sum(counts), counts[:9], counts[-8:]) == (63, 1024, (1, 2, 2, 3, 3, 4, 5, 5, 6), (25,) * 8)


@both
def test_what_is_masked_is_not_read(config):
    model, known = tiny(config), orders(2)[:, :9]
    condition, tokens = model.condition(captions(3, 0)), noise(2, 24, 12)
    z = model(condition, tokens, known)
    assert z.shape == (2, 24, config.encoder.width)
    seen = torch.zeros(2, 24, 1, dtype=torch.bool).scatter(1, known[..., None], True)
    assert torch.equal(model(condition, tokens.masked_fill(~seen, 99.0), known), z)
    other = tokens.clone()
    other[0, known[0, 0]] += 1
    changed = (model(condition, other, known) - z).abs().amax(2)
    assert (changed[0] > 1e-4).all(), "every place sees it"
    assert (changed[1] == 0).all(), "pictures do not see one another"


@both
def test_known_tokens_may_come_in_any_order(config):
    model, tokens, known = tiny(config), noise(2, 24, 12), orders(2)[:, :9]
    condition = model.condition(captions(1, 2))
    torch.testing.assert_close(model(condition, tokens, known.flip(1)), model(condition, tokens, known), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("count", [0, 24])
def test_places_differ_when_nothing_or_all_is_known(config, count):
    model, known = tiny(config), orders(1)[:, :count]
    z = model(model.condition(captions(2)), torch.ones(1, 24, 12), known)[0]
    apart = torch.cdist(z, z) + torch.eye(24)
    assert apart.min() > 1e-4


@both
def test_rows_of_a_batch_are_alone(config):
    model, tokens, known = tiny(config), noise(3, 24, 12), orders(3)[:, :9]
    condition = model.condition(captions(2, 5, 0))
    torch.testing.assert_close(model.condition(captions(5)), condition[1:2], rtol=0, atol=1e-5)
    whole, row = model(condition, tokens, known), torch.tensor([1])
    torch.testing.assert_close(model(condition[row], tokens[row], known[row]), whole[row], rtol=0, atol=1e-5)


def test_captions_are_filled_up_with_none():
    model = tiny()
    table, (caption,) = model.text_embed.weight, captions(2)
    assert torch.equal(model.text_embed.filled([caption, caption[:0]]), torch.stack([torch.cat([caption, table[2:5]]), table[:5]]))
    assert model.condition([caption]).shape == (1, 6, 16), "a place for every 2 x 2 tokens, whatever the caption's length"
    assert (model.condition([caption]) - model.condition([caption[:1]])).abs().max() > 1e-3


def test_captions_that_cannot_be_read():
    model = tiny()
    with pytest.raises(DataError, match="has 6 tokens, and NOVA reads 5"):
        model.condition(captions(2, 6))
    with pytest.raises(DataError, match="4 wide, and NOVA reads 7"):
        model.condition([noise(2, 4)])


def test_a_video_model_reads_two_tokens_more():
    model, text = tiny(MOVING), noise(2, 5, 16)
    assert model.motion_embed is not None
    wave = torch.cat([torch.cat([a.sin(), a.cos()]) for p in (5, 12) for a in (p / 10000 ** (torch.arange(128) / 128),)]).view(2, 256)
    two = torch.stack([mlp(row) for mlp, row in zip((model.motion_embed.flow_proj, model.motion_embed.fps_proj), wave, strict=True)])
    torch.testing.assert_close(model.motion_embed(), two, rtol=0, atol=1e-4)
    model.text_embed.forward = lambda features: text  # type: ignore[method-assign]
    want = model.prefix(torch.cat([text, two.expand(2, -1, -1)], 1))
    torch.testing.assert_close(model.condition(captions(1, 2)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TURNED, MOVING], ids=["absolute", "rotary", "video"])
def test_gradients_reach_every_weight_of_the_transformer(config):
    """But for what reads earlier frames, of which a picture has none."""
    model = tiny(config).requires_grad_(True)
    model(model.condition(captions(2, 0)), noise(2, 24, 12), orders(2)[:, :9]).square().sum().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    head = {id(weight) for weight in model.head.parameters()}
    assert {name for name in lacking if id(model.get_parameter(name)) not in head} == {
        "video_encoder.patch_embed.proj.weight",
        "video_encoder.patch_embed.proj.bias",
    }


def test_a_patch_is_read_as_a_convolution_reads_it():
    model, maps = tiny(), noise(2, 3, 8, 12)
    for part, patch in ((model.image_encoder, 2), (model.video_encoder, 4)):
        proj = part.patch_embed.proj
        want = F.conv2d(maps, proj.weight, proj.bias, stride=patch).flatten(2).transpose(1, 2)
        torch.testing.assert_close(part.patch_embed(folded(maps, patch)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: replace(TINY, grid=(4, 5)), r"grid=\[4, 5\].*Give an even"),
        (lambda: replace(TINY, prefix=replace(SMALL, width=32)), "prefix.width=32 and encoder.width=16 must be the same"),
        (lambda: replace(TINY, rotary=True), "multiple of 32 wide"),
        (lambda: replace(TINY, captions=CaptionConfig(tokens=513)), "NOVA has places for 512"),
        (lambda: NOVAHeadConfig(depth=0), "depth=0"),
        (lambda: AncestralConfig(beta_start=0.1, beta_end=0.01), "must rise"),
        (lambda: FlowConfig(shift=0.0), "shift=0.0: must be above 0"),
    ],
)
def test_sizes_that_cannot_be(change, named):
    with pytest.raises(ConfigError, match=named):
        change()


# ---- which steps are drawn


def test_betas_by_hand():
    linear = trained_betas(AncestralConfig(beta_schedule="linear", beta_start=0.001, beta_end=0.01))
    assert linear[[0, 333, 999]].tolist() == pytest.approx([0.001, 0.004, 0.01])
    scaled = trained_betas(AncestralConfig(beta_start=0.01, beta_end=0.16))
    assert scaled[[0, 333, 999]].tolist() == pytest.approx([0.01, 0.04, 0.16])
    assert trained_betas(AncestralConfig(beta_schedule="squaredcos_cap_v2"))[-1].item() == 0.999


def test_spacing_by_hand():
    leading, trailing, even = (AncestralConfig(timestep_spacing=name) for name in ("leading", "trailing", "linspace"))
    assert spaced(leading, 5) == (0, 200, 400, 600, 800)
    assert spaced(replace(leading, steps_offset=1), 3) == (1, 334, 667)
    assert spaced(trailing, 5) == (199, 399, 599, 799, 999)
    assert spaced(trailing, 3) == (332, 666, 999)
    assert spaced(even, 4) == (0, 333, 666, 999)
    for config in (leading, trailing, even):
        assert spaced(config, 1000) == tuple(range(1000))
    with pytest.raises(ConfigError, match="steps_offset=1 moves 1000 steps up to 1000 of 1000"):
        spaced(replace(leading, steps_offset=1), 1000)


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("drawn", [AncestralConfig(), FlowConfig()])
def test_steps_that_cannot_be_drawn(steps, drawn):
    with pytest.raises(ConfigError, match=f"{steps} denoising steps of 1000"):
        tiny(replace(TINY, head=replace(TINY.head, drawn=drawn))).denoiser(steps)


# ---- chains


def chain(drawn: AncestralConfig | FlowConfig, steps: int) -> NoiseChain | FlowChain:
    return tiny(replace(TINY, head=replace(TINY.head, drawn=drawn))).denoiser(steps)


def rows(moves: int, d: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and z of one row for each move."""
    return noise(moves, d), torch.arange(moves), noise(moves, 16, seed=2)


def test_an_ancestral_move_in_closed_form():
    """arXiv 2006.11239 Eq. 7, in fp64, each row at another move; the last move ends at the predicted x_0."""
    config, steps = AncestralConfig(), 5
    head = chain(config, steps)
    x, move, z = rows(steps)
    mean, log_std = head.law(x, move, head.read(z), None, None)
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64).square()
    whole = (1 - betas).cumprod(0)
    for row, t in enumerate((800, 600, 400, 200, 0)):
        a, before = whole[t], whole[t - 200] if t else torch.tensor(1.0, dtype=torch.float64)
        eps = head.head(x[row], torch.tensor(t), z[row]).double()
        start = (x[row].double() - (1 - a).sqrt() * eps) / a.sqrt()
        alpha = a / before
        want = before.sqrt() * (1 - alpha) / (1 - a) * start + alpha.sqrt() * (1 - before) / (1 - a) * x[row].double()
        torch.testing.assert_close(mean[row].double(), want, rtol=1e-4, atol=1e-4)
        if t:
            assert log_std[row].tolist() == pytest.approx([0.5 * math.log((1 - alpha) * (1 - before) / (1 - a))] * 12, rel=1e-5)
    assert (head.moves, head.noisy.tolist()) == (5, [True] * 4 + [False])


def test_a_flow_move_in_closed_form():
    config, steps = FlowConfig(shift=3.0), 5
    head = chain(config, steps)
    assert isinstance(head, FlowChain)
    x, move, z = rows(steps)
    mean, log_std = head.law(x, move, head.read(z), None, None)
    at = head.levels.tolist()
    assert (at[0], at[-1]) == (1.0, 0.0)
    for row in range(steps):
        velocity = head.head(x[row], torch.tensor(1000 * at[row]), z[row])
        want, std = flow_move(x[row], velocity, at[row], at[row + 1], at[1])
        torch.testing.assert_close(mean[row], want, rtol=1e-5, atol=1e-5)
        assert log_std[row].tolist() == pytest.approx([math.log(std)] * 12, rel=1e-5)
    assert head.noisy.all()
    assert head.admissible.all()


@pytest.mark.parametrize("drawn", [AncestralConfig(), FlowConfig()], ids=["ancestral", "flow"])
def test_guidance_mixes_what_is_said(drawn):
    head = chain(drawn, 4)
    x, move, z = rows(4)
    read, none = head.read(z), head.read(noise(4, 16, seed=3))
    said, unasked = (head.says(x, move, part, None, None) for part in (read, none))
    scale = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    torch.testing.assert_close(head.says(x, move, read, none, scale), unasked + scale * (said - unasked))
    plain, guided = (head.law(x, move, read, *law) for law in ((None, None), (none, torch.ones(4, 1))))
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(guided[1], plain[1])


@pytest.mark.parametrize("drawn", [AncestralConfig(), FlowConfig()], ids=["ancestral", "flow"])
def test_chains_compute_in_fp32_under_autocast(drawn):
    model = tiny(replace(TINY, head=replace(TINY.head, drawn=drawn)))
    x, move, z = rows(4)
    plain = (head := model.denoiser(4)).law(x, move, head.read(z), None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = (head := model.denoiser(4)).law(x, move, head.read(z), None, None)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_rows_of_the_head_are_alone():
    head = chain(AncestralConfig(), 4)
    x, move, z = rows(4)
    mean, _ = head.law(x, move, head.read(z), None, None)
    row = torch.tensor([2])
    torch.testing.assert_close(head.law(x[row], move[row], head.read(z[row]), None, None)[0], mean[row], rtol=0, atol=1e-5)


def test_leverage_is_the_derivative_of_the_mean():
    process, out = ancestral(AncestralConfig(), 5), chain(AncestralConfig(), 5)
    x, move, z = rows(5)
    read, said = out.read(z), noise(5, 12, seed=4)
    means = []
    for shift in (0.0, 1.0):
        out.says = lambda *_, shift=shift: said + shift  # type: ignore[method-assign]
        means.append(out.law(x, move, read, None, None))
    slope = (means[1][0] - means[0][0])[:4, 0] / means[0][1][:4, 0].exp()
    torch.testing.assert_close(slope.square(), leverage(process).flip(0)[:4].float(), rtol=1e-3, atol=1e-5)


def test_moves_that_are_scored():
    """Of MAR's cosine process the same as by count: t in 2 .. T - 2. Of Stable Diffusion's betas the last noisy move is left out."""
    for steps in (25, 100):
        process = respaced(evenly(steps))
        kept = (leverage(process) <= WELL_CONDITIONED).nonzero()[:, 0]
        assert [t for t in kept.tolist() if t > 0] == list(range(2, steps - 1))
    head = chain(AncestralConfig(), 25)
    assert (~head.admissible).nonzero()[:, 0].tolist() == [23, 24]
    cosine = chain(AncestralConfig(beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace"), 25)
    assert (~cosine.admissible).nonzero()[:, 0].tolist() == [0, 23, 24]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_every_flow_move_is_well_conditioned(shift):
    head = chain(FlowConfig(shift=shift), 25)
    assert isinstance(head, FlowChain)
    assert ((head.of_velocity / head.log_std.exp()).square() < WELL_CONDITIONED).all()


# ---- released files

SAMPLER = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": True}
TRANSFORMER = {"image_base_size": [4, 6], "video_base_size": [1, 2, 3], "text_token_len": 5, "rotary_pos_embed": False}
VAE = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}


def files(config: NOVAConfig = TINY) -> tuple[State, State]:
    """The two state dicts as they are released."""
    torch.manual_seed(0)
    theirs: State = {}
    for ours, tensor in KL(config.tokenizer).state_dict().items():
        names = released_names(ours, len(config.tokenizer.multipliers))
        theirs |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    flat = {name: tensor[..., 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor for name, tensor in theirs.items()}
    return tiny(config).state_dict(), flat


def written(folder: Path, nova: State, vae: State, /, **told) -> Path:
    parts = {"transformer": (nova, {**TRANSFORMER, **told.get("transformer", {})}), "vae": (vae, {**VAE, **told.get("vae", {})})}
    for part, (state, config) in parts.items():
        (folder / part).mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / part / "diffusion_pytorch_model.safetensors")
        (folder / part / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told.get("scheduler", SAMPLER)))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "NOVAPipeline"}))
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (TINY, {}),
        (MOVING, {"transformer": {"video_base_size": [16, 2, 3]}}),
        (TURNED, {"transformer": {"rotary_pos_embed": True}}),
        (
            replace(TINY, head=NOVAHeadConfig(depth=2, width=4, drawn=FlowConfig(shift=2.0))),
            {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}},
        ),
        (replace(TINY, tokenizer=replace(TINY.tokenizer, multipliers=(1, 1, 2), blocks=2, shift=0.25)), {"vae": {"shift_factor": 0.25}}),
    ],
    ids=["plain", "video", "rotary", "flow", "other autoencoder"],
)
def test_sizes_are_read_off_the_folder(tmp_path, config, told):
    nova, vae = files(config)
    model, module = load_nova(written(tmp_path / "nova", nova, vae, **told), heads=config.encoder.heads)
    assert model.config == config
    assert all(torch.equal(tensor, nova[name]) for name, tensor in model.state_dict().items())
    fresh = tiny(config)
    assert torch.equal(model.places, fresh.places)
    assert torch.equal(model.condition(captions(2)), fresh.condition(captions(2)))
    torch.manual_seed(0)
    want, images = KL(config.tokenizer), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module.encode(images).mean, want.encode(images).mean)
    assert torch.equal(module.decode(torch.ones(1, 3, 4, 4)), want.decode(torch.ones(1, 3, 4, 4)))


def test_older_names_of_the_autoencoder(tmp_path):
    nova, vae = files()
    for old, new in OLD_NAMES.items():
        vae = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in vae.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in vae
    _, module = load_nova(written(tmp_path / "nova", nova, vae), heads=2)
    torch.manual_seed(0)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in KL(TINY.tokenizer).state_dict().items())


def test_the_defaults_are_the_released_ones():
    config = NOVAConfig()
    assert (config.image_size, config.tokenizer.stride, config.tokenizer.token_width) == ((512, 512), 16, 16)
    with torch.device("meta"):
        model = NOVA(config)
    assert sum(p.numel() for p in model.parameters()) + model.text_embed.weight.numel() == 647004176


def test_conversion(tmp_path):
    nova, vae = files()
    folder = written(tmp_path / "nova", nova, vae)
    trained = {name: tensor + 1 for name, tensor in nova.items()}
    save_file(trained, tmp_path / "model.safetensors")
    for transformer, state in ((folder / "transformer", nova), (tmp_path / "model.safetensors", trained)):
        model, _ = load_released(transformer, folder, heads=2)
        assert isinstance(model, NOVA)
        assert torch.equal(model.mask_embed.mask_token, state["mask_embed.mask_token"])
    with pytest.raises(CheckpointError, match=r"is NOVA's, .*vae is not its folder.*model_index.json"):
        load_released(tmp_path / "model.safetensors", folder / "vae")
    with pytest.raises(CheckpointError, match=r"all but the heads. Leave image_size \(--image-size\) out"):
        load_released(folder / "transformer", folder, image_size=64)


def test_a_model_folder_gives_back_what_was_saved(tmp_path):
    model, kl = tiny(TURNED), KL(TURNED.tokenizer)
    path = model_folder.save(tmp_path / "model", model, kl, {"from": "a test"})
    assert (path / "config.yaml").read_text().startswith("kind: nova\n")
    again, module = model_folder.load(path)
    assert isinstance(again, NOVA)
    assert isinstance(module, KL)
    assert again.config == TURNED
    for one, other in ((model, again), (kl, module)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told", "named"),
    [
        (lambda nova, vae: nova.pop("text_embed.norm.bias"), {}, r"missing \(1\):\n +`text_embed.norm.bias`"),
        (lambda nova, vae: nova.update(extra=torch.zeros(1)), {}, r"unexpected \(1\):\n +`extra`"),
        (lambda nova, vae: vae.pop("decoder.mid_block.attentions.0.to_k.bias"), {}, "`decoder.mid_block.attentions.0.to_k.bias`"),
        (lambda nova, vae: (nova.clear(), nova.update(vae)), {}, "no weights of a NOVA transformer"),
        (lambda nova, vae: (vae.clear(), vae.update(nova)), {}, "no weights of a KL autoencoder"),
        (lambda nova, vae: vae.update({"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}), {}, "cells of 3 channels, .* have 4"),
        (None, {"transformer": {"image_base_size": None}}, "does not tell image_base_size"),
        (None, {"transformer": {"image_base_size": 4}}, r"image_base_size=4 and video_base_size=\[1, 2, 3\]: must be"),
        (None, {"transformer": {"image_base_size": [4, 4]}}, r"4 x 4 tokens and a prefix of \[2, 3\] places"),
        (None, {"transformer": {"rotary_pos_embed": True}}, "rotary_pos_embed=True, and the file holds `video_pos_embed`"),
        (None, {"transformer": {"video_mixer_rank": 24}}, "video_mixer_rank=24"),
        (None, {"transformer": {"text_token_len": 600}}, "places for 512"),
        (None, {"vae": {"scaling_factor": None}}, "does not tell scaling_factor"),
        (None, {"vae": {"_class_name": "AutoencoderKLOpenSora"}}, "'AutoencoderKLOpenSora' is not read"),
        (None, {"scheduler": {"_class_name": "DDIMScheduler"}}, "'DDIMScheduler' is no scheduler of a NOVA"),
    ],
)
def test_a_wrong_folder_is_told_what_is_wrong(tmp_path, change, told, named):
    nova, vae = files()
    if change is not None:
        change(nova, vae)
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        load_nova(written(tmp_path / "nova", nova, vae, **told), heads=2)


def test_what_no_weight_tells_must_be_said(tmp_path):
    folder = written(tmp_path / "nova", *files())
    with pytest.raises(CheckpointError, match=r"width 16 is of no released size \(768, 1024, 1536\).*Give `heads`"):
        load_nova(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae: has neither diffusion_pytorch_model.safetensors nor"):
        load_nova(folder, heads=2)
    with pytest.raises(CheckpointError, match=r"model_index\.json tells of no NOVAPipeline"):
        load_nova(tmp_path)


def test_samplers_as_told():
    assert sampler_config({"_class_name": "DDPMScheduler"}, "a") == AncestralConfig(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02
    ), "what is not told is as diffusers has it"
    assert sampler_config(SAMPLER, "a") == AncestralConfig()
    assert sampler_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a") == FlowConfig()


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type='v_prediction': every released NOVA has .*prediction_type='epsilon'"),
        ({"variance_type": "learned_range", "num_train_timesteps": 500}, "num_train_timesteps=500, variance_type='learned_range'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"beta_start": 0.5}, "must rise"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ],
)
def test_samplers_that_are_not_known(told, named):
    with pytest.raises(CheckpointError, match=named):
        sampler_config({**SAMPLER, **told}, "scheduler")
