"""Measuring named sides in turn, and what comes of it: rows of ratios and charts. See README.md.

Imports nothing of the project, and starts nothing: `servers.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

OURS = "ours"

Side = Callable[[], float]
"""Measures its side once and gives the value, in the unit of the figure."""

MOST_KEPT = 2000  # characters of a profile that a row shows


@dataclass(frozen=True)
class Spread:
    """What one side gave over all rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Goal:
    """What the ratio, ours over the peer's, shall be: at most (times, bytes) or at least (rates)."""

    at_most: float | None = None
    at_least: float | None = None

    def reached(self, ratio: float) -> bool:
        """Whether a ratio is as asked."""
        return (self.at_most is None or ratio <= self.at_most) and (self.at_least is None or ratio >= self.at_least)

    def __str__(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g} ×"
        return f"≥ {self.at_least:g} ×" if self.at_least is not None else "–"


NO_GOAL = Goal()


@dataclass(frozen=True)
class Row:
    """One line of a table: a figure, ours beside one peer's.

    `reached` is None where nothing was asked or nothing could be measured; `note` says what was skipped and why, and
    `profile` shows where the time goes when a goal is missed.
    """

    figure: str
    unit: str
    ours: Spread | None = None
    peer: str = ""
    theirs: Spread | None = None
    ratio: Spread | None = None
    goal: str = "–"
    reached: bool | None = None
    note: str = ""
    profile: str = ""

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Row:
        """From what `asdict` gave."""
        spreads = {name: Spread(**saved[name]) if saved[name] else None for name in ("ours", "theirs", "ratio")}
        return cls(**{**saved, **spreads})


@dataclass(frozen=True)
class Chart:
    """A plot of its own: lines through (x, y) points. Each subject gets one of its ratios without asking."""

    name: str  # letters, digits and hyphens; part of the file's name
    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    x_log: bool = False
    y_log: bool = False


@dataclass
class Findings:
    """What a subject's `measure` returns."""

    rows: list[Row] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)

    def save(self) -> dict[str, Any]:
        """As plain data for the results file."""
        return asdict(self)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Findings:
        """From what `save` gave."""
        charts = [
            Chart(**{**chart, "lines": {name: [(x, y) for x, y in line] for name, line in chart["lines"].items()}})
            for chart in saved["charts"]
        ]
        return cls([Row.load(row) for row in saved["rows"]], charts)


def interleaved(
    sides: Mapping[str, Side], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, list[float]]:
    """Measure every side once per round, in an order that turns, so that what else the machine does meets all alike.

    At most `rounds` rounds, and none is begun after `seconds` when three are there. The warm-up round is not kept; a
    single round has none.
    """
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    if warm_up and rounds > 1:
        for name in names:
            sides[name]()
    began = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - began > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            values[name].append(sides[name]())
    return values


def compare(
    figure: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    goals: Mapping[str, Goal] | None = None,
    *,
    ours: str = OURS,
    note: str = "",
    profile: Callable[[], str] | None = None,
) -> list[Row]:
    """Rows of what `interleaved` gave: ours beside each peer, the ratio taken round by round.

    `goals` is by peer; where one is missed, `profile` is called for where the time goes.
    """
    mine = values[ours]
    rows = []
    for peer, theirs in values.items():
        if peer == ours:
            continue
        ratio = Spread.of([one / other for one, other in zip(mine, theirs, strict=True)])
        goal = (goals or {}).get(peer)
        reached = goal.reached(ratio.median) if goal is not None else None
        rows.append(
            Row(
                figure,
                unit,
                Spread.of(mine),
                peer,
                Spread.of(theirs),
                ratio,
                str(goal or NO_GOAL),
                reached,
                note,
            )
        )
    if profile is not None and any(row.reached is False for row in rows):
        shown = profile()[:MOST_KEPT]
        rows = [replace(row, profile=shown) if row.reached is False else row for row in rows]
    return rows or [Row(figure, unit, Spread.of(mine), note=note)]


def bounded(figure: str, unit: str, values: Sequence[float], *, at_most: float, note: str = "") -> Row:
    """A row of ours alone against an absolute limit, such as bytes or percent of a core."""
    mine = Spread.of(values)
    return Row(figure, unit, mine, goal=f"≤ {at_most:g} {unit}", reached=mine.median <= at_most, note=note)


def skipped(figure: str, unit: str, peer: str, why: str, goal: Goal = NO_GOAL) -> Row:
    """A row for a peer that is not there."""
    return Row(figure, unit, peer=peer, goal=str(goal), note=f"skipped: {why}")


def timed(action: Callable[[], object], times: int = 1) -> float:
    """Milliseconds that one call takes: the median of so many."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append((time.perf_counter() - began) * 1000)
    return median(taken)
