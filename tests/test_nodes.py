"""Nodes as they are in life: down, reinstalled, without Python, behind jump hosts, named in many ways, set up wrongly.

`check` names each trouble with its remedy, the remedies work as printed, and a server runs its jobs on the nodes that
are left.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from paramiko import Transport

import config
import ssh_executor
from main import make_executors
from tests.fleet import Fleet, make_key, missing_tools
from tests.fresh import FreshCopy
from tests.held_jobs import HOLD, release
from tests.server import Server, wait_until

ADMIN = "admin"
TIMEOUT = 60.0
SETTINGS = {
    "SUBMITS_PER_MINUTE": "10000",
    "MAX_ACTIVE_JOBS": "8",  # one user is enough
    "KILL_GRACE": "1",
    "QUARANTINE_AFTER": "1000",
    "SSH_CONNECT_TIMEOUT": "5",
}

# Where a job is, as it sees it.
WHERE = "import os\nprint(os.getuid(), os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n" + HOLD


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    """Two nodes."""
    yield from fleet_of(2)


@pytest.fixture(scope="module")
def behind_jump() -> Iterator[Fleet]:
    """Two nodes behind a jump host."""
    yield from fleet_of(2, jump=True)


def fleet_of(size: int, jump: bool = False) -> Iterator[Fleet]:
    """Nodes of this module's own."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(size, jump=jump) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def stopped() -> Iterator[Server]:
    """Settings and a folder; nothing is started."""
    server = Server()
    yield server
    server.close()


def uid_of(fleet: Fleet, number: int) -> int:
    """The user that jobs of the node run as."""
    return fleet.node(number).home.stat().st_uid


@contextlib.contextmanager
def serving(settings: dict[str, str], *, wait_for_nodes: bool = True) -> Iterator[Server]:
    """A server with its user, who is an admin."""
    server = Server({**SETTINGS, **settings}, wait_for_nodes=wait_for_nodes)
    try:
        server.token(ADMIN, admin=True)
        server.start()
        yield server
    finally:
        server.close()


def check(settings: dict[str, str]) -> str:
    """What `main.py check` prints where something is wrong."""
    server = Server({**SETTINGS, **settings})
    try:
        return server.run("main.py", "check", code=1).stdout
    finally:
        server.close()


def completed_at_once(server: Server, fleet: Fleet, jobs: int = 2) -> dict[str, list[str]]:
    """Run jobs at the same time; the words each printed of where it was, by its node."""
    job_ids = [server.submit(ADMIN, WHERE) for _ in range(jobs)]
    for job_id in job_ids:
        server.wait_for_output(job_id, ADMIN, "held", timeout=TIMEOUT)
    release(server, fleet, *job_ids)
    found = {}
    for job_id in job_ids:
        status = server.wait_for(job_id, ADMIN, timeout=TIMEOUT)
        assert status["status"] == "completed", status
        found[status["node_id"]] = server.results(job_id, ADMIN)["stdout"].splitlines()[0].split(" ")
    return found


@pytest.fixture(scope="module")
def two(pair: Fleet) -> Iterator[Server]:
    """A server on two nodes that are whole when it connects. Nothing is prestarted: a job that is would not notice that
    the interpreter is gone."""
    with serving({**pair.settings(), "PRESTART": "false"}) as server:
        yield server


# -- main.py check -------------------------------------------------------------------------------------------------


def findings(output: str) -> dict[str, tuple[str, str]]:
    """What `check` printed, by node: (`ok` or `FAIL`, everything said of it)."""
    found = {}
    for block in re.split(r"^(?=(?:ok|FAIL) )", output, flags=re.MULTILINE)[1:]:
        verdict, node_id = block.split()[:2]
        found[node_id] = (verdict, block)
    return found


def online(server: Server) -> set[str]:
    """The nodes that take jobs."""
    return {node["node_id"] for node in server.get("/api/nodes").json()["nodes"] if node["status"] == "online"}


def obey(said: str, program: str) -> None:
    """Run the command that a message names, as printed, in a shell as the operator would."""
    command = re.search(rf"{program} .*?(?= and accept|$)", said, re.MULTILINE)
    assert command is not None, said
    subprocess.run(command[0], shell=True, check=True, capture_output=True, timeout=TIMEOUT)


@pytest.fixture
def troubles(fleet: Fleet) -> Iterator[tuple[Server, Path]]:
    """Nodes 2 to 7 each have another trouble; a server that must do with 1 and 8, and the wrong key's path."""
    with tempfile.TemporaryDirectory(prefix="gpu-job-server-test-") as name:
        known_hosts, wrong_key = Path(name) / "known_hosts", Path(name) / "wrong_key"
        make_key(wrong_key)
        settings = fleet.settings()
        entries = json.loads(settings["GPU_NODES"])
        entries[5]["key_file"] = str(wrong_key)
        entries[6]["key_file"] = str(wrong_key.with_name("missing_key"))
        lines = fleet.known_hosts.read_text().splitlines(keepends=True)
        known_hosts.write_text("".join(line for line in lines if f":{fleet.node(5).port} " not in line))
        settings.update(GPU_NODES=json.dumps(entries), SSH_KNOWN_HOSTS=str(known_hosts))
        fleet.stop(2)
        fleet.change_host_key(3)
        fleet.break_python(4)
        try:
            with serving(settings, wait_for_nodes=False) as server:
                yield server, wrong_key
        finally:
            fleet.start(2)
            fleet.mend_python(4)
            fleet.change_host_key(3, known=True)


def test_check_says_what_is_wrong_with_each_node_and_its_remedies_work(
    troubles: tuple[Server, Path], fleet: Fleet
) -> None:
    server, wrong_key = troubles
    ids = {"node-1", "node-8"}
    wait_until(
        lambda: {n["node_id"] for n in server.get("/api/nodes").json()["nodes"] if n["status"] == "online"} == ids
    )
    with ThreadPoolExecutor(4) as pool:
        checking = pool.submit(server.run, "main.py", "check", code=1)
        jobs = list(pool.map(server.run_job, [ADMIN] * 4))
        output = checking.result().stdout
    assert [job["status"] for job in jobs] == ["completed"] * 4
    assert {job["node_id"] for job in jobs} <= ids

    found = findings(output)
    assert {node_id for node_id, (verdict, _) in found.items() if verdict == "ok"} == ids
    said = {int(node_id.removeprefix("node-")): text for node_id, (_, text) in found.items()}
    fingerprints = {
        number: subprocess.run(
            ["ssh-keygen", "-lf", str(fleet.node(number).host_key_path)], capture_output=True, text=True, check=True
        ).stdout.split()[1]
        for number in (3, 5)
    }
    known_hosts = server.settings["SSH_KNOWN_HOSTS"]
    assert all(fleet.node(number).address in text for number, text in said.items())
    assert "cannot be reached: " in said[2]
    assert "refused" in said[2]
    assert "CHANGED" in said[3]
    assert fingerprints[3] in said[3]
    assert f"ssh-keygen -R '[127.0.0.1]:{fleet.node(3).port}' -f {known_hosts}" in said[3]
    assert server.settings["NODE_PYTHON"] in said[4]
    assert "Set NODE_PYTHON" in said[4]
    assert fingerprints[5] in said[5]
    assert f"ssh-keyscan -p {fleet.node(5).port} 127.0.0.1 >> {known_hosts}" in said[5]
    assert "refused the login" in said[6]
    assert str(wrong_key) in said[6]
    assert "authorized_keys" in said[6]
    assert f"{wrong_key.with_name('missing_key')} does not exist" in said[7]
    assert "SSH_KEY_FILE" in said[7]
    assert "2 of 8 fit; not fit: node-2, node-3, node-4, node-5, node-6, node-7" in output

    fleet.start(2)
    fleet.mend_python(4)
    obey(said[3], "ssh-keygen")
    obey(said[5], "ssh-keyscan")
    server.settings["GPU_NODES"] = fleet.settings()["GPU_NODES"]
    found = findings(server.run("main.py", "check", code=1).stdout)
    assert [node_id for node_id, (verdict, _) in found.items() if verdict == "FAIL"] == ["node-3"]
    assert fingerprints[3] in found["node-3"][1]
    obey(found["node-3"][1], "ssh-keyscan")
    whole = server.run("main.py", "check").stdout
    assert "8 of 8 fit." in whole
    for _, block in findings(whole).values():
        assert re.search(
            r"sandbox: bubblewrap works; a program starts in [0-9.]+ ms in it, [0-9.]+ ms without\n", block
        )
        assert re.search(r"filter of system calls \(seccomp\): (works|NONE: .+)\n", block)
        assert re.search(r"control group: (each job has one|NONE: .+)\n", block)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NODE_PYTHON", "/nowhere/python3"), ("JOB_PYTHON", "/nowhere/python3"), ("NODE_DIR", "/proc/x")],
)
def test_check_names_the_setting_that_does_not_fit_the_node(pair: Fleet, name: str, value: str) -> None:
    for verdict, text in findings(check({**pair.settings(), name: value})).values():
        assert verdict == "FAIL"
        assert name in text
        assert value in text
        assert "Traceback" not in text


def test_check_does_not_disturb_a_running_server(two: Server, pair: Fleet) -> None:
    job_id = two.submit(ADMIN, HOLD)
    two.wait_for_output(job_id, ADMIN, "held", timeout=TIMEOUT)
    node_id = two.status(job_id, ADMIN)["node_id"]
    (lock,) = pair.node(int(node_id.removeprefix("node-"))).home.glob(
        f".gpu-job-server/*/{node_id}/attempts/{job_id}.1/../../agent.lock"
    )
    agent = json.loads(lock.read_text())
    assert "2 of 2 fit." in two.run("main.py", "check").stdout
    assert json.loads(lock.read_text()) == agent
    release(two, pair, job_id)
    assert two.wait_for(job_id, ADMIN, timeout=TIMEOUT)["attempt"] == 1
    assert [event["event"] for event in two.events(job_id, ADMIN)] == ["submitted", "claimed", "started", "completed"]


# -- launches that fail --------------------------------------------------------------------------------------------


def lock_folder(fleet: Fleet, number: int, mode: int) -> None:
    """Set the mode of the folders in which attempts would be made."""
    for path in fleet.node(number).home.glob(".gpu-job-server/*/*/attempts"):
        path.chmod(mode)


DAMAGE: dict[str, tuple[Callable[[Fleet, int], None], Callable[[Fleet, int], None]]] = {
    "interpreter-removed": (Fleet.break_python, Fleet.mend_python),
    "folder-read-only": (
        lambda fleet, number: lock_folder(fleet, number, 0o500),
        lambda fleet, number: lock_folder(fleet, number, 0o700),
    ),
}


@pytest.fixture(params=list(DAMAGE))
def damage(request: pytest.FixtureRequest, pair: Fleet) -> Iterator[Callable[[int], None]]:
    """Breaks a node after the server has connected to it; mended afterwards."""
    do, undo = DAMAGE[request.param]
    yield lambda number: do(pair, number)
    for node in pair.nodes:
        undo(pair, node.number)


def admin_node(server: Server, node_id: str) -> dict[str, Any]:
    """A node as an admin sees it."""
    found: list[dict[str, Any]] = server.get("/api/nodes", ADMIN).json()["nodes"]
    return next(node for node in found if node["node_id"] == node_id)


def test_job_that_a_node_cannot_start_runs_elsewhere(two: Server, pair: Fleet, damage: Callable[[int], None]) -> None:
    before = admin_node(two, "node-1")
    damage(1)
    # Both nodes are idle, and the one job keeps node 2: whoever comes to node 1 must move.
    jobs = [two.submit(ADMIN, HOLD) for _ in range(2)]

    def moved() -> str | None:
        return next((job for job in jobs if "requeued" in [event["event"] for event in two.events(job, ADMIN)]), None)

    refused: str = wait_until(moved, TIMEOUT, "a job to be refused by node 1")
    release(two, pair, *jobs)
    for job_id in jobs:
        status = two.wait_for(job_id, ADMIN, timeout=TIMEOUT)
        assert (status["status"], status["node_id"], status["failure_reason"]) == ("completed", "node-2", None)
        assert two.results(job_id, ADMIN)["stdout"] == "held\n"
    story = two.events(refused, ADMIN)
    (requeued,) = [event for event in story if event["event"] == "requeued"]
    assert (requeued["reason"], requeued["node_id"], requeued["attempt"]) == ("launch_failed", "node-1", 1)
    assert "could not be started on node-1" in requeued["message"]
    assert [event["event"] for event in story].count("started") == 1
    assert two.status(refused, ADMIN)["attempt"] == 2
    after = admin_node(two, "node-1")
    assert after["infra_failures"] > before["infra_failures"]
    assert after["jobs_failed"] == before["jobs_failed"]


def test_job_that_no_node_can_start_fails_with_the_reason(
    two: Server, pair: Fleet, damage: Callable[[int], None]
) -> None:
    for node in pair.nodes:
        damage(node.number)
    job_id = two.submit(ADMIN)
    status = two.wait_for(job_id, ADMIN, timeout=TIMEOUT)
    assert (status["status"], status["failure_reason"], status["attempt"]) == ("failed", "launch_failed", 3)
    assert status["exit_code"] is None
    assert "could not be started on node-" in status["message"]
    assert "Given up after 3 attempts; this was not your code's fault. Submit it again." in status["message"]
    story = [(event["event"], event["node_id"]) for event in two.events(job_id, ADMIN)]
    tried = [node_id for event, node_id in story if event == "claimed"]
    assert len(tried) == 3
    assert tried[0] != tried[1] != tried[2]
    assert "started" not in [event for event, _ in story]
    for undo in (undo for _, undo in DAMAGE.values()):
        for node in pair.nodes:
            undo(pair, node.number)
    assert two.run_job(ADMIN)["status"] == "completed"


# -- ways to name nodes --------------------------------------------------------------------------------------------


def by_alias(fleet: Fleet, **settings: str) -> dict[str, str]:
    """Settings that leave everything but names to an ssh configuration file."""
    names = ("SSH_KNOWN_HOSTS", "NODE_PYTHON")
    common = {name: value for name, value in fleet.settings().items() if name in names}
    return {**common, "SSH_CONFIG_FILE": str(fleet.ssh_config), **settings}


@pytest.mark.parametrize("way", ["jump", "aliases", "pattern"])
def test_nodes_behind_a_jump_host_run_jobs(behind_jump: Fleet, way: str) -> None:
    settings = {
        "jump": behind_jump.settings(),
        "aliases": by_alias(behind_jump, GPU_NODES='[{"host": "node1"}, {"host": "node2"}]'),
        "pattern": by_alias(behind_jump, GPU_NODE_HOST="node{i}", NUM_GPU_NODES="2"),
    }[way]
    with serving(settings) as server:
        found = completed_at_once(server, behind_jump)
        assert {node_id: words[0] for node_id, words in found.items()} == {
            f"node-{number}": str(uid_of(behind_jump, number)) for number in (1, 2)
        }
        address = admin_node(server, "node-1")["address"]
        assert behind_jump.jump is not None
        assert address == f"{behind_jump.jump.address},{behind_jump.node(1).address}"


@pytest.mark.parametrize("way", ["one-gpu-each", "as-listed"])
def test_nodes_of_one_host_share_its_gpus(behind_jump: Fleet, way: str) -> None:
    ((whole,),) = [json.loads(behind_jump.node(1).gpu_path.read_text())["gpus"]]
    behind_jump.set_gpu(1, gpus=[{**whole, "index": n, "uuid": f"GPU-{n}"} for n in range(3)])
    one_each = {"GPU_NODE_HOST": "node1", "NUM_GPU_NODES": "2"}
    listed = {"GPU_NODES": '[{"host": "node1", "gpus": [2, 0]}, {"host": "node1", "gpus": [1]}]'}
    settings, wanted = {"one-gpu-each": (one_each, ["0", "1"]), "as-listed": (listed, ["2,0", "1"])}[way]
    try:
        with serving(by_alias(behind_jump, **settings)) as server:
            found = completed_at_once(server, behind_jump)
    finally:
        behind_jump.set_gpu(1, gpus=[whole])
    uid = str(uid_of(behind_jump, 1))
    assert found == {"node-1": [uid, wanted[0]], "node-2": [uid, wanted[1]]}


# -- logging in and bringing the agent -----------------------------------------------------------------------------

NOISE = """echo "Welcome to the cluster"
for word in 1 2 3; do echo "gpu-job-server is a fine program $word"; done
echo "Your quota is low" >&2
printf 'Last login: never '
"""


@pytest.fixture
def noisy(pair: Fleet) -> Iterator[Path]:
    """Node 1 runs a script at each login, which sshd does before the command: its file."""
    script = pair.node(1).home / ".ssh" / "rc"
    script.parent.mkdir(mode=0o755, exist_ok=True)
    script.write_text(NOISE)
    yield script
    script.unlink()


def test_agent_is_copied_once_and_login_scripts_may_print(noisy: Path, pair: Fleet) -> None:
    entry = json.loads(pair.settings()["GPU_NODES"])[0]
    folder = pair.node(1).home / "copied-here" / "agent"  # new: nothing was ever copied there
    settings = {**pair.settings(), "GPU_NODES": json.dumps([entry, entry]), "NODE_DIR": "copied-here"}
    assert pair.ssh(1, "true").stdout.startswith("Welcome")
    with serving(settings) as server:
        assert server.run_job(ADMIN)["status"] == "completed"
        (copy,) = folder.iterdir()
        assert re.fullmatch(r"[0-9a-f]{16}\.py", copy.name)
        before = copy.stat()
        assert server.terminate() == 0
        server.start()
        assert server.run_job(ADMIN)["stdout"] == "hello\n"
        assert "WARNING worker" not in server.log()  # no connection broke, neither at words on stdout nor on stderr
    (copy,) = folder.iterdir()
    after = copy.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_login_script_that_prints_without_end_is_named(noisy: Path, pair: Fleet) -> None:
    noisy.write_text("while echo 'never ending'; do :; done\n")
    found = findings(check(pair.settings()))
    assert found["node-1"][0] == "FAIL"
    assert "login scripts print without end" in found["node-1"][1]
    assert found["node-2"][0] == "ok"


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SERVER_PORT", "abc", "integer"),
        ("SANDBOX", "maybe", "'auto', 'required' or 'off'"),
        ("GPU_NODES", "not json", "must be a JSON list"),
        ("JOB_COMMAND", "{python} {solution}", "unknown placeholder {solution}"),
        ("DATABASE_URL", "foo", "sqlite:///PATH"),
        ("NODE_PING_TIMEOUT", "3", "must be larger than NODE_PING_INTERVAL"),
    ],
)
def test_wrong_setting_stops_the_start_with_a_sentence_that_names_it(
    stopped: Server, name: str, value: str, says: str
) -> None:
    before = dict(stopped.settings)
    stopped.settings[name] = value
    try:
        result = stopped.run("main.py", code=1)
    finally:
        stopped.settings = before
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("main.py: Wrong setting: ")
    assert name in sentence
    assert says in sentence


def test_misspelt_name_in_the_env_file_is_pointed_out_at_the_start() -> None:
    with FreshCopy() as copy:
        (copy.folder / ".env").write_text("GPU_NODE_HOSTS=gpu-{i}.lab\nNUM_GPU_NODES=1\n")
        log = copy.folder / "server.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "main.py"],
                cwd=copy.folder,
                env=copy.environment(SERVER_PORT=str(copy.port)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: "listening on" in log.read_text(), TIMEOUT, "the server to listen")
        finally:
            process.terminate()
            process.wait(TIMEOUT)
        said = log.read_text()
    assert "GPU_NODE_HOSTS is no setting; did you mean GPU_NODE_HOST?" in said
    assert "1 nodes on this machine" in said


@pytest.mark.parametrize("nodes", ["pair", "behind_jump"])
def test_a_closed_connection_ends_its_thread_at_once(
    nodes: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """While it is silent Paramiko's thread looks up only every SOCKET_LOOK seconds; closing must not wait for that."""
    fleet: Fleet = request.getfixturevalue(nodes)
    words = {name.lower(): value for name, value in fleet.settings().items()}
    words["gpu_nodes"] = json.loads(words["gpu_nodes"])
    settings = config.load(_env_file=None, jobs_dir=tmp_path, sandbox="off", **words)
    executor = make_executors(settings, "test")[0]
    before = set(threading.enumerate())
    took = []
    for _ in range(3):
        connection = executor.connect()
        theirs = [thread for thread in set(threading.enumerate()) - before if isinstance(thread, Transport)]
        assert theirs
        time.sleep(0.3)  # they wait on their sockets now
        fleet.freeze(1)  # a node that still answers would wake them
        try:
            closed = time.monotonic()
            connection.close()
            for thread in theirs:
                thread.join(TIMEOUT)
            took.append(time.monotonic() - closed)
        finally:
            fleet.thaw(1)
    assert max(took) < ssh_executor.SOCKET_LOOK / 2
