"""The command line. torch is imported by the commands that need it, so that `varl --help` answers at once."""

import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from varl.config import LawConfig, PretrainConfig, RewardConfig, RunConfig, UnmaskingConfig
from varl.errors import ConfigError, VarlError
from varl.recipes import describe, recipe
from varl.settings import from_yaml, override, reward_from_yaml, rewards_from_yaml

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for visual autoregressive image generators.",
)
evaluation = typer.Typer(no_args_is_help=True, help="Can the words be read? Are the pictures like real ones? With 95% intervals.")
app.add_typer(evaluation, name="eval")
out_console, err_console = Console(), Console(stderr=True)

Config = TypeVar("Config", RunConfig, PretrainConfig)
FAILED, REFUSED = 1, 2
"""Exit status: a check that failed; something that cannot be done as asked."""
SAMPLES = 50_000
"""Pictures that FID is measured on where papers report it."""
LINE_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal for a bar."""


def recipes_help(*kinds: type) -> str:
    """The recipes of these kinds, each with its description."""
    return "Recipes:\n\n" + "\n\n".join(f"{name}  {line}" for name, line in describe().items() if isinstance(recipe(name), kinds))


Target = Annotated[
    str, typer.Argument(metavar="RECIPE|CONFIG.YAML", help="A recipe's name, or a YAML file like a run directory's config.yaml.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. train.steps=10. May be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/NAME if not given.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only what came out.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Of a masked model: in how many steps its tokens are settled; 64 if not given.")]
DenoiseSteps = Annotated[
    int | None, typer.Option("--denoise-steps", help="Of a masked model: in how many steps each token is made of noise; 100 if not given.")
]
Seed = Annotated[int, typer.Option(help="The same seed draws the same pictures.")]
Guidance = Annotated[
    str, typer.Option(help="Guidance: a number, or one for each scale or token, with commas; 1 is none, var:4 the ramp of VAR's sampler.")
]
Temperature = Annotated[float, typer.Option(help="Below 1 what is likely is drawn more often, above 1 less often.")]
TopK = Annotated[int, typer.Option(help="Each token is one of so many of the likeliest; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Each token is one of the likeliest that have this probability together; 1 is all.")]
Precision = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the transformer; the tokenizer works in float32.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends in SystemExit: 0, 1 for a failed check, 2 for what cannot be done as asked, with its reason on stderr."""
    try:
        app(args=arguments)
    except VarlError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(REFUSED)


# ---- what is asked ----------------------------------------------------------------------------------------------------------------------


def load(target: str, assignments: Sequence[str]) -> RunConfig | PretrainConfig:
    """The config of a recipe or of a YAML file, with its assignments. A file whose `model` is a mapping describes a pre-training."""
    if Path(target).suffix not in (".yaml", ".yml"):
        return override(recipe(target), assignments)
    if not Path(target).is_file():
        raise ConfigError(f"there is no file {target}. Give a YAML file, or the name of a recipe: {', '.join(describe())}.")
    try:
        text = Path(target).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{target}: is not UTF-8 ({error}). Save it as UTF-8.") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None  # from_yaml says what is wrong with it
    fresh = isinstance(tree, dict) and isinstance(tree.get("model"), dict)
    return override(from_yaml(text, PretrainConfig if fresh else RunConfig), assignments)


def load_as(target: str, assignments: Sequence[str] | None, cls: type[Config], other: str) -> Config:
    config = load(target, assignments or ())
    if not isinstance(config, cls):
        raise ConfigError(f"{target} is for `varl {other}`: it holds a {type(config).__name__}, and this command needs a {cls.__name__}.")
    return config


def run_folder(out: Path | None, name: str, *marks: str) -> Path:
    """Where the run shall lie: a folder that is new or empty, or a run's, of which it may hold no more than `marks` yet."""
    folder = out or Path("runs") / name
    if folder.is_file():
        raise ConfigError(f"--out {folder}: is a file. Give a folder, new or of a run to go on.")
    demand_place(folder, folder)
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if {"config.yaml", "manifest.json"} <= there:
        raise ConfigError(f"--out {folder}: is a model folder. Give a folder of its own to the run.")
    if "config.yaml" in there:
        try:
            load(str(folder / "config.yaml"), ())
        except ConfigError as error:
            raise ConfigError(f"--out {folder}: its config.yaml is not a run's. Give a new folder, or mend it: {error}") from error
    elif there - {"lock"} and there.isdisjoint({"command.txt", "probe.json", *marks}):
        raise ConfigError(f"--out {folder}: is not empty and not a run. Give a new folder, or that of a run to go on.")
    return folder


def demand_file(out: Path) -> None:
    """Whether a file can be written there, or replaced."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder. Give the name of a file, for example {out / 'out'}.")
    if out.exists() and not os.access(out, os.W_OK):
        raise ConfigError(f"--out {out}: this file cannot be written. Give another.")
    demand_place(out.parent, out)


def demand_place(folder: Path, out: Path) -> None:
    """Whether `folder` is there or can be made, and takes files; `out` is what was asked for."""
    from varl.doctor import writable

    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file, so nothing can lie in it. Give a place in a folder.")
    finding = writable(folder)
    if finding.verdict != "ok":
        raise ConfigError(f"--out {out}: {finding.text}. Give a folder of yours.")


def demand_processes(processes: int, config: RunConfig) -> None:
    """Whether so many can share a step."""
    prompts, started = config.train.prompts_per_step, int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 1:
        raise ConfigError(f"--processes {processes}: the first process is the run itself. Give 1 or more.")
    if processes > prompts:
        raise ConfigError(
            f"--processes {processes}: they share train.prompts_per_step={prompts}, and a process without a prompt has nothing to do. "
            f"Give {prompts} or fewer, or set more prompts."
        )
    if processes > 1 and started > 1:
        raise ConfigError(f"--processes {processes}: torchrun has started {started} already. Leave --processes out.")


def command_line(verb: str, target: str, assignments: Sequence[str] | None, out: Path, extra: Sequence[str] = ()) -> str:
    """The command that makes the same run again, quoted for a shell; under torchrun with as many processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["varl"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "varl.cli"]
    changed = [part for assignment in assignments or () for part in ("--set", assignment)]
    return shlex.join([*start, verb, target, *changed, "--out", str(out), *extra])


def refuse(problems: Sequence[str]) -> None:
    """All that stands in the way, at once."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} things stand in the way:" + "".join(f"\n- {problem}" for problem in problems))


def rewards_of(asked: Sequence[str]) -> dict[str, RewardConfig]:
    """Rewards by name, each asked for as KIND, as NAME=KIND, as NAME={kind: KIND, ...}, or as a YAML file like a run's `rewards`."""
    found: dict[str, RewardConfig] = {}
    for text in asked:
        name, equals, settings = text.partition("=")
        if Path(text).suffix in (".yaml", ".yml"):
            if not Path(text).is_file():
                raise ConfigError(f"--reward {text}: there is no such file. Give a YAML file like the `rewards` of a run, or KIND.")
            more = rewards_from_yaml(Path(text).read_text(encoding="utf-8"))
        else:
            settings = settings if equals else name
            more = {name: reward_from_yaml(settings if settings.lstrip().startswith("{") else f"kind: {settings}")}
        if twice := found.keys() & more.keys():
            raise ConfigError(f"--reward {text}: the name {min(twice)} is taken. Write OTHER=... to call it otherwise.")
        found |= more
    return found


def shard_of(text: str | None) -> tuple[int, int]:
    """Which of how many processes this is: as --shard says, or torchrun; from 0."""
    rank, size = (int(os.environ.get(name, other)) for name, other in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if text is None:
        return rank, size
    if size > 1:
        raise ConfigError(f"--shard {text}: torchrun has started {size} processes, which share the prompts already. Leave --shard out.")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text!r}: must be I/N with I from 0 to N - 1, for example 0/4.")
    return int(index), int(count)


def numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r}: must be numbers with commas between them, for example 1.0,0.8.") from None


# ---- progress ---------------------------------------------------------------------------------------------------------------------------


class Bar:
    """One live line: step of total, what was measured, ETA. Without a terminal, a plain line now and then; without `shown`, nothing."""

    def __init__(self, total: int | None, says: Callable[[Mapping[str, Any]], str], *, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        says_column = TextColumn("{task.fields[says]}", table_column=Column(ratio=1, no_wrap=True))  # what is too long is cut here alone
        self.progress = Progress(*columns, says_column, console=err_console, expand=True, disable=not shown)
        self.total, self.says, self.shown, self.task, self.phase, self.last = total, says, shown, None, "", 0.0

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def counter(self, phase: str, total: int) -> Callable[[int], None]:
        """A tick that is told how many more of `total` are done."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.tick({"phase": phase, "step": done, "total": total})

        return count

    def tick(self, metrics: Mapping[str, Any]) -> None:
        step, says = int(metrics["step"]), self.says(metrics)
        phase, total = str(metrics.get("phase", "step")), metrics.get("total", self.total)
        if self.task is None or phase != self.phase:  # a resumed run starts in the middle, which must not look like speed
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.phase, self.task = phase, self.progress.add_task(phase, total=total, completed=step, says=says)
        self.progress.update(self.task, total=total, completed=step, says=says)
        if self.shown and not err_console.is_terminal and time.monotonic() - self.last > LINE_EVERY:
            self.last = time.monotonic()
            typer.echo(f"{phase} {step}{f'/{total}' if total else ''}  {says}", err=True)


def training_line(metrics: Mapping[str, Any]) -> str:
    """reward, words read, pictures a second, and where the step's time went."""
    parts = [f"reward {metrics['reward']:.3f}"] if isinstance(metrics.get("reward"), float) else []
    read = [value for name, value in metrics.items() if name.startswith("rewards/") and name.endswith("word_accuracy/mean")]
    parts += [f"words {read[0]:.0%}"] if read else []
    parts += [f"{metrics['images_per_second']:.1f} images/s"] if "images_per_second" in metrics else []
    total = metrics.get("seconds/total")
    if total:
        phases = {"rollout": "rollout", "decode": "decode", "reward_wait": "reward", "train": "train"}
        parts.append(" ".join(f"{said} {metrics.get(f'seconds/{name}', 0.0) / total:.0%}" for name, said in phases.items()))
    return "  ".join(parts)


def measured_line(metrics: Mapping[str, Any]) -> str:
    """Every number of the step, by its last name."""
    metrics = {name: value for name, value in metrics.items() if name not in ("step", "total")}
    found = {name.rpartition("/")[2]: value for name, value in metrics.items() if isinstance(value, int | float)}
    return "  ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}" for name, value in found.items())


def first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def speak(quiet: bool) -> None:
    """What the library logs goes to stderr, above the bar."""
    logger = logging.getLogger("varl")
    logger.handlers[:] = [RichHandler(console=err_console, show_time=False, show_level=False, show_path=False)]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


# ---- commands ---------------------------------------------------------------------------------------------------------------------------


@app.command(epilog=recipes_help(RunConfig))
def train(
    target: Target,
    assignments: Set = None,
    out: Out = None,
    quiet: Quiet = False,
    probe: Annotated[Path | None, typer.Option("--probe", help="A probe.json to hold the settings against.")] = None,
    processes: Annotated[
        int,
        typer.Option(
            help="Processes of this machine that share each step's prompts and the machine's threads. They need no torchrun, which is for "
            "several machines; one of the two, not both."
        ),
    ] = 1,
) -> None:
    """Post-train a model. Goes on where it stopped if the run directory exists; Ctrl-C saves and stops."""
    config = load_as(target, assignments, RunConfig, "pretrain")
    quiet = quiet or not first_process()
    speak(quiet)
    demand_processes(processes, config)
    folder = run_folder(out, config.name)
    from varl.plan import plan

    refuse(plan(config, calibrate=False).problems)
    warn_against_probes(config, folder, probe)
    from varl.run import train as run

    extra = [*(["--probe", str(probe)] if probe else []), *(["--processes", str(processes)] if processes > 1 else [])]
    command = command_line("train", target, assignments, folder, extra)
    with Bar(config.train.steps, training_line, shown=not quiet) as bar:

        def tick(metrics: Mapping[str, Any]) -> None:
            if bar.task is None and first_process():  # by now the directory is known to be this run's
                (folder / "command.txt").write_text(f"{command}\n")
            bar.tick(metrics)

        outcome = run(config, folder, tick, processes=processes)
    if not first_process():
        return
    typer.echo(f"{outcome.reason}; {outcome.progress.step} steps, {outcome.progress.reward_calls} pictures judged")
    typer.echo(f"model   {outcome.model}")
    typer.echo(f"report  {make_report(folder)}")
    if not outcome.done:
        typer.echo(f"To go on: {command}")


def warn_against_probes(config: RunConfig, folder: Path, given: Path | None) -> None:
    """What a probe of the same model, given or beside the run, has found against the settings."""
    from varl.build import model_path
    from varl.probe import contradictions, model_identity

    if given is not None and not given.is_file():
        raise ConfigError(f"--probe {given}: there is no such file. Make one with `varl probe`.")
    if given is not None and read_probe(given)["model"] != model_identity(model_path(config.model)):
        raise ConfigError(f"--probe {given}: is of another model than model={config.model!r}. Probe this one, or leave --probe out.")
    files = (
        [given] if given else sorted({*folder.glob("probe.json"), *folder.parent.glob("probe.json"), *folder.parent.glob("*/probe.json")})
    )
    for file in files:
        for line in contradictions(config, read_probe(file)) if first_process() else ():
            typer.echo(f"warning: {line} ({file})", err=True)


def read_probe(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"model", "recommend"} <= found.keys():
        raise ConfigError(f"{file}: is not what `varl probe` writes. Remove it, or probe again.")
    return found


def make_report(folder: Path) -> Path:
    from varl.report import write_report
    from varl.train.record import METRICS

    return write_report(folder, definitions=METRICS)


@app.command(epilog=recipes_help(PretrainConfig))
def pretrain(target: Target, assignments: Set = None, out: Out = None, quiet: Quiet = False) -> None:
    """Train a base model from scratch: tokenizer, then transformer; or a classifier. Goes on where it stopped."""
    config = load_as(target, assignments, PretrainConfig, "train")
    speak(quiet)
    from varl.build import caption_encoder
    from varl.plan import device_of, plan

    folder = run_folder(out, config.name)
    refuse(plan(config, calibrate=False).problems)
    from varl.pretrain.run import pretrain as run

    captions = None if config.captions is None else caption_encoder(config.captions, device_of(config.device))
    command = command_line("pretrain", target, assignments, folder)
    with Bar(config.total_steps, measured_line, shown=not quiet) as bar:

        def tick(metrics: Mapping[str, Any]) -> None:
            if bar.task is None:
                (folder / "command.txt").write_text(f"{command}\n")
            bar.tick(metrics)

        typer.echo(f"model   {run(config, folder, tick, captions)}")


def unmasking_of(steps: int | None, denoise_steps: int | None) -> UnmaskingConfig | None:
    """What the two options ask for; None where they are not given."""
    asked = {name: value for name, value in (("steps", steps), ("denoise_steps", denoise_steps)) if value is not None}
    return UnmaskingConfig(**asked) if asked else None


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a run directory, or bundled:words.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text; | separates regions. May be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option("--label", help="Class, for a model of classes. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A folder with prompts.jsonl.")] = None,
    style: Annotated[str, typer.Option("--style", help="Attributes for every --prompt, e.g. mono,indigo.")] = "",
    copies: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 16,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    cfg: Guidance = "1.0",
    smooth: Annotated[bool, typer.Option("--more-smooth", help="Mixtures of codes, as VAR's sampler has them for show.")] = False,
    steps: Steps = None,
    denoise_steps: DenoiseSteps = None,
) -> None:
    """Draw pictures into one PNG."""
    if not (prompt or label or prompts):
        raise ConfigError("nothing to draw: give --prompt, --label or --prompts.")
    demand_file(out)
    from varl.data.folder import read_folder
    from varl.sample import draw_grid, find_model, guidance_of, load_policy, text_prompt
    from varl.types import Prompt

    asked = [text_prompt(text, [name for name in style.split(",") if name]) for text in prompt or ()]
    asked += [Prompt(label=number) for number in label or ()] + (read_folder(prompts) if prompts else [])
    path = find_model(model)
    law = LawConfig(cfg_scale=guidance_of(cfg, path), temperature=temperature, top_k=top_k, top_p=top_p)
    draw_grid(load_policy(path, law, unmasking=unmasking_of(steps, denoise_steps)), asked, copies, seed, out, smooth=smooth)
    typer.echo(str(out))


@evaluation.command("words")
def eval_words(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, whose held-out prompts are used, or a model folder.")
    ],
    samples: Annotated[int, typer.Option(min=2, help="Held-out prompts; two pictures of each.")] = 128,
    temperatures: Annotated[str, typer.Option(help="With commas.")] = "1.0",
    judges: Annotated[str, typer.Option(help="tesseract, rapidocr or auto, with commas.")] = "auto",
    seed: Seed = 1234,
    out: Annotated[Path | None, typer.Option("--out", help="The JSON; RUN/eval.json or eval.json here if not given.")] = None,
) -> None:
    """Can the words be read? A row for each temperature and judge, with 95% intervals."""
    levels, readers = numbers(temperatures, "--temperatures"), [name.strip() for name in judges.split(",")]
    if not all(0 < level < math.inf for level in levels):
        raise ConfigError(f"--temperatures {temperatures!r}: each must be above 0 and finite, for example 1.0,0.8.")
    if "" in readers:
        raise ConfigError(f"--judges {judges!r}: a name is missing beside a comma. Use tesseract, rapidocr or auto.")
    unknown = [name for name in readers if name not in ("auto", "tesseract", "rapidocr")]
    if unknown:
        raise ConfigError(f"--judges {judges!r}: unknown {', '.join(unknown)}. Use tesseract, rapidocr or auto.")
    from varl.build import build_prompts
    from varl.sample import config_of, find_model, load_policy, words_of
    from varl.sample import evaluate as measure

    path = find_model(target)
    run = path.parent if path == Path(target) / "model" else None
    file = out or (run or Path()) / "eval.json"
    demand_file(file)
    data = load(str(run / "config.yaml"), ()).data if run else words_of(config_of(path))
    heldout = build_prompts(data, 0, samples).heldout
    if not heldout:
        raise ConfigError(
            f"{target}: has no held-out prompts, because data.heldout was not set. Evaluate its model on drawn words instead, with "
            f"`varl eval words {path}`, or look at it with `varl sample`."
        )
    if not any(prompt.words for prompt in heldout):
        raise ConfigError(
            f"{target}: its held-out prompts hold no words to be read. Hold its pictures against real ones with `varl eval fid`."
        )
    policy = load_policy(path)
    rows = measure(policy, heldout, temperatures=levels, judges=readers, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"model": str(path), "prompts": len(heldout), "seed": seed, "rows": rows}, indent=2))
    table = Table("temperature", "judge", "word accuracy", "similarity", "failed", "diversity")
    for row in rows:
        accuracy, ned = (f"{row[name]:.3f} ± {row[f'{name}_ci95']:.3f}" for name in ("word_accuracy", "ned"))
        table.add_row(f"{row['temperature']:g}", row["judge"], accuracy, ned, f"{row['failed']:.1%}", f"{row['token_diversity']:.2f}")
    out_console.print(table)
    typer.echo(str(file))


@evaluation.command("fid")
def eval_fid(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PICTURES|MODEL|RUN", help="A folder of pictures, an npz file of them, or a model or run directory, which then draws."
        ),
    ],
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="Real pictures, likewise, or an evaluator's npz file with their statistics.")
    ],
    inception: Annotated[
        Path | None, typer.Option(help="Weights of the Inception net that FID is measured with; those in torch's cache if not given.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="CLASSIFIER|MODULE:NAME", help="Another network to judge by: a classifier's folder, or a function of yours."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures that a model draws.")] = SAMPLES,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once; at most 1000 are drawn at once.")] = 64,
    seed: Seed = 1234,
    cfg: Guidance = "1.0",
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    steps: Steps = None,
    denoise_steps: DenoiseSteps = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels to a side that drawn pictures are brought to; their own if not given.")
    ] = None,
    dtype: Precision = "float32",
    prompts: Annotated[
        Path | None, typer.Option(help="A folder with prompts.jsonl, to draw these at random; the model's classes if not given.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A folder that keeps features, so that the reference is looked at once.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The JSON; RUN/fid.json or fid.json here if not given.")] = None,
    quiet: Quiet = False,
) -> None:
    """FID, Inception score, precision, recall and KID. Drawn pictures lie beside the JSON; the same command goes on where it stopped."""
    unmasking = unmasking_of(steps, denoise_steps)
    from varl.eval.features import open_pictures
    from varl.eval.fid import compare_sets, demand_comparable, reference_pictures
    from varl.sample import draw_many, guidance_of, load_extractor, model_at, plan_drawing

    model = model_at(target)
    law = LawConfig(cfg_scale=guidance_of(cfg, model), temperature=temperature, top_k=top_k, top_p=top_p)
    run = Path(target) if model == Path(target) / "model" else None
    file = out or (run or Path()) / "fid.json"
    demand_file(file)
    real = reference_pictures(reference)
    if model is None:
        plain = (SAMPLES, LawConfig(), None, None, "float32", None)
        demand_pictures(target, drawn_otherwise=(samples, law, unmasking, size, dtype, prompts) != plain)
        drawing, shown = None, open_pictures(target)
        demand_comparable(target, shown.count, shown.size, real)
    else:
        drawing = plan_drawing(model, law, unmasking, count=samples, seed=seed, side=size, dtype=dtype, prompts=prompts)
        demand_comparable(target, samples, drawing.size, real)
    extractor = load_extractor(features, inception)
    with Bar(None, measured_line, shown=not quiet) as bar:
        pictures = Path(target)
        if drawing is not None:
            pictures = draw_many(drawing, file.with_name(f"{file.stem}-pictures"), batch, bar.counter("pictures", samples))
        count = bar.counter("features", open_pictures(pictures).count + (real.count if real else 0))
        found = compare_sets(pictures, reference, extractor, seed, batch=batch, cache=cache, tick=count)
    told = {"pictures": str(pictures), "reference": str(reference), "features": features or "inception", "seed": seed}
    drawn = {} if drawing is None else {"model": str(model), "size": drawing.size, "dtype": dtype, **dataclasses.asdict(law)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**told, **drawn, "rows": [found]}, indent=2))
    table = Table("measure", "value")
    for name, value in found.items():
        half = found.get(f"{name}_ci95")
        if not name.endswith("_ci95"):
            table.add_row(name, f"{value:,.4g}" if half is None else with_interval(value, half))
    out_console.print(table)
    typer.echo(str(file))


def demand_pictures(target: str, *, drawn_otherwise: bool) -> None:
    """Whether `target`, which is no model, can be pictures; nothing may have been said of how they are to be drawn."""
    if not Path(target).is_dir() and Path(target).suffix != ".npz":
        raise ConfigError(f"{target}: is neither a model folder nor a run directory, nor a folder or an npz file of pictures.")
    if drawn_otherwise:
        raise ConfigError(
            f"{target}: is no model but pictures, which are there already. Leave out what says how a model draws: --samples, --cfg, "
            "--temperature, --top-k, --top-p, --steps, --denoise-steps, --size, --dtype and --prompts."
        )


def benchmark_command(command: str, summary: str) -> None:
    """`varl eval COMMAND`: draws a benchmark's pictures and, where judges are named, scores them."""

    def run(
        target: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A model folder that reads text, or a run directory.")],
        prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="The benchmark's file or folder, as its authors publish it.")],
        reward: Annotated[
            list[str] | None,
            typer.Option(
                metavar="KIND|NAME={...}|FILE.yaml",
                help="Who judges: clip_score, hps={kind: hps, batch: 8}, or a file like a run's `rewards`. May be repeated.",
            ),
        ] = None,
        samples: Annotated[int | None, typer.Option(min=1, max=1000, help="Pictures of each prompt; as many as its authors draw.")] = None,
        shard: Annotated[str | None, typer.Option(metavar="I/N", help="Draw every Nth prompt, from I on; not under torchrun.")] = None,
        batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 64,
        seed: Seed = 1234,
        cfg: Guidance = "1.0",
        temperature: Temperature = 1.0,
        top_k: TopK = 0,
        top_p: TopP = 1.0,
        steps: Steps = None,
        denoise_steps: DenoiseSteps = None,
        dtype: Precision = "float32",
        out: Annotated[
            Path | None, typer.Option("--out", help="Folder of the pictures and numbers; RUN/COMMAND or ./COMMAND if not given.")
        ] = None,
        quiet: Quiet = False,
    ) -> None:
        rewards, (index, count) = rewards_of(reward or ()), shard_of(shard)
        quiet = quiet or not first_process()
        from varl.eval.benchmarks.gallery import PICTURES, Shard
        from varl.sample import await_pictures, draw_exhibition, find_model, guidance_of, plan_exhibition, score_exhibition

        model = find_model(target)
        law = LawConfig(cfg_scale=guidance_of(cfg, model), temperature=temperature, top_k=top_k, top_p=top_p)
        folder = out or (Path(target) if model == Path(target) / "model" else Path()) / command
        demand_place(folder, folder)
        asked = {"samples": samples, "seed": seed, "dtype": dtype, "rewards": rewards}
        shown = plan_exhibition(command, prompts, model, folder, law, unmasking_of(steps, denoise_steps), **asked)
        gallery = shown.gallery
        with Bar(None, measured_line, shown=not quiet) as bar:
            mine = Shard(index=index, count=count)
            draw_exhibition(shown, batch, mine, bar.counter("pictures", len(mine.of(gallery.items)) * gallery.samples))
            if not first_process():
                return
            if shard is None:
                await_pictures(gallery)
            left = sum(len(gallery.missing(i)) for i in range(len(gallery.items)))
            rows = []
            if rewards and not left:
                rows = score_exhibition(shown, batch, bar.counter("judged", len(gallery.items) * gallery.samples))
        typer.echo(f"pictures {folder / PICTURES}")
        if left:
            typer.echo(f"{left} pictures are left to the other shards. When they are there, the same command without --shard goes on.")
            return
        typer.echo(f"scorer   {gallery.benchmark.official.format(pictures=folder / PICTURES, samples=gallery.samples)}")
        if rows:
            file = folder / "scores.json"
            told = {"benchmark": command, "model": str(model), "prompts": str(prompts), "seed": seed, **dataclasses.asdict(law)}
            file.write_text(json.dumps({**told, "rows": rows}, indent=2))
            out_console.print(benchmark_table(rows))
            typer.echo(str(file))

    evaluation.command(command, help=f"{summary} Draws, goes on where it stopped, and scores where a reward is named.")(run)


def with_interval(value: float, half: float) -> str:
    """A number and the half-width of its interval, where there is one: not of a single prompt."""
    return f"{value:.4g}" if math.isnan(half) else f"{value:.4g} ± {half:.2g}"


def benchmark_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each category, a column for each measure."""
    measures = list(dict.fromkeys(name.removesuffix("_ci95") for row in rows for name in row if name.endswith("_ci95")))
    table = Table("category", "pictures", *measures)
    for row in rows:
        cells = [with_interval(row[name], row[f"{name}_ci95"]) if name in row else "" for name in measures]
        table.add_row(row["category"], str(row.get("pictures", "")), *cells)
    return table


for name, summary in {
    "geneval": "GenEval: objects, how many, of which colour, where.",
    "dpg": "DPG-Bench: long prompts, by a tree of questions.",
    "t2i-compbench": "T2I-CompBench: attributes, places, numbers, relations.",
    "hpsv3": "HPSv3's benchmark: what people prefer, by category.",
    "cvtg": "CVTG-2K: two to five texts in a picture.",
    "drawbench": "DrawBench: prompts of 11 kinds, to be looked at.",
}.items():
    benchmark_command(name, summary)


@app.command()
def report(run: Path) -> None:
    """One self-contained HTML page about a run."""
    typer.echo(str(make_report(run)))


@app.command()
def compare(runs: list[Path]) -> None:
    """Runs side by side: what came out, what was set differently, and whether the comparison is fair."""
    from varl.report import compare as page
    from varl.report import compare_text

    typer.echo(compare_text(runs), nl=False)
    typer.echo(str(page(runs)))


@app.command("plan", epilog=recipes_help(RunConfig, PretrainConfig))
def show_plan(target: Target, assignments: Set = None) -> None:
    """What a run will cost and what is missing, before any weight is loaded. Exit status 2 if something is."""
    config = load(target, assignments or ())
    from varl.plan import format_plan, plan

    found = plan(config)
    typer.echo(format_plan(found))
    if found.problems:
        raise typer.Exit(REFUSED)


@app.command("reward-check", epilog=recipes_help(RunConfig))
def reward_check(
    target: Target,
    pictures: Annotated[
        Path, typer.Option("--pictures", help="Real pictures with what they show: a folder for each class, or with prompts.jsonl.")
    ],
    assignments: Set = None,
    most: Annotated[int, typer.Option(min=1, help="How many of them.")] = 32,
) -> None:
    """Try each reward of a run on real pictures: what it says of them and of noise, its time alone and in batches, its memory."""
    config = load_as(target, assignments, RunConfig, "pretrain")
    from varl.plan.rewards import said, try_rewards

    head, rows = said(try_rewards(config, pictures, most))
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out_console.print(table)


@app.command(epilog=recipes_help(RunConfig))
def probe(
    target: Target,
    assignments: Set = None,
    out: Out = None,
    minutes: Annotated[
        float,
        typer.Option(
            min=0,
            help="How long to measure. Where that is too short for any interval it takes longer: 4 batches for each scale but the first, "
            "and 6 at least. Of bundled:words that is 16, more than a minute with OCR on two cores.",
        ),
    ] = 3.0,
    quiet: Quiet = False,
) -> None:
    """Measure, on your own model and reward, what decides a run; recommend PANW's alpha, m, K and the group size."""
    config = load_as(target, assignments, RunConfig, "pretrain")
    speak(quiet)
    from varl.plan import plan
    from varl.probe import probe as measure

    folder = run_folder(out, config.name)
    refuse(plan(config, calibrate=False).problems)
    with Bar(round(60 * minutes), measured_line, shown=not quiet) as bar:

        def tick(metrics: Mapping[str, float]) -> None:
            so_far = {"batches": metrics["rounds"], "pictures": metrics["images"]}
            bar.tick({"phase": "seconds", "step": metrics["seconds"], "total": round(metrics["total"]), **so_far})

        found = measure(config, folder, minutes=minutes, tick=tick)
    typer.echo(f"{found['images']:,} pictures judged in {found['seconds']:.0f} s")
    for line in found["recommendations"]:
        typer.echo(f"- {line}")
    typer.echo(f"probe   {folder / 'probe.json'}")


@app.command("reward-serve")
def reward_serve(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|CONFIG.YAML|MODULE:FUNCTION", help="A run's reward, or any callable, as path.py:function too.")
    ],
    assignments: Set = None,
    reward: Annotated[str | None, typer.Option(help="Its name, where the run has several.")] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Another interpreter, for MODULE:FUNCTION. It needs numpy and what the scorer needs, and not VARL."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen. Whoever can reach it can ask: no password, no encryption.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Pictures at once at most; 0 is as many as are sent.")] = 0,
    warm_up: Annotated[str, typer.Option(metavar="HxW", help="Size of the grey picture that is judged first.")] = "256x256",
) -> None:
    """A reward in a process of its own. Prints where it listens, loads, and answers until Ctrl-C; `kind: served` asks it."""
    speak(False)
    if python is not None:
        from varl.rewards.service import command, picture_size

        interpreter = shutil.which(python)
        if interpreter is None:
            raise ConfigError(f"--python {python}: there is no such interpreter. Give the path of one, for example my-venv/bin/python.")
        if reward or assignments or is_config(target):
            raise ConfigError(
                f"--python {python}: a run's reward needs VARL. Give module:function or path.py:function instead of {target}."
            )
        try:
            picture_size(warm_up)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which is for this interpreter
        os.execve(interpreter, command(interpreter, target, host, port, batch, warm_up), environment)
    from varl.rewards.served import serve
    from varl.rewards.toy import load_callable

    if is_config(target):
        config = load_as(target, assignments, RunConfig, "pretrain")
        names = ", ".join(config.rewards)
        if reward is None and len(config.rewards) != 1:
            raise ConfigError(f"{target}: has {len(config.rewards)} rewards. Name one with --reward: {names}.")
        reward = reward or next(iter(config.rewards))
        if reward not in config.rewards:
            raise ConfigError(f"--reward {reward}: is none of the rewards of {target}. Name one of {names}.")
        from varl.build import build_served

        serve(build_served(config, reward), f"{target} {reward}", host=host, port=port, batch=batch, warm_up=warm_up)
    elif reward or assignments:
        raise ConfigError(f"--reward and --set are for a run's reward, and {target} is a callable. Leave them out.")
    else:
        serve(lambda: load_callable(target), target, host=host, port=port, batch=batch, warm_up=warm_up)


def is_config(target: str) -> bool:
    """Whether `target` is a recipe or a YAML file; else it is a callable."""
    return Path(target).suffix in (".yaml", ".yml") or (":" not in target and Path(target).suffix != ".py")


@app.command()
def doctor(out: Annotated[Path, typer.Option("--out", help="Where runs shall lie.")] = Path("runs")) -> None:
    """Is this machine ready? A line for each thing that a run needs; exit status 1 if one fails."""
    from varl.doctor import examine

    failed = False
    for finding in examine(out):
        typer.echo(str(finding))
        failed |= finding.verdict == "fail"
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def parity(folder: Path) -> None:
    """Do our models compute what the authors' code computed? Exit status 1 if a recorded case differs."""
    from varl.eval.parity import failed, format_table, run

    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Give one with recorded cases (CASE.json beside CASE.safetensors).")
    results = run(folder)
    typer.echo(format_table(results))
    if failed(results):
        raise typer.Exit(FAILED)


@app.command()
def demo(
    which: Annotated[
        Literal["words", "va-pi", "mar-grpo"],
        typer.Argument(help="words: to be read by OCR; va-pi: letters, aligned with pixels; mar-grpo: letters that a classifier knows."),
    ] = "words",
    out: Annotated[Path | None, typer.Option("--out", help="Run directory; runs/demo or runs/demo-WHICH if not given.")] = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """A small bundled model, post-trained and measured before, after and against its controls. Goes on where it stopped."""
    speak(quiet)
    from varl.demo import mar_grpo, va_pi, words

    one = {"words": words, "va-pi": va_pi, "mar-grpo": mar_grpo}[which]
    folder = run_folder(
        out or Path("runs") / ("demo" if which == "words" else f"demo-{which}"), "demo", "eval"
    )  # the base is measured first
    with Bar(None, lambda metrics: training_line(metrics) or measured_line(metrics), shown=not quiet) as bar:
        found = one.demo(folder, seed, err_console.print, bar.tick)
    if not (found / "summary.json").exists():
        typer.echo(f"stopped and saved; the same command goes on: varl demo {which} --out {shlex.quote(str(folder))} --seed {seed}")
        return
    for line in one.said(json.loads((found / "summary.json").read_text())):
        typer.echo(line)
    typer.echo(f"report  {found / 'report.html'}")


@app.command()
def convert(
    transformer: Annotated[
        Path, typer.Argument(metavar="TRANSFORMER", help="Weights of VAR, Infinity, LlamaGen, MAR, NOVA or Harmon, released or a run's.")
    ],
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="The tokenizer it was trained with; NOVA's whole folder.")],
    out: Annotated[Path, typer.Option("--out", help="The model folder.")],
    image_size: Annotated[
        int | None, typer.Option(help="Pixels to a side of the pictures LlamaGen was trained on, or Infinity shall draw: no weight tells.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of a LlamaGen, MAR, NOVA or Harmon that is of no released size.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights of a LlamaGen or Infinity training run's files.")] = False,
    language_model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The Qwen2.5 that a Harmon was begun with, of whose `.pth` no weight tells it.")
    ] = None,
) -> None:
    """Released weights as a model folder. Whose they are is told from their names."""
    from varl.checkpoints import model as model_folder
    from varl.checkpoints.convert import load_released
    from varl.checkpoints.folder import refuse_strange

    refuse_strange(out)
    model, vq = load_released(transformer, tokenizer, image_size=image_size, heads=heads, ema=ema, language_model=language_model)
    typer.echo(str(model_folder.save(out, model, vq, {"converted": [transformer.name, tokenizer.name], "ema": ema})))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The `adapter/` of a run, or another LoRA as peft keeps it.")],
    out: Annotated[Path, typer.Option("--out", help="The model folder.")],
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="What it was trained on, where that lies elsewhere now.")] = None,
) -> None:
    """Adapters and the model they were trained on as a model folder."""
    from varl.checkpoints import adapter as adapter_folder
    from varl.checkpoints import model as model_folder
    from varl.checkpoints.folder import refuse_strange
    from varl.models.lora import merge as merge_adapters
    from varl.models.lora import require_peft

    require_peft()
    refuse_strange(out)
    told = adapter_folder.base_of(adapter)
    if (base := model or told) is None:
        raise ConfigError(f"{adapter}: does not say what it was trained on. Give it with --model.")
    transformer, tokenizer = model_folder.load(model_folder.model_path(base))
    adapter_folder.load(adapter, transformer)
    merge_adapters(transformer)
    typer.echo(str(model_folder.save(out, transformer, tokenizer, {"base": base, "adapter": str(adapter)})))


if __name__ == "__main__":
    main()
