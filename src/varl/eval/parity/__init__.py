"""Do our models compute what the authors' code computed? A case is `<case>.safetensors` (weights `sd.*`, inputs `in.*`, recorded random
draws `rng.*`, recorded results `out.*`) with `<case>.json` (sizes, and the tolerance of each result); a JSON file in a folder `keys` lists
the names and shapes of a released file's weights. Models are built from the JSON alone."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from varl.checkpoints.folder import Shapes
from varl.errors import CheckpointError
from varl.eval.parity import harmon, infinity, janus, llamagen, mar, nova, var
from varl.eval.parity.case import Case, load_case, read_info

Verdict = Literal["agrees", "FAILS", "not supported yet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    family: str
    case: str
    verdict: Verdict
    compared: int = 0
    """Tensors whose numbers were compared; of a key list, names."""
    worst: str = ""
    """The tensor that comes nearest to its tolerance, or goes furthest beyond it."""
    ratio: float = 0.0
    """Its largest error, in units of its tolerance: above 1 fails."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What it takes to check the cases of one model family."""

    results: Callable[[Case], dict[str, Tensor]]
    """From a case to its results, by the names under `out.`."""
    fit: Callable[[Shapes, str], None]
    """Raises where the weights of a released file, given by name and shape, and where they are from, do not fit our modules."""


FAMILIES: dict[str, Family] = {
    "var": Family(results=var.results, fit=var.fit),
    "llamagen": Family(results=llamagen.results, fit=llamagen.fit),
    "janus": Family(results=janus.results, fit=janus.fit),
    "mar": Family(results=mar.results, fit=mar.fit),
    "infinity": Family(results=infinity.results, fit=infinity.fit),
    "nova": Family(results=nova.results, fit=nova.fit),
    "harmon": Family(results=harmon.results, fit=harmon.fit),
}
"""The families that can be checked, by the JSON's `model`, of which a key list's begins so."""


def run(folder: Path) -> list[CaseResult]:
    """Every case under `folder`, at any depth, in the order of their paths."""
    root = Path(folder).resolve()
    results = []
    for file in sorted(root.rglob("*.json")):
        try:
            info = read_info(file)
        except CheckpointError as error:
            results.append(CaseResult(family=file.parent.name, case=file.stem, verdict="FAILS", problems=(str(error),)))
            continue
        if "model" in info and ("tensors" in info or (file.parent.name == "keys" and "state_dict" in info)):
            results.append(_check(root, file, info))
    return results


def failed(results: Sequence[CaseResult]) -> bool:
    """Whether a case fails, or none was found at all. A family that VARL does not have yet neither passes nor fails."""
    return not results or any(result.verdict == "FAILS" for result in results)


def format_table(results: Sequence[CaseResult]) -> str:
    """One line per case, with the reasons of a failure below it; the error is in units of the tolerance. Then one line for each family that
    VARL does not have."""
    checked = [r for r in results if r.verdict != "not supported yet"]
    lacking = Counter(r.family for r in results if r.verdict == "not supported yet")
    head = ("case", "compared", "worst", "error / tolerance", "verdict")
    rows = [
        (f"{r.family}/{r.case}", str(r.compared or "-"), r.worst or "-", f"{r.ratio:.3f}" if r.worst else "-", r.verdict) for r in checked
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    below = [[f"    {problem}" for problem in r.problems] for r in checked]
    table = [text for line, more in zip(lines[1:], below, strict=True) for text in (line, *more)]
    others = [f"{family}: not supported yet, {count} not checked; VARL has {', '.join(FAMILIES)}." for family, count in lacking.items()]
    none = "No case was found: one is CASE.json beside CASE.safetensors, or a list of a released file's names in a folder `keys`."
    return "\n".join([*([lines[0], *table] if checked else []), *others] or [none])


# ---- one case -------------------------------------------------------------------------------------------------------------------------


def _check(root: Path, file: Path, info: dict[str, Any]) -> CaseResult:
    name, case = str(info["model"]).split("-")[0], str(info.get("case", file.stem))
    if name not in FAMILIES:
        return CaseResult(family=name, case=case, verdict="not supported yet")
    try:
        with torch.no_grad():
            if "tensors" in info:
                return _compare(name, case, load_case(root, file, info))
            FAMILIES[name].fit(info["state_dict"], str(file))
            return CaseResult(family=name, case=case, verdict="agrees", compared=len(info["state_dict"]))
    except Exception as error:  # whatever a file from outside may hold, the other cases are still checked
        return CaseResult(family=name, case=case, verdict="FAILS", problems=(f"{type(error).__name__}: {error}",))


def _compare(family: str, name: str, case: Case) -> CaseResult:
    want = {name: tensor for name, tensor in case.tensors.items() if name.startswith("out.")}
    tolerance = {entry["name"]: entry.get("tolerance") for entry in case.info["tensors"]}
    got = {f"out.{name}": tensor for name, tensor in FAMILIES[family].results(case).items()}
    unknown = [name for name in want if name not in got or tolerance.get(name) is None]
    problems = [f"no recipe for {name}" if name not in got else f"{name} has no tolerance" for name in unknown]
    problems += [f"{name} is listed and not stored" for name in tolerance if name.startswith("out.") and name not in want]
    ratios = {name: error_ratio(got[name], want[name], tolerance[name]) for name in want if name not in unknown}
    problems += [f"{name}: {_describe(got[name], want[name], ratio)}" for name, ratio in ratios.items() if not ratio <= 1]
    if not want:
        problems.append("it holds no results to compare with")
    worst = max(ratios, key=lambda name: ratios[name], default="")
    return CaseResult(
        family=family,
        case=name,
        verdict="FAILS" if problems else "agrees",
        compared=len(ratios),
        worst=worst,
        ratio=ratios.get(worst, 0.0),
        problems=tuple(problems),
    )


def error_ratio(got: Tensor, want: Tensor, tolerance: Mapping[str, Any]) -> float:
    """The largest error in units of its tolerance: |got - want| / (atol + rtol |want|), or / max_abs; exact is 0 or infinite. Another
    shape, and a number that is none, are infinitely wrong."""
    if got.shape != want.shape:
        return math.inf
    if tolerance.get("exact"):
        return 0.0 if bool((got == want).all()) else math.inf
    got, want = got.double(), want.double()
    allowed = (
        torch.full_like(want, tolerance["max_abs"]) if "max_abs" in tolerance else tolerance["atol"] + tolerance.get("rtol", 0) * want.abs()
    )
    ratio = torch.where(got == want, 0.0, (got - want).abs() / allowed)
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _describe(got: Tensor, want: Tensor, ratio: float) -> str:
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, recorded is {list(want.shape)}"
    if not got.isfinite().all():
        return f"{int((~got.isfinite()).sum())} of {got.numel()} numbers are not finite"
    differ = int((got != want).sum())
    return f"error {ratio:.3g} x tolerance" if ratio < math.inf else f"{differ} of {got.numel()} numbers differ, and none may"
