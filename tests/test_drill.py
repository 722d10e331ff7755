"""`python3 main.py drill` on real SSH nodes: what it prints, how it ends, and that it leaves the nodes as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import ATTACKS, CONTAINED, MARK, NOT_APPLICABLE, NOT_CONTAINED
from tests.fleet import Fleet, missing_tools
from tests.held_jobs import HOLD, pids_with, release
from tests.server import PROJECT, Server, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NOT_WITHOUT_SANDBOX = {attack.name for attack in ATTACKS if attack.needs_sandbox}
FOLDER = ".gpu-job-server"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Fleet]:
    """Two nodes of this file alone: their agents are killed."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(2) as fleet:
        yield fleet


def drill(settings: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command with these settings."""
    more = {"KILL_GRACE": "1", "SSH_CONFIG_FILE": str(folder / "none"), "JOBS_DIR": str(folder / "jobs")}
    return subprocess.run(
        [sys.executable, str(PROJECT / "main.py"), "drill", *words],
        cwd=folder,
        env=clean_environment({**more, **settings}),
        capture_output=True,
        text=True,
        timeout=250,
    )


def outcomes(output: str) -> dict[tuple[str, str], str]:
    """{(node, name of the attack): outcome} of what was printed."""
    found = {}
    for line in output.splitlines():
        for attack in ATTACKS:
            if f"  {attack.name:<47} " in line:
                (word,) = [word for word in (CONTAINED, NOT_CONTAINED, NOT_APPLICABLE) if f" {word} " in line]
                assert ",".join(map(str, attack.rows)) == line.split()[1], line
                found[line.split()[0], attack.name] = word
    return found


def traces(fleet: Fleet, number: int) -> list[str]:
    """What a drill could have left on a node."""
    node = fleet.node(number)
    found = [str(path) for path in node.home.rglob("*") if path.name in (MARK, "drill", "attempts")]
    found += [place for place in ("/tmp", "/var/tmp", "/dev/shm") if os.path.lexists(f"{place}/{MARK}")]
    return found + [str(process) for process in fleet.processes(number)] + [str(pid) for pid in pids_with(MARK)]


def test_nodes_with_a_sandbox_contain_every_attack_and_are_left_clean(nodes: Fleet, tmp_path: Path) -> None:
    done = drill({**nodes.settings(), "SANDBOX": "required"}, tmp_path)
    found = outcomes(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found) == {(node, attack.name) for node in ("node-1", "node-2") for attack in ATTACKS}
    assert NOT_CONTAINED not in found.values()
    not_applicable = {name for (_, name), word in found.items() if word == NOT_APPLICABLE}
    assert not_applicable <= {attack.name for attack in ATTACKS if attack.uses_gpu or 33 in attack.rows}
    assert f"0 {NOT_CONTAINED}" in done.stdout.splitlines()[-1]
    assert [traces(nodes, number) for number in (1, 2)] == [[], []]


def test_node_without_a_sandbox_is_told_what_is_not_contained_and_what_to_do(nodes: Fleet, tmp_path: Path) -> None:
    done = drill({**nodes.settings(), "SANDBOX": "off"}, tmp_path, "--node", "node-2")
    found = outcomes(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(found) == {("node-2", attack.name) for attack in ATTACKS}
    assert {name for (_, name), word in found.items() if word == NOT_CONTAINED} == NOT_WITHOUT_SANDBOX, done.stdout
    lines = done.stdout.splitlines()
    for attack in ATTACKS:
        if attack.needs_sandbox:
            (at,) = [number for number, line in enumerate(lines) if f"  {attack.name:<47} " in line]
            assert lines[at + 1].strip() == attack.remedy
    assert traces(nodes, 2) == []


def test_network_that_is_given_on_purpose_is_told(nodes: Fleet, tmp_path: Path) -> None:
    settings = {**nodes.settings(), "SANDBOX": "required", "JOB_NETWORK": "host"}
    done = drill(settings, tmp_path, "--node", "node-1", "--rows", "34")
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(outcomes(done.stdout).values()) == [NOT_CONTAINED]
    assert "JOB_NETWORK=none" in done.stdout


def test_drill_leaves_a_running_servers_job_alone(nodes: Fleet, tmp_path: Path) -> None:
    entries = json.dumps(json.loads(nodes.settings()["GPU_NODES"])[:1])
    settings = {**nodes.settings(), "GPU_NODES": entries}
    with Server({**settings, "SUBMITS_PER_MINUTE": "100"}) as server:
        job_id = server.submit("alice", HOLD)
        server.wait_for_output(job_id, "alice", "held\n", timeout=60)
        # Without those that need the node to be clear of other processes of the login.
        done = drill({**settings, "SANDBOX": "required"}, tmp_path, "--rows", "8,13,15,20,22,23,26,39")
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.status(job_id, "alice")["node_reachable"] is True
        release(server, nodes, job_id)
        ended = server.wait_for(job_id, "alice", timeout=60)
        assert (ended["status"], ended["attempt"]) == ("completed", 1)


def test_node_that_cannot_be_reached_counts_as_not_contained(nodes: Fleet, tmp_path: Path) -> None:
    nodes.stop(2)
    try:
        done = drill(nodes.settings(), tmp_path, "--rows", "16")
    finally:
        nodes.start(2)
    assert done.returncode == 1
    assert outcomes(done.stdout) == {("node-1", "os._exit(0) without results"): CONTAINED}
    assert [line.split()[0] for line in done.stdout.splitlines() if "cannot be tried" in line] == ["node-2"]


def test_one_slot_of_this_machine_stands_for_all(tmp_path: Path) -> None:
    done = drill({"NUM_GPU_NODES": "3"}, tmp_path, "--rows", "8,20,39")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {node for node, _ in outcomes(done.stdout)} == {"local-1"}
    assert not list((tmp_path / "jobs").rglob("local-*"))


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--node", "node-9"], 1, "There is no node node-9"),
        (["--rows", "99"], 1, "No attack has such a row"),
        (["--rows", "one"], 2, "--rows"),
        (["--help"], 0, "Drain the nodes first"),
    ],
)
def test_wrong_words_are_told(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    done = drill({}, tmp_path, *words)
    assert done.returncode == code
    assert text in " ".join((done.stdout + done.stderr).split())
