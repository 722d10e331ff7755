"""python3 -m benchmarks: measures the server beside what users would take instead, prints tables of ratios, and writes
documentation/PERFORMANCE.md with its plots. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks import peers, report
from benchmarks.measure import Findings
from benchmarks.servers import Run


@dataclass(frozen=True)
class Subject:
    """A module of this package that measures something: ORDER, TITLE, ABOUT and `measure`."""

    name: str
    order: int
    title: str
    about: str
    measure: Callable[[Run], Findings]


def subjects() -> list[Subject]:
    """Every module here that has `measure`, in their order."""
    found = []
    for entry in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if entry.name == "__main__":
            continue
        module = importlib.import_module(f"benchmarks.{entry.name}")
        if hasattr(module, "ORDER"):
            measure = cast("Callable[[Run], Findings]", module.measure)
            found.append(Subject(entry.name, module.ORDER, module.TITLE, module.ABOUT, measure))
    return sorted(found, key=lambda subject: subject.order)


def parse(argv: Sequence[str] | None, known: list[Subject]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--short",
        dest="mode",
        action="store_const",
        const="short",
        help="about five minutes with all peers (default)",
    )
    form.add_argument("--full", dest="mode", action="store_const", const="full", help="more rounds, larger loads")
    form.add_argument(
        "--smoke",
        dest="mode",
        action="store_const",
        const="smoke",
        help="one iteration of each, without peers, to see that it works; writes nothing",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the other systems out")
    parser.add_argument("--no-report", action="store_true", help="print tables only, write no file")
    parser.add_argument("--list", action="store_true", help="name the subjects and the peers found, and end")
    parser.add_argument("--install-peers", action="store_true", help="install the peers that are missing, and end")
    parser.add_argument("names", nargs="*", metavar="NAME", help="subjects to measure (all)")
    options = parser.parse_args(argv)
    options.mode = options.mode or "short"
    unknown = set(options.names) - {subject.name for subject in known}
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in known)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    known = subjects()
    options = parse(argv, known)
    if options.list:
        for subject in known:
            print(f"{subject.name:12} {subject.title}")
        for name, where in peers.found().items():
            print(f"peer {name:20} {where or 'not installed'}")
        return 0
    if options.install_peers:
        return peers.install()

    # As Ctrl-C: what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    run = Run(options.mode, peers=not (options.no_peers or options.mode == "smoke"))
    began = time.monotonic()
    failed = []
    try:
        for subject in known:
            if options.names and subject.name not in options.names:
                continue
            print(f"\n== {subject.name}: {subject.title}", flush=True)
            started = time.monotonic()
            try:
                findings = subject.measure(run)
            except Exception:  # the other subjects can still be measured
                traceback.print_exc()
                failed.append(subject.name)
                continue
            seconds = time.monotonic() - started
            print(report.table(findings.rows) + f"\n({seconds:.0f} s)", flush=True)
            if not (options.no_report or run.smoke):
                report.keep(subject.name, subject.order, subject.title, subject.about, options.mode, seconds, findings)
    finally:
        run.close()
    if not (options.no_report or run.smoke):
        report.write()
        print(f"\nwritten: {report.DOCUMENT.relative_to(report.PROJECT)}")
    print(f"{time.monotonic() - began:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
