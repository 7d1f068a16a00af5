import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varl.checkpoints.folder import strict_load
from varl.checkpoints.var import (
    SCHEDULES,
    fill_tokenizer,
    fill_transformer,
    implied_buffers,
    load_var,
    tokenizer_config,
    transformer_config,
)
from varl.config import NextScaleConfig, TokenizerConfig
from varl.errors import CheckpointError
from varl.eval.parity import FAMILIES, CaseResult, error_ratio, failed, format_table, run
from varl.models.next_scale import NextScale
from varl.tokenizers.multiscale_vq import MultiScaleVQ

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
FAMILY_FOLDERS = ("var", "llamagen", "janus", "mar", "infinity", "nova", "harmon")
CASES = [(family, path.stem) for family in FAMILY_FOLDERS for path in sorted((GOLDEN / family).glob("*.json"))]
KEYS = sorted((GOLDEN / "keys").glob("var-*.json"))
recorded = pytest.mark.skipif(not CASES, reason="the authors' recorded results (../shared/golden) are not beside this repository")

TOKENIZER = TokenizerConfig(vocab=16, channels=4, width=32, multipliers=(1, 2), blocks=1)
CONFIG = NextScaleConfig(depth=2, width=16, heads=2, grids=((1, 1), (2, 2), (3, 3)), num_classes=3, tokenizer=TOKENIZER)


# ---- the authors' results


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], CaseResult]:
    return {(result.family, result.case): result for family in FAMILY_FOLDERS for result in run(GOLDEN / family)}


@recorded
@pytest.mark.parametrize(("family", "case"), CASES)
def test_we_compute_what_they_computed(results, family, case):
    result = results[family, case]
    stored = [name for name in load_file(GOLDEN / family / f"{case}.safetensors") if name.startswith("out.")]
    assert result.verdict == "agrees", format_table([result])
    assert result.compared == len(stored)
    assert 0 < result.ratio <= 1
    assert result.worst in stored


@recorded
@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_released_files_have_our_names(file):
    shapes = json.loads(file.read_text())["state_dict"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "pos_1LC" in shapes:
            model = NextScale(transformer_config(shapes, SCHEDULES[shapes["pos_1LC"][1]], TokenizerConfig(), file.stem))
            fill_transformer(model, state, file.stem)
            assert set(shapes) == set(model.state_dict()) | set(implied_buffers(model))
        else:
            assert tokenizer_config(shapes, file.stem) == TokenizerConfig(), "the defaults are the released tokenizer"
            fill_tokenizer(MultiScaleVQ(TokenizerConfig(), SCHEDULES[680]), state, file.stem)


@recorded
def test_a_key_list_that_lacks_a_name_fails(tmp_path):
    info = json.loads(KEYS[0].read_text())
    (tmp_path / "keys").mkdir()
    copy = tmp_path / "keys" / KEYS[0].name
    copy.write_text(json.dumps(info))
    assert run(tmp_path)[0].verdict == "agrees"
    info["state_dict"].pop("blocks.3.attn.proj.bias")
    copy.write_text(json.dumps(info))
    (result,) = run(tmp_path)
    assert failed([result])
    assert "blocks.3.attn.proj.bias" in result.problems[0]


def copy_cases(tmp_path: Path, *names: str, family: str = "var") -> Path:
    folder = tmp_path / family
    folder.mkdir()
    for name in names:
        for kind in ("json", "safetensors"):
            shutil.copyfile(GOLDEN / family / f"{name}.{kind}", folder / f"{name}.{kind}")
    return folder


def edit(file: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


@recorded
@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("vae_tiny", "sd.quantize.quant_resi.qresi_ls.1.weight"),
        ("vae_tiny", "sd.decoder.up.0.block.1.conv2.weight"),
        ("var_saln_tiny", "sd.blocks.1.ada_gss"),
        ("var_saln_tiny", "sd.lvl_embed.weight"),
    ],
)
def test_one_changed_weight_fails(tmp_path, case, weight):
    folder = copy_cases(tmp_path, "vae_tiny", case) if case != "vae_tiny" else copy_cases(tmp_path, case)

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / f"{case}.safetensors", change)
    result = {r.case: r for r in run(folder)}[case]
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("vq_tiny", "sd.quantize.embedding.weight"),
        ("vq_tiny", "sd.decoder.conv_blocks.0.attn.1.k.weight"),
        ("gpt_c2i_tiny", "sd.layers.1.feed_forward.w3.weight"),
        ("gpt_t2i_tiny", "sd.cls_embedding.uncond_embedding"),
        ("gpt_t2i_120", "sd.cls_embedding.cap_proj.fc1.weight"),
    ],
)
def test_one_changed_weight_of_llamagen_fails(tmp_path, case, weight):
    folder = copy_cases(tmp_path, case, family="llamagen")

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / f"{case}.safetensors", change)
    (result,) = run(folder)
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("kl_tiny", "sd.encoder.down.1.attn.0.q.weight"),
        ("kl_tiny", "sd.post_quant_conv.bias"),
        ("mar_tiny", "sd.fake_latent"),
        ("mar_tiny", "sd.mask_token"),
        ("mar_tiny", "sd.diffloss.net.res_blocks.1.adaLN_modulation.1.weight"),
    ],
)
def test_one_changed_weight_of_mar_fails(tmp_path, case, weight):
    folder = copy_cases(tmp_path, case, family="mar")

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / f"{case}.safetensors", change)
    (result,) = run(folder)
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("vae_tiny", "sd.decoder.up_blocks.0.resnets.2.conv2.weight"),
        ("vae_tiny", "sd.encoder.mid_block.attentions.0.to_v.weight"),
        ("nova_tiny", "sd.mask_embed.bos_token"),
        ("nova_tiny", "sd.video_pos_embed.time_proj.2.weight"),
        ("nova_rope_tiny", "sd.text_embed.weight"),
        ("nova_rope_tiny", "sd.image_decoder.blocks.0.norm1.proj.weight"),
    ],
)
def test_one_changed_weight_of_nova_fails(tmp_path, case, weight):
    folder = copy_cases(tmp_path, case, family="nova")

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / f"{case}.safetensors", change)
    (result,) = run(folder)
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    "weight", ["sd.proj_out.2.weight", "sd.proj_in.0.bias", "sd.llm.model.layers.1.self_attn.v_proj.weight", "sd.mar.fake_latent"]
)
def test_one_changed_weight_of_harmon_fails(tmp_path, weight):
    copy_cases(tmp_path, "kl_tiny", family="mar")
    folder = copy_cases(tmp_path, "harmon_tiny", family="harmon")

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / "harmon_tiny.safetensors", change)
    (result,) = run(folder)
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("vae_tiny", "sd.encoder.down.1.block.0.nin_shortcut.conv.weight"),
        ("vae_tiny", "sd.decoder.norm_out.norm.bias"),
        ("infinity_tiny", "sd.cfg_uncond"),
        ("infinity_tiny", "sd.text_proj_for_sos.ca.mat_q"),
        ("infinity_tiny", "sd.block_chunks.1.module.0.ca.v_bias"),
        ("infinity_tiny", "sd.block_chunks.0.module.1.ada_gss"),
    ],
)
def test_one_changed_weight_of_infinity_fails(tmp_path, case, weight):
    folder = copy_cases(tmp_path, *{"vae_tiny", case}, family="infinity")

    def change(tensors):
        tensors[weight].view(-1)[0] += 0.5

    edit(folder / f"{case}.safetensors", change)
    result = {r.case: r for r in run(folder)}[case]
    assert result.verdict == "FAILS"
    assert result.ratio > 1


@recorded
@pytest.mark.parametrize(
    "file",
    [file for family in ("infinity", "nova", "janus") for file in sorted((GOLDEN / "keys").glob(f"{family}-*.json"))],
    ids=lambda file: file.stem,
)
def test_other_families_released_files_have_our_names(tmp_path, file):
    (tmp_path / "keys").mkdir()
    copy = tmp_path / "keys" / file.name
    info = json.loads(file.read_text())
    copy.write_text(json.dumps(info))
    (result,) = run(tmp_path)
    assert result.verdict == "agrees", format_table([result])
    assert result.compared == len(info["state_dict"])


@recorded
def test_what_else_fails(tmp_path):
    folder = copy_cases(tmp_path, "vae_tiny")
    file, description = folder / "vae_tiny.safetensors", folder / "vae_tiny.json"
    whole, info = load_file(file), json.loads(description.read_text())

    def problems(change) -> str:
        tensors, told = {name: tensor.clone() for name, tensor in whole.items()}, json.loads(json.dumps(info))
        change(tensors, told)
        save_file(tensors, file)
        description.write_text(json.dumps(told))
        (result,) = run(folder)
        assert result.verdict == "FAILS"
        assert failed([result])
        return "\n".join(result.problems)

    def unknown(tensors, told):
        tensors["out.colour"] = torch.zeros(1)
        told["tensors"].append({"name": "out.colour", "tolerance": {"atol": 1, "rtol": 0}})

    def nan(tensors, told):
        tensors["sd.post_quant_conv.weight"][0] = torch.nan

    def shape(tensors, told):
        tensors["out.f"] = tensors["out.f"][:1].clone()

    def lost(tensors, told):
        tensors.pop("out.f")

    def index(tensors, told):
        tensors["out.idx"][0, 0] += 1

    def renamed(tensors, told):
        tensors["sd.encoder.conv_first.bias"] = tensors.pop("sd.encoder.conv_in.bias")

    def setting(tensors, told):
        told["config"].pop("ch_mult")

    def empty(tensors, told):
        for name in [name for name in tensors if name.startswith("out.")]:
            tensors.pop(name)
        told["tensors"] = []

    assert problems(unknown) == "no recipe for out.colour"
    assert "not finite" in problems(nan)
    assert "out.f: has shape [2, 8, 4, 4], recorded is [1, 8, 4, 4]" in problems(shape)
    assert "out.f is listed and not stored" in problems(lost)
    assert "out.idx: 1 of 60 numbers differ, and none may" in problems(index)
    assert "`encoder.conv_in.bias` (nearest on the other side: `encoder.conv_first.bias`)" in problems(renamed)
    assert "ch_mult" in problems(setting)
    assert "no results" in problems(empty)


@recorded
def test_a_transformer_needs_its_tokenizer_nearby(tmp_path):
    folder = copy_cases(tmp_path, "var_saln_tiny", "vae_tiny")
    for place in (tmp_path, folder):
        assert not failed(run(place))
    (folder / "vae_tiny.json").unlink()
    (result,) = run(tmp_path)
    assert "weights of var/vae_tiny" in result.problems[0]


# ---- what the table says


def test_no_case_is_a_failure(tmp_path):
    assert run(tmp_path) == []
    assert failed([])
    assert format_table([]).startswith("No case was found: one is CASE.json beside CASE.safetensors")


def test_a_family_to_come_neither_passes_nor_fails(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model": "tomorrow", "case": "tiny", "tensors": []}))
    (tmp_path / "other.json").write_text("[1, 2]")
    (result,) = run(tmp_path)
    assert (result.family, result.case, result.verdict) == ("tomorrow", "tiny", "not supported yet")
    assert not failed([result])


@recorded
def test_key_lists_of_other_families_are_counted_with_their_family(tmp_path, monkeypatch):
    copy = tmp_path / "keys"
    copy.mkdir()
    shutil.copyfile(GOLDEN / "keys" / "var-d16.json", copy / "var-d16.json")
    for name in ("tomorrow-0.5b", "tomorrow-1.5b"):
        (copy / f"{name}.json").write_text(json.dumps({"model": name, "state_dict": {}}))
    monkeypatch.chdir(copy)
    table = format_table(run(Path("."))).splitlines()  # the folder has no name here
    assert re.split(r"\s{2,}", table[1]) == ["var/var-d16", "220", "-", "-", "agrees"]
    assert table[2:] == [f"tomorrow: not supported yet, 2 not checked; VARL has {', '.join(FAMILIES)}."]


def test_a_damaged_file_fails_and_the_others_are_checked(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(json.dumps({"model": "var", "case": "b", "tensors": [], "config": {}}))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "c.json").write_text(json.dumps({"state_dict": {}}))  # of no model: not a case
    first, second = run(tmp_path)
    assert "cannot be read as JSON" in first.problems[0]
    assert "cannot be read as safetensors" in second.problems[0]
    assert failed([first])


def test_errors_in_units_of_tolerance():
    want = torch.tensor([1.0, -2.0])
    relative = {"atol": 0.1, "rtol": 0.05}
    assert error_ratio(torch.tensor([1.0, -2.1]), want, relative) == pytest.approx(0.5)
    assert error_ratio(torch.tensor([1.3, -2.0]), want, relative) == pytest.approx(2.0)
    assert error_ratio(want, want, {"atol": 0.0, "rtol": 0.0}) == 0
    assert error_ratio(want + 1, want, {"atol": 0.0, "rtol": 0.0}) == math.inf
    assert error_ratio(torch.tensor([1.0, torch.nan]), want, relative) == math.inf
    assert error_ratio(want[:1], want, relative) == math.inf
    assert error_ratio(torch.tensor([1.0, torch.inf]), want, relative) == math.inf
    ids = torch.tensor([3, 4])
    assert error_ratio(ids, ids, {"exact": True}) == 0
    assert error_ratio(ids, ids + 1, {"exact": True}) == math.inf
    assert error_ratio(ids + 0.5, ids, {"exact": True}) == math.inf
    bytes_ = torch.tensor([3, 255], dtype=torch.uint8)
    assert error_ratio(bytes_ - torch.tensor([0, 2], dtype=torch.uint8), bytes_, {"max_abs": 1}) == 2


def test_the_table():
    table = format_table(
        [
            CaseResult(family="var", case="tiny", verdict="agrees", compared=3, worst="out.f", ratio=0.25),
            CaseResult(family="var", case="bad", verdict="FAILS", problems=("no recipe for out.x",)),
            CaseResult(family="tomorrow", case="tiny", verdict="not supported yet"),
            CaseResult(family="var", case="small", verdict="agrees", compared=7),
            CaseResult(family="tomorrow", case="small", verdict="not supported yet"),
        ]
    ).splitlines()
    assert re.split(r"\s{2,}", table[1]) == ["var/tiny", "3", "out.f", "0.250", "agrees"]
    assert table[2].endswith("FAILS")
    assert table[3].strip() == "no recipe for out.x"
    assert re.split(r"\s{2,}", table[4]) == ["var/small", "7", "-", "-", "agrees"]
    assert table[5:] == [f"tomorrow: not supported yet, 2 not checked; VARL has {', '.join(FAMILIES)}."]


# ---- released files


def released(config: NextScaleConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The two state dicts as the authors' code saves them."""
    torch.manual_seed(0)
    model, vq = NextScale(config), MultiScaleVQ(config.tokenizer, config.grids)
    hits = {"quantize.ema_vocab_hit_SV": torch.zeros(10, config.tokenizer.vocab)}
    return {**model.state_dict(), **implied_buffers(model)}, {**vq.state_dict(), **hits}


def other(config: NextScaleConfig = CONFIG, tokenizer: dict | None = None, **changes) -> NextScaleConfig:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    inner = {name: getattr(config.tokenizer, name) for name in config.tokenizer.__dataclass_fields__}
    return NextScaleConfig(**{**fields, "tokenizer": TokenizerConfig(**{**inner, **(tokenizer or {})}), **changes})


VARIANTS = {
    "plain": CONFIG,
    "shared adaln": other(shared_adaln=True),
    "no l2 norm": other(attn_l2_norm=False, width=128, heads=2),
    "mlp ratio": other(mlp_ratio=2.0),
    "first grid 2x2": other(grids=((2, 2), (3, 3))),
    "one phi": other(tokenizer={"shared_phi": 1}),
    "a phi per scale": other(tokenizer={"shared_phi": 0}),
    "two phis": other(tokenizer={"shared_phi": 2}),
    "deep tokenizer": other(tokenizer={"multipliers": (1, 1, 2), "blocks": 2}),
    "no attention": other(tokenizer={"attention": False}),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_sizes_are_read_off_the_weights(tmp_path, config):
    var, vae = released(config)
    torch.save(var, tmp_path / "var.pth")
    torch.save(vae, tmp_path / "vae.pth")
    model, vq = load_var(tmp_path / "var.pth", tmp_path / "vae.pth")
    assert model.config == config
    for module, state in ((model, var), (vq, vae)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert model.scale_of_token.tolist() == var["lvl_1L"][0].tolist()
    inputs = torch.randn(2, model.ends[-1] - model.ends[0], 4)
    condition = model.condition(torch.tensor([0, 3]))
    assert model.logits(model(condition, inputs), condition).isfinite().all()


def test_without_phis_their_share_is_zero():
    _, vae = released(other(tokenizer={"phi_ratio": 0.0}))
    assert tokenizer_config({name: tuple(t.shape) for name, t in vae.items()}, "vae").phi_ratio == 0.0


def test_a_training_run_and_safetensors(tmp_path):
    var, vae = released(CONFIG)
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": var, "vae_local": vae, "config": {"pg": 0.0}}}, tmp_path / "ar-ckpt.pth")
    save_file({name: t.contiguous() for name, t in var.items()}, tmp_path / "var.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    one, _ = load_var(tmp_path / "ar-ckpt.pth", tmp_path / "ar-ckpt.pth")
    two, _ = load_var(tmp_path / "var.safetensors", tmp_path / "vae.safetensors")
    strict_load(one, two.state_dict(), "the same")
    assert one.config == two.config == CONFIG


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda var, vae: var.pop("blocks.1.ffn.fc2.bias"), r"missing \(1\):\n +`blocks.1.ffn.fc2.bias`"),
        (lambda var, vae: var.update(extra=torch.zeros(1)), r"unexpected \(1\):\n +`extra`"),
        (lambda var, vae: var.update({"lvl_embed.weight": torch.zeros(4, 16)}), r"`lvl_embed.weight` \[4, 16\], the model has \[3, 16\]"),
        (lambda var, vae: var["blocks.0.attn.zero_k_bias"].add_(1e-3), "blocks.0.attn.zero_k_bias"),
        (lambda var, vae: var["attn_bias_for_masking"].zero_(), "attn_bias_for_masking"),
        (lambda var, vae: var["lvl_1L"].zero_(), "lvl_1L"),
        (lambda var, vae: var.pop("lvl_1L"), "lvl_1L"),
        (lambda var, vae: var.pop("attn_bias_for_masking"), "`attn_bias_for_masking` is missing"),
        (lambda var, vae: vae.pop("quantize.ema_vocab_hit_SV"), "ema_vocab_hit_SV` is missing"),
        (lambda var, vae: vae.pop("decoder.conv_in.bias"), "decoder.conv_in.bias"),
        (lambda var, vae: (var.clear(), var.update(vae)), "no weights of a VAR transformer.*\n  missing: `lvl_1L`"),
        (lambda var, vae: (vae.clear(), vae.update(var)), "no weights of a VAR tokenizer"),
        (lambda var, vae: var.clear(), "it holds: nothing"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, change, named):
    var, vae = released(CONFIG)
    change(var, vae)
    torch.save(var, tmp_path / "var.pth")
    torch.save(vae, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=named):
        load_var(tmp_path / "var.pth", tmp_path / "vae.pth")


def test_a_tokenizer_of_another_model(tmp_path):
    torch.save(released(CONFIG)[0], tmp_path / "var.pth")
    torch.save(released(other(tokenizer={"vocab": 32}))[1], tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"16 codes of 4 channels.*has 32 of 4"):
        load_var(tmp_path / "var.pth", tmp_path / "vae.pth")


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"code": print}, tmp_path / "code.pth")
    for name, why in [("none.pth", "cannot be read"), ("text.pth", "cannot be read"), ("list.pth", "no state dict"), ("code.pth", "")]:
        with pytest.raises(CheckpointError, match=f"{name}.*{why}"):
            load_var(tmp_path / name, tmp_path / name)
