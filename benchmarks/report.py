"""Writes what was measured: results.json, documentation/PERFORMANCE.md between its markers, and the plots.

The document is made from results.json alone, so that measuring one subject again renews its part and keeps the rest.
Imports `measure` of this package; matplotlib where plots are drawn.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sqlite3
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.measure import OURS, Chart, Findings, Row, Spread

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results.json"
DOCUMENT = PROJECT / "documentation" / "PERFORMANCE.md"
PLOTS = PROJECT / "documentation" / "img" / "performance"
BEGIN, END = "<!-- benchmarks:begin -->\n", "<!-- benchmarks:end -->"
BLUE, GREY, GREEN, RED = "#2563eb", "#9ca3af", "#16a34a", "#dc2626"


# -- plain text ----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits that matter."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def spread(value: Spread | None, unit: str = "") -> str:
    """Median and, of more than one round, the range."""
    if value is None:
        return "–"
    text = number(value.median) + (f" {unit}" if unit else "")
    return text if value.rounds == 1 else f"{text} ({number(value.low)}–{number(value.high)})"


def cells(row: Row) -> list[str]:
    """A row as texts: figure, ours, peer, theirs, ratio, goal, reached."""
    reached = {True: "yes", False: "**no**", None: "–"}[row.reached]
    ratio = spread(row.ratio, "×") if row.ratio is not None else "–"
    theirs = spread(row.theirs, row.unit)
    return [row.figure, spread(row.ours, row.unit), row.peer or "–", theirs, ratio, row.goal, reached]


HEADS = ["figure", "ours", "beside", "theirs", "ratio", "goal", "reached"]


def table(rows: list[Row]) -> str:
    """For a terminal."""
    lines = [HEADS] + [[cell.replace("**", "") for cell in cells(row)] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"  {row.figure} ({row.peer or OURS}): {row.note}" for row in rows if row.note]
    return "\n".join(shown + notes)


def markdown_table(rows: list[Row]) -> str:
    """For the document."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines)


# -- the results file ----------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the figures depend on."""
    processor = re.search(r"(?m)^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"(?m)^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "processor": processor[1] if processor else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / (1 << 20):.0f} GiB" if memory else "?",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
    }


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def load() -> dict[str, Any]:
    """The results so far: subject → what was measured, when and where."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(name: str, order: int, title: str, about: str, mode: str, seconds: float, findings: Findings) -> None:
    """Put a subject's findings into the results file."""
    results = load()
    results[name] = {
        "order": order,
        "title": title,
        "about": textwrap.dedent(about).strip(),
        "mode": mode,
        "seconds": round(seconds, 1),
        "measured_at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
        **findings.save(),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


# -- plots ---------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any]) -> dict[str, list[str]]:
    """Draw every plot; the file names of each subject."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "font.size": 9, "svg.fonttype": "path"})
    PLOTS.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[str]] = {}
    for name, saved in results.items():
        findings = Findings.load(saved)
        drawn[name] = []
        if any(row.ratio for row in findings.rows):
            draw_ratios(PLOTS / f"{name}.svg", saved["title"], findings.rows)
            drawn[name].append(f"{name}.svg")
        for chart in findings.charts:
            draw_chart(PLOTS / f"{name}-{chart.name}.svg", chart)
            drawn[name].append(f"{name}-{chart.name}.svg")
    wanted = {file for files in drawn.values() for file in files}
    for path in PLOTS.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
    return drawn


def draw_ratios(path: Path, title: str, rows: list[Row]) -> None:
    """Ours over each peer, on a logarithmic axis, with its range and the goal as a mark."""
    from matplotlib import pyplot, ticker

    shown = [row for row in rows if row.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.9 + 0.42 * len(shown)))
    for place, row in enumerate(reversed(shown)):
        assert row.ratio is not None
        colour = {True: GREEN, False: RED, None: BLUE}[row.reached]
        low, middle, high = row.ratio.low, row.ratio.median, row.ratio.high
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=3)
        goal = re.match(r"[≤≥] ([\d.]+) ×", row.goal)
        if goal:
            axes.plot(float(goal[1]), place, "|", color="black", markersize=16)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_yticks(range(len(shown)), [f"{row.figure}\nbeside {row.peer}" for row in reversed(shown)], fontsize=7)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("ours ÷ theirs (median and range of the rounds; black: the goal)")
    axes.set_title(title)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def draw_chart(path: Path, chart: Chart) -> None:
    """Lines through points."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.2))
    for label, points in chart.lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=3, label=label)
    if chart.x_log:
        axes.set_xscale("log")
    if chart.y_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


# -- the document --------------------------------------------------------------------------------------------------


def section(saved: dict[str, Any], plots: list[str]) -> str:
    """A subject's part of the document."""
    findings = Findings.load(saved)
    parts = [f"## {saved['title']}", saved["about"], markdown_table(findings.rows)]
    notes = list(dict.fromkeys(f"- {row.figure}, {row.peer or OURS}: {row.note}" for row in findings.rows if row.note))
    if notes:
        parts.append("\n".join(notes))
    parts += [f"![{saved['title']}](img/performance/{plot})" for plot in plots]
    for row in findings.rows:
        if row.profile:
            parts.append(f"Where the time goes ({row.figure}):\n\n```text\n{row.profile.strip()}\n```")
    where = ", ".join(f"{name} {value}" for name, value in saved["machine"].items())
    parts.append(
        f"*{saved['mode'].capitalize()} form, {saved['measured_at']}, commit {saved['commit'] or '?'}, "
        f"load average {saved['load']:g} at the end; {where}.*"
    )
    return "\n\n".join(parts) + "\n"


def write() -> None:
    """Make the document and its plots from the results file."""
    results = dict(sorted(load().items(), key=lambda item: item[1]["order"]))
    plots = draw(results)
    missed = [
        (saved["title"], row) for saved in results.values() for row in Findings.load(saved).rows if row.reached is False
    ]
    asked = sum(row.reached is not None for saved in results.values() for row in Findings.load(saved).rows)
    summary = f"{asked - len(missed)} of {asked} goals were reached."
    if missed:
        lines = [f"- {title}: {' · '.join(cells(row)[:6])}" for title, row in missed]
        summary += " Not reached:\n\n" + "\n".join(lines)
    body = "\n".join([summary + "\n", *(section(saved, plots[name]) for name, saved in results.items())])
    text = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT} lacks its markers {BEGIN.strip()} and {END}")
    DOCUMENT.write_text(before + begin + "\n" + body + "\n" + end + after, encoding="utf-8")
