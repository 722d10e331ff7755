"""The benchmarks still run: once each, without peers. Nothing here depends on a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fleet import missing_tools
from tests.server import PROJECT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_benchmark_runs_once() -> None:
    if missing_tools() is not None:
        pytest.skip(str(missing_tools()))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke"], cwd=PROJECT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in ("dispatch", "noop", "throughput", "submit", "status", "results", "logs", "idle", "growth"):
        assert f"== {name}:" in done.stdout


def test_the_benchmarks_say_what_they_measure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "throughput" in done.stdout
    assert "peer OpenSSH" in done.stdout


def test_an_unknown_subject_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no such subject: nonsense" in done.stderr
