"""What all tests share."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fleet import Fleet, missing_tools
from tests.server import Server

# The files that take longest begin first, so that the last to end does not begin last (run_tests.sh hands out whole
# files to several processes at once).
LONGEST_FIRST = (
    *("test_client.py", "test_backup.py", "test_drill.py", "test_node_faults.py", "test_recovery.py"),
    *("test_attacks.py", "test_nodes.py", "test_ledger.py", "test_failpoints.py", "test_estimates.py"),
    *("test_live.py", "test_scripts.py", "test_quickstart.py", "test_server_faults.py", "test_network.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONGEST_FIRST, then the others as they came."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_report_header() -> str:
    """Versions that matter for what the tests show."""
    tools = ", ".join(f"{name} {'there' if shutil.which(name) else 'MISSING'}" for name in ("sshd", "bwrap", "curl"))
    return f"SQLite {sqlite3.sqlite_version}, {tools}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a test that is skipped for a missing part is a failure."""
    report = yield
    if os.environ.get("GPUQ_NO_SKIPS") == "1" and report.skipped and not hasattr(report, "wasxfail"):  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server on the embedded default, with limits that do not get in a test's way."""
    with Server({"SUBMITS_PER_MINUTE": "10000"}) as running:
        yield running


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Eight SSH nodes on loopback. A test that breaks one mends it again."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(8) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ssh_server(fleet: Fleet) -> Iterator[Server]:
    """A server on eight SSH nodes."""
    with Server({"SUBMITS_PER_MINUTE": "10000", **fleet.settings()}) as running:
        yield running
