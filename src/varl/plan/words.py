"""A plan, and how it reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from varl.plan.cost import Update
from varl.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    problems: tuple[str, ...]
    """What would stop the run, all of it."""
    warnings: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    """Which engine judges, and why."""
    layout: Layout | None = None
    middle_step: int | None = None
    prefix_tokens: int = 0
    """Of a picture, up to the middle step."""
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes by part at the moment when most is held."""
    available: int = 0
    """Bytes that the device has."""
    updates: tuple[Update, ...] = ()
    seconds: float | None = None
    """Of the whole run's multiplications at the measured speed of one large matrix product: a lower bound. Rewards are not in it."""

    @property
    def prefix_share(self) -> float:
        """Share of a picture's tokens in the prefix."""
        return self.prefix_tokens / self.layout.tokens if self.layout else 0.0

    def total(self, count: Callable[[Update], float]) -> float:
        """Over all updates of the run."""
        return float(sum(update.count * count(update) for update in self.updates))


def in_bytes(value: int | float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def in_time(seconds: int | float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.2g} s"


def format_plan(plan: Plan) -> str:
    """The plan as text, one fact a line."""
    rows = [("problem", line) for line in plan.problems]
    if plan.layout is not None and plan.updates:
        rows += _picture_rows(plan, plan.layout)
    if plan.updates:
        rows += _cost_rows(plan)
    rows += [("reward", line) for line in plan.rewards]
    rows += [("warning", line) for line in plan.warnings]
    if not plan.problems:
        rows.append(("", "nothing is missing"))
    return "\n".join(f"{name:<12}{line}" for name, line in rows)


def _picture_rows(plan: Plan, layout: Layout) -> Iterable[tuple[str, str]]:
    grids = ", ".join(f"{h}x{w}" for h, w in layout.grids)
    scales = layout.steps == len(layout.grids)
    steps = "" if layout.steps == layout.tokens else f" in {layout.steps} steps"
    yield "picture", f"{layout.tokens} tokens on {layout.steps} scales: {grids}" if scales else f"{layout.tokens} tokens{steps}, {grids}"
    if plan.middle_step == layout.steps:
        yield "prefix", f"all {plan.middle_step} {'scales' if scales else 'tokens'}: whole pictures are trained on"
    elif plan.middle_step is not None:
        held = f"scales hold {plan.prefix_share:.1%} of the tokens" if scales else f"tokens are {plan.prefix_share:.1%} of the picture"
        yield "prefix", f"the first {plan.middle_step} {held}"


def _cost_rows(plan: Plan) -> Iterable[tuple[str, str]]:
    for u in plan.updates:
        flops = ", ".join(f"{phase} {flops:.2e}" for phase, flops in u.flops.items())
        drawn = f"{u.judged:,} pictures judged, {u.drawn:,} tokens drawn, " if u.judged else ""
        trained = f"{u.trained:,} tokens trained on; " if u.trained else ""
        yield "step", f"{u.count:,} x {u.name}: {drawn}{trained}operations: {flops}"
    judged, drawn, trained = (plan.total(lambda u, name=name: getattr(u, name)) for name in ("judged", "drawn", "trained"))
    made = f", {judged:,.0f} pictures and reward calls, {drawn:,.0f} tokens drawn" if judged else ""
    yield "run", f"{plan.total(lambda u: 1):,.0f} steps{made}" + (f", {trained:,.0f} tokens trained on" if trained else "")
    yield "parameters", ", ".join(f"{name} {number:,}" for name, number in plan.parameters.items())
    parts = ", ".join(f"{name} {in_bytes(number)}" for name, number in plan.memory.items())
    yield "memory", f"about {in_bytes(sum(plan.memory.values()))} of {in_bytes(plan.available)}: {parts}"
    if plan.seconds is not None:
        step = plan.seconds / plan.total(lambda u: 1)
        yield (
            "time",
            f"at least {in_time(plan.seconds)}, {in_time(step)} a step, if all ran at the speed of one large matrix product; rewards extra",
        )
