import dataclasses
import subprocess
import sys
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest

from varl import config as configs
from varl.config import (
    EvalConfig,
    FolderConfig,
    GRPOConfig,
    LawConfig,
    MiddleStep,
    NextScaleConfig,
    OCRConfig,
    OptimConfig,
    PretrainConfig,
    PythonRewardConfig,
    RunConfig,
    TextConfig,
    TokenizerConfig,
    TrainConfig,
    VARRLConfig,
    WeightedReward,
    WordsConfig,
)
from varl.errors import ConfigError
from varl.recipes import recipe
from varl.settings import KINDS, diff, from_yaml, override, to_yaml

READ = (configs.JanusConfig, configs.HarmonConfig)
"""Their settings are read off their own config.json and never written."""
CLASSES = [cls for cls in vars(configs).values() if dataclasses.is_dataclass(cls) and cls not in READ]

TINY = NextScaleConfig(
    depth=3,
    width=128,
    heads=4,
    grids=((1, 2), (2, 8), (4, 16)),
    mlp_ratio=3.5,
    shared_adaln=True,
    attn_l2_norm=False,
    text=TextConfig(alphabet="ABÄ #:'\"", styles=("no", "1e5", "null", "ink"), max_length=9, layers=0),
    tokenizer=TokenizerConfig(vocab=64, channels=4, width=8, multipliers=(1, 2, 2), phi_ratio=0.1, attention=False, patch=2),
)
OPTIM = OptimConfig(name="muon", lr=1e-5, muon_lr=1e22, betas=(0.1, 1 / 3), warmup_steps=7, schedule="linear", max_grad_norm=float("inf"))
EXAMPLES = [
    TINY,
    OPTIM,
    RunConfig(model="m"),
    RunConfig(
        name="two: words",
        model="bundled:words",
        data=FolderConfig(path="~/pictures"),
        rewards={
            "ocr": WeightedReward(reward=OCRConfig(engine="rapidocr", score="ned", workers=3, timeout=1.5), weight=-0.25),
            "my.own": WeightedReward(reward=PythonRewardConfig(target="a.py:f")),
        },
        algorithm=VARRLConfig(
            grpo=GRPOConfig(num_generations=4, epsilon_high=0.28, panw_alpha=0.7, mask="chained", region_credit=True),
            middle_step=MiddleStep(index=3),
            num_continuations=2,
            middle_return="log_mean_exp",
            eta=1e-3,
            tree_reuse=True,
        ),
        sample_law=LawConfig(cfg_scale=(1.0, 2.5, 4.0), temperature=0.9, top_k=2, top_p=0.95),
        train=TrainConfig(steps=3, optim=OPTIM, ema_decay=0.999, dtype="bfloat16", device="cpu"),
        eval=EvalConfig(every=5, samples=2),
        seed=2**40,
    ),
    PretrainConfig(model=TINY, data=WordsConfig(image_size=(32, 32), regions=(0.0, 0.2, 0.8)), optim=OPTIM, init="runs/x", drop_prompt=0.1),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: type(config).__name__)
def test_round_trip_is_exact(config):
    again = from_yaml(to_yaml(config), type(config))
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert diff(config, again) == []


def altered(value, kind):
    """Another value of the same kind than the default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        choices = [part for part in get_args(kind) if get_origin(kind) is Literal and part != value]
        return choices[0] if choices else value + "x"
    if isinstance(value, tuple):
        return (*value[:-1], altered(value[-1], None)) if value else ("x",)
    return value


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_of_every_class_survives(cls):
    """Each plain field in turn is moved off its default, wherever the class allows that."""
    base = next((c for c in EXAMPLES if type(c) is cls), None) or {MiddleStep: MiddleStep(index=1)}.get(cls) or cls(**needed(cls))
    moved = 0
    for field in dataclasses.fields(cls):
        try:
            changed = dataclasses.replace(base, **{field.name: altered(getattr(base, field.name), get_type_hints(cls)[field.name])})
        except ConfigError:
            continue
        assert from_yaml(to_yaml(changed), cls) == changed
        if changed != base:
            assert [line.split(":")[0].split(".")[0] for line in diff(base, changed)] == [field.name]
            moved += 1
    assert moved > 0


def needed(cls):
    if cls is configs.RasterConfig:
        return {"num_classes": 3}
    if cls is configs.ClassifierConfig:
        return {"num_classes": 3, "image_size": (16, 16)}
    if cls is configs.PixelLossConfig:
        return {"trains": "decoder"}
    if cls is configs.ClassScoreConfig:
        return {"classifier": "c"}
    if cls is configs.ServedRewardConfig:
        return {"url": "http://localhost:1"}
    if cls is configs.AestheticConfig:
        return {"head": "h"}
    if cls is configs.HPSv3Config:
        return {"template": "t"}
    return {"path": "p"} if cls in (FolderConfig, configs.PicturesConfig) else {"target": "a:b"} if cls is PythonRewardConfig else {}


def test_every_member_of_a_union_has_a_kind():
    hints = [hint for cls in CLASSES for hint in get_type_hints(cls).values() if get_origin(hint) in (Union, types.UnionType)]
    members = {
        part
        for hint in hints
        for part in get_args(hint)
        if dataclasses.is_dataclass(part) and len(set(get_args(hint)) - {types.NoneType}) > 1
    }
    unions = (configs.AlgorithmConfig, configs.DataConfig, configs.RewardConfig, configs.ModelConfig)
    members |= {part for union in unions for part in get_args(union)}
    assert members == KINDS.keys()
    assert len(set(KINDS.values())) == len(KINDS)


def test_what_is_left_out_has_its_default():
    assert from_yaml("model: m\nalgorithm: {kind: grpo, panw_alpha: 1}\n") == RunConfig(model="m", algorithm=GRPOConfig(panw_alpha=1.0))
    assert from_yaml("{}", TrainConfig) == TrainConfig()


def test_scientific_notation_needs_no_dot():
    assert from_yaml("lr: 1e-5\nmuon_lr: 2E3", OptimConfig) == OptimConfig(lr=1e-5, muon_lr=2000.0)


BASE = RunConfig(model="m", algorithm=VARRLConfig())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.stepz=10", "unknown key `train.stepz`. Did you mean `steps`? Known: steps, max_seconds, "),
        ("trian.steps=10", "unknown key `trian`. Did you mean `train`? Known: name, model, "),
        ("zzz=1", "unknown key `zzz`. Known: name, model, "),
        ("train.steps=ten", "train.steps='ten': expected a whole number."),
        ("train.steps=1.5", "train.steps=1.5: expected a whole number."),
        ("train.steps=true", "train.steps=True: expected a whole number."),
        ("train.steps=", "train.steps=None: expected a whole number."),
        ("train.steps.x=1", "train.steps={'x': 1}: expected a whole number."),
        ("train.max_seconds=true", "train.max_seconds=True: expected a number."),
        ("algorithm.tree_reuse=1", "algorithm.tree_reuse=1: expected true or false."),
        ("model=3", "model=3: expected a string."),
        ("train.optim.betas=[0.9]", "train.optim.betas=[0.9]: expected a list [a number, a number]."),
        ("score_law.cfg_scale=5", "score_law.cfg_scale=5: expected a list, each item a number."),
        ("score_law.cfg_scale=[1, a]", "score_law.cfg_scale[1]='a': expected a number."),
        ("rewards=[ocr]", "rewards=['ocr']: expected a mapping."),
        ("algorithm.middle_step=3", "algorithm.middle_step=3: expected a mapping with the keys of MiddleStep."),
        ("algorithm.kind=gpro", "algorithm.kind='gpro': must be one of grpo, var_rl, va_pi, mar_grpo. Did you mean `grpo`?"),
        ("algorithm={eta: 1}", "algorithm.kind is missing: say which one, grpo or var_rl or va_pi or mar_grpo."),
        ("algorithm.grpo.loss_type=dap", "algorithm.grpo.loss_type='dap': must be one of grpo, dr_grpo, dapo, bnpo. Did you mean `dapo`?"),
        ("algorithm.grpo.num_generations=1", "algorithm.grpo: grpo.num_generations=1: a group of one is its own baseline"),
        ("algorithm.eta=0", "algorithm: var_rl.eta=0.0: the soft value's temperature must be above 0."),
        ("data.kind=folder", "data.path is missing, and has no default. Add it."),
        ("rewards.mine.reward.kind=python", "rewards.mine.reward.target is missing"),
        ("train.steps", "'train.steps' is no assignment. Write path=value, for example train.steps=10."),
        ("train..steps=1", "'train..steps=1' is no assignment."),
        ("model=[a", "this is not YAML: "),
        ("train={steps: 1, steps: 2}", "`steps` is given twice in one mapping (line 1 and below). Keep one."),
    ],
)
def test_errors_name_path_value_and_fix(assignment, message):
    with pytest.raises(ConfigError) as caught:
        override(BASE, [assignment])
    assert str(caught.value).startswith(message)


def test_a_missing_setting_and_a_text_that_is_no_mapping():
    with pytest.raises(ConfigError, match="model is missing, and has no default"):
        from_yaml("name: x")
    with pytest.raises(ConfigError, match="the config=None: expected a mapping with the keys of RunConfig"):
        from_yaml("")


def test_override():
    got = override(
        BASE,
        ["train.steps=10", "algorithm.grpo.panw_alpha=0.7", "rewards.ocr.weight=2", "train.optim.betas=[0.5, 0.6]", " seed = 3"],
    )
    assert got == dataclasses.replace(
        BASE,
        train=TrainConfig(steps=10, optim=OptimConfig(betas=(0.5, 0.6))),
        algorithm=VARRLConfig(grpo=GRPOConfig(panw_alpha=0.7)),
        rewards={"ocr": WeightedReward(weight=2.0)},
        seed=3,
    )
    assert override(BASE, []) == BASE


def test_another_kind_starts_from_its_own_defaults():
    assert override(BASE, ["algorithm.kind=grpo", "algorithm.beta=0.1"]).algorithm == GRPOConfig(beta=0.1)
    assert override(BASE, ["data.kind=folder", "data.path=x"]).data == FolderConfig(path="x")
    assert override(BASE, ["algorithm.eta=2", "algorithm.kind=var_rl"]).algorithm == VARRLConfig(eta=2.0)
    mine = override(BASE, ["rewards.mine.reward={kind: python, target: a.py:f}", "rewards.mine.weight=3"]).rewards
    assert mine == {"ocr": WeightedReward(), "mine": WeightedReward(reward=PythonRewardConfig(target="a.py:f"), weight=3.0)}


def test_a_part_that_is_absent_can_be_switched_on():
    model = override(TINY, ["text=null", "num_classes=10"])
    assert (model.text, model.num_classes) == (None, 10)
    assert override(model, ["text.layers=2", "num_classes=null"]).text == TextConfig(layers=2)


def test_diff_by_hand():
    other = override(BASE, ["train.optim.lr=1e-5", "data={kind: folder, path: x}", "score_law.cfg_scale=[1.0, 2.0]", "rewards={}"])
    assert diff(BASE, other) == [
        "data.kind: words -> folder",
        "rewards.ocr: {reward: {engine: auto, kind: ocr, letters: ABCDEFGHIJKLMNOPQRSTUVWXYZ, score: mixed, timeout: 20.0, "
        "workers: 1}, weight: 1.0} -> (not there)",
        "score_law.cfg_scale: [1.0] -> [1.0, 2.0]",
        "train.optim.lr: 0.0001 -> 1.0e-05",
    ]


def test_settings_come_without_torch():
    code = "import sys, varl.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.steps=0", "train.steps=0: must be 1 or more"),
        ("train.save_every=0", "train.save_every=0: must be 1 or more"),
        ("train.prompts_per_step=-1", "train.prompts_per_step=-1: must be 1 or more"),
        ("train.image_every=-1", "train.image_every=-1: must be 0 \\(none\\) or more"),
        ("train.ema_decay=1", "train.ema_decay=1.0: must be at least 0"),
        ("rewards.ocr.weight=.nan", "rewards.ocr: weight=nan: must be finite"),
        ("rewards.ocr.reward.workers=-1", "ocr.workers=-1: must be 1 or more, or 0 to read in this process"),
        ("rewards.ocr.reward.timeout=0", "ocr.timeout=0.0: must be above 0 and finite"),
        ("rewards.ocr.reward.letters=''", "ocr.letters='': the reader answers with these letters and no others"),
        ("train.max_failed_rewards=2", "train.max_failed_rewards=2.0: must be a share, 0 to 1"),
        ("train.optim.lr=-1", "optim.lr=-1.0: must be 0 or more"),
        ("train.optim.max_grad_norm=0", "optim.max_grad_norm=0.0: must be above 0"),
        ("eval.samples=0", "eval.samples=0: must be 1 or more"),
    ],
)
def test_numbers_out_of_range(setting, said):
    with pytest.raises(ConfigError, match=said):
        override(recipe("var_rl/words_cpu"), [setting])


def test_a_filtered_reference_has_no_kl():
    filtered = override(recipe("var_rl/words_cpu"), ["score_law.top_k=8"])
    with pytest.raises(ConfigError, match=r"score_law\.top_k=8, top_p=1\.0 with grpo\.beta=0\.1: the KL .* is infinite"):
        override(filtered, ["algorithm.grpo.beta=0.1"])
