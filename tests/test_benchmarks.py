"""The benchmarks still run: once each, without peers. Nothing here depends on a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fleet import missing_tools
from tests.server import PROJECT


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_every_benchmark_runs_once() -> None:
    if missing_tools() is not None:
        pytest.skip(str(missing_tools()))
    argv = [sys.executable, "-m", "benchmarks", "--smoke"]
    with subprocess.Popen(argv, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # then it ends the servers it has started
            printed, _ = process.communicate(timeout=50)
    assert process.returncode == 0, printed
    for name in ("dispatch", "noop", "throughput", "submit", "status", "results", "logs", "idle", "growth"):
        assert f"== {name}:" in printed


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
