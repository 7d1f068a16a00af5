"""Configs as YAML and back, changed from a command line, and compared. Strict: whatever cannot be understood is an error with its path."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from varl.config import (
    AestheticConfig,
    AncestralConfig,
    ClassifierConfig,
    ClassScoreConfig,
    CLIPScoreConfig,
    DINOConfig,
    FlowConfig,
    FolderConfig,
    GenEvalConfig,
    GlyphsConfig,
    GroundingDINOConfig,
    GRPOConfig,
    HPSConfig,
    HPSv3Config,
    ImageRewardConfig,
    InfinityConfig,
    MARConfig,
    MARGRPOConfig,
    ModelConfig,
    NextScaleConfig,
    NOVAConfig,
    OCRConfig,
    PickScoreConfig,
    PicturesConfig,
    PythonRewardConfig,
    RasterConfig,
    ReconstructionConfig,
    RewardConfig,
    RunConfig,
    ServedRewardConfig,
    SSIMConfig,
    VAPIConfig,
    VARRLConfig,
    VQAConfig,
    WeightedReward,
    WordsConfig,
)
from varl.errors import ConfigError

KINDS: dict[type, str] = {
    GRPOConfig: "grpo",
    VARRLConfig: "var_rl",
    WordsConfig: "words",
    FolderConfig: "folder",
    GlyphsConfig: "glyphs",
    PicturesConfig: "pictures",
    OCRConfig: "ocr",
    PythonRewardConfig: "python",
    VAPIConfig: "va_pi",
    MARGRPOConfig: "mar_grpo",
    ReconstructionConfig: "reconstruction",
    ClassScoreConfig: "class_score",
    CLIPScoreConfig: "clip_score",
    PickScoreConfig: "pick_score",
    HPSConfig: "hps",
    ImageRewardConfig: "image_reward",
    HPSv3Config: "hpsv3",
    AestheticConfig: "aesthetic",
    SSIMConfig: "ssim",
    DINOConfig: "dino",
    GenEvalConfig: "geneval",
    GroundingDINOConfig: "grounding_dino",
    VQAConfig: "vqa",
    ServedRewardConfig: "served",
    NextScaleConfig: "next_scale",
    InfinityConfig: "infinity",
    RasterConfig: "raster",
    MARConfig: "mar",
    NOVAConfig: "nova",
    AncestralConfig: "ancestral",
    FlowConfig: "flow",
    ClassifierConfig: "classifier",
}
"""What `kind:` says in YAML where a setting may be of several classes."""

Config = TypeVar("Config")


def to_yaml(config: object) -> str:
    """Every setting of `config`, defaults too, as YAML that `from_yaml` gives back exactly."""
    return _dump(_plain(config))


def from_yaml(text: str, cls: type[Config] = RunConfig) -> Config:
    """The config that `text` describes; what it leaves out has its default."""
    return _structure(_parse(text), cls, "")


def model_to_yaml(config: ModelConfig | ClassifierConfig) -> str:
    """`to_yaml` of a model folder, with the `kind` that says of which family it is."""
    return _dump(_plain(config, ModelConfig | ClassifierConfig))


def model_from_yaml(text: str) -> ModelConfig:
    """The config of a model folder; one without `kind` is a next-scale model's, as folders were first written."""
    config = _structure(_parse(text), ModelConfig | ClassifierConfig, "")
    if isinstance(config, ClassifierConfig):
        raise ConfigError("kind='classifier': names what a picture shows, and draws nothing. Give a model that draws.")
    return config


def classifier_from_yaml(text: str) -> ClassifierConfig:
    """The config of a classifier's folder."""
    config = _structure(_parse(text), ModelConfig | ClassifierConfig, "")
    if not isinstance(config, ClassifierConfig):
        raise ConfigError(f"kind={KINDS[type(config)]!r}: draws pictures, and names none. Give a classifier.")
    return config


def rewards_from_yaml(text: str) -> dict[str, RewardConfig]:
    """What a run's `rewards` may hold, by name. Weights are of no use where nothing is added up."""
    return {name: part.reward for name, part in _structure(_parse(text), dict[str, WeightedReward], "rewards").items()}


def reward_from_yaml(text: str) -> RewardConfig:
    """One reward's settings, with their `kind`."""
    return _structure(_parse(text), RewardConfig, "reward")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` after assignments such as "train.steps=10" or "algorithm.kind=var_rl", values read as YAML. Another kind starts from its own
    defaults; the assignments after it may change them."""
    tree = _plain(config)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not all(path.strip().split(".")):
            raise ConfigError(f"{assignment!r} is no assignment. Write path=value, for example train.steps=10.")
        *parents, key = path.strip().split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        new = _parse(value)
        if key == "kind" and node.get("kind") != new:
            node.clear()
        node[key] = new
    return _structure(tree, type(config), "")


def diff(a: object, b: object) -> list[str]:
    """One line "path: a -> b" for each setting that differs."""
    return _differences(_plain(a), _plain(b), "")


# ---- objects to plain values ------------------------------------------------------------------------------------------------------------


def _plain(value: Any, kind: Any = None) -> Any:
    """`value`, which is annotated as `kind`, in mappings, lists and scalars."""
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        fields = {field.name: _plain(getattr(value, field.name), hints[field.name]) for field in dataclasses.fields(value)}
        return {"kind": KINDS[type(value)], **fields} if len(_classes(kind)) > 1 else fields
    if isinstance(value, Mapping):
        return {name: _plain(part, get_args(kind)[1]) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _classes(kind: Any) -> list[Any]:
    """The members of a union, None left out; of anything else, none."""
    return [part for part in get_args(kind) if part is not types.NoneType] if get_origin(kind) in (Union, types.UnionType) else []


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b and type(a) is type(b) else [f"{path}: {_short(a)} -> {_short(b)}"]
    if a.get("kind") != b.get("kind"):
        return [f"{_join(path, 'kind')}: {a.get('kind')} -> {b.get('kind')}"]
    absent = "(not there)"
    return [line for name in {**a, **b} for line in _differences(a.get(name, absent), b.get(name, absent), _join(path, name))]


def _short(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


# ---- plain values to objects ------------------------------------------------------------------------------------------------------------


def _structure(value: Any, kind: Any, path: str) -> Any:
    """`value`, as YAML gave it, as the annotated type `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and types.NoneType in parts else _choose(value, _classes(kind), path)
    if origin is Literal:
        if value not in parts:
            raise ConfigError(f"{path}={value!r}: must be one of {', '.join(map(str, parts))}.{_nearest(value, parts)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(value, kind, path)
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(each) != len(value):
            raise _wrong(value, kind, path)
        return tuple(_structure(item, of, f"{path}[{i}]") for i, (item, of) in enumerate(zip(value, each, strict=True)))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _wrong(value, kind, path)
        return {name: _structure(item, parts[1], _join(path, name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build(value, kind, path)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _wrong(value, kind, path)
    return value


def _choose(value: Any, classes: list[Any], path: str) -> Any:
    """`value` as the one of `classes` that its `kind` names."""
    if len(classes) == 1:
        return _structure(value, classes[0], path)
    by_kind = {KINDS[member]: member for member in classes}
    if isinstance(value, dict) and NextScaleConfig in classes:  # the only models when configs were first written
        value = {"kind": KINDS[NextScaleConfig], **value}
    if not isinstance(value, dict) or "kind" not in value:
        raise ConfigError(f"{_join(path, 'kind')} is missing: say which one, {' or '.join(by_kind)}.")
    if value["kind"] not in by_kind:
        near = _nearest(value["kind"], by_kind)
        raise ConfigError(f"{_join(path, 'kind')}={value['kind']!r}: must be one of {', '.join(by_kind)}.{near}")
    return _build({name: item for name, item in value.items() if name != "kind"}, by_kind[value["kind"]], path)


def _build(value: Any, cls: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, cls, path)
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"unknown key `{_join(path, name)}`.{_nearest(name, fields)} Known: {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)} is missing, and has no default. Add it.")
    made = {name: _structure(item, hints[name], _join(path, name)) for name, item in value.items()}
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _wrong(value: Any, kind: Any, path: str) -> ConfigError:
    return ConfigError(f"{path or 'the config'}={value!r}: expected {_name(kind)}.")


def _name(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return f"a list, each item {_name(parts[0])}" if parts[-1] is Ellipsis else f"a list [{', '.join(map(_name, parts))}]"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"a mapping with the keys of {kind.__name__}"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}[get_origin(kind) or kind]


def _nearest(name: object, known: Iterable[object]) -> str:
    near = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.5)
    return f" Did you mean `{near[0]}`?" if near else ""


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


# ---- YAML -------------------------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Lists on one line, the rest as a block, everything in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"`{key}` is given twice in one mapping (line {node.start_mark.line + 1} and below). Keep one.")
        return super().construct_mapping(node, deep)


_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))
for part in (_Dumper, _Loader):  # 1e-5 is a number
    part.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _dump(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"this is not YAML: {' '.join(str(error).split())}") from None
