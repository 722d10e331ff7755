"""The node agent, driven as it is on a node: a process of its own, spoken to over its stdin and stdout.

Every test has its own root folder. Nothing sleeps to synchronise: tests wait for messages or facts.
Tests of the sandbox need bubblewrap (Debian: `apt-get install bubblewrap`) and say so when they are skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node_agent import AGENT_SOURCE, AGENT_VERSION, PROTOCOL
from node_agent import agent as agent_module
from tests.fleet import descendants, suspend

AGENT = Path(__file__).resolve().parent.parent / "node_agent" / "agent.py"
# The interpreter itself, not a shim or a venv's link: what a probe would have found.
PYTHON = os.path.realpath(sys.executable)
PREFIXES = sorted({sys.base_prefix, sys.prefix})
QUICK = [PYTHON, "-I", "-S", "-u", "solution.py"]
PATIENCE = 20.0
Json = dict[str, Any]
Message = tuple[Json, bytes]


def clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def eventually(fact: Callable[[], bool], what: str) -> None:
    """Wait for something that sends no message."""
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline, f"it never came true: {what}"
        select.select([], [], [], 0.005)


def processes_with(marker: str) -> list[int]:
    """Living processes whose command line or environment has the marker. Zombies have neither."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            for part in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    if marker.encode() in Path(f"/proc/{name}/{part}").read_bytes():
                        found.append(int(name))
                        break
    return found


def identity(pid: int) -> str | None:
    """A living process's start time; None when there is none (or a zombie)."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def is_gone(pid: int) -> bool:
    return identity(pid) is None


class Client:
    """The server's end of one agent."""

    def __init__(self, root: Path, *words: str, source: Path = AGENT, **options: Any) -> None:
        argv = [PYTHON, "-I", "-S", str(source), "serve", "--root", str(root), "--tag", AGENT_VERSION, *words]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **options)
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        self.buffer = bytearray()
        self.pushes: list[Message] = []
        self.replies: dict[Any, Message] = {}
        self.last_id = 0

    def _fill(self, deadline: float) -> None:
        ready, _, _ = select.select([self.output], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "the agent said nothing in time"
        data = os.read(self.output.fileno(), 1 << 20)
        if not data:
            raise EOFError("the agent has ended")
        self.buffer += data

    def read(self, deadline: float) -> Message:
        """The next message, whatever it is."""
        while b"\n" not in self.buffer:
            self._fill(deadline)
        line, _, _ = self.buffer.partition(b"\n")
        header = json.loads(line)
        size = header.get("size", 0)
        while len(self.buffer) < len(line) + 1 + size:
            self._fill(deadline)
        payload = bytes(self.buffer[len(line) + 1 : len(line) + 1 + size])
        del self.buffer[: len(line) + 1 + size]
        return header, payload

    def _take(self, deadline: float) -> None:
        message = self.read(deadline)
        if "push" in message[0]:
            self.pushes.append(message)
        else:
            self.replies[message[0]["re"]] = message

    def send(self, op: str, payload: bytes = b"", **fields: Any) -> int:
        self.last_id += 1
        header = {"op": op, "id": self.last_id, **fields}
        if payload:
            header["size"] = len(payload)
        view = memoryview(json.dumps(header).encode() + b"\n" + payload)
        while view:
            view = view[self.input.write(view) :]
        return self.last_id

    def reply(self, number: Any) -> Message:
        deadline = time.monotonic() + PATIENCE
        while number not in self.replies:
            self._take(deadline)
        return self.replies.pop(number)

    def ask(self, op: str, payload: bytes = b"", **fields: Any) -> Json:
        return self.reply(self.send(op, payload, **fields))[0]

    def push(self, accept: Callable[[Json], bool]) -> Message:
        """The first push not yet taken that is accepted; it is taken."""
        deadline, seen = time.monotonic() + PATIENCE, 0
        while True:
            for index in range(seen, len(self.pushes)):
                if accept(self.pushes[index][0]):
                    return self.pushes.pop(index)
            seen = len(self.pushes)
            self._take(deadline)

    def launch(self, job: str, code: str | bytes, **changes: Any) -> Json:
        payload = code.encode() if isinstance(code, str) else code
        return self.ask("launch", payload, **launch_fields(job, **changes))

    def exit(self, job: str, attempt: int = 1) -> Message:
        return self.push(lambda push: push["push"] == "exit" and (push["job"], push["attempt"]) == (job, attempt))

    def output_until_exit(self, job: str) -> tuple[dict[str, bytes], Json, bytes]:
        """All output pushed, checked to be gapless, and the exit push."""
        final, payload = self.exit(job)
        return self.output_of(job), final, payload

    def output_of(self, job: str) -> dict[str, bytes]:
        kept: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        begin: dict[str, int] = {}
        for push, data in [entry for entry in self.pushes if entry[0]["job"] == job]:
            stream = push["stream"]
            begin.setdefault(stream, push["offset"])
            assert push["offset"] == begin[stream] + len(kept[stream])
            kept[stream] += data
        self.pushes = [entry for entry in self.pushes if entry[0]["job"] != job]
        return kept

    def run(self, job: str, code: str | bytes, **changes: Any) -> tuple[dict[str, bytes], Json, bytes]:
        reply = self.launch(job, code, **changes)
        assert reply["ok"], reply
        return self.output_until_exit(job)

    def close(self) -> None:
        self.input.close()
        self.process.wait(PATIENCE)
        self.output.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.input.close()
        self.output.close()


def launch_fields(job: str, **changes: Any) -> Json:
    """A launch request; changes to `limits`, `sandbox` and the spec are merged."""
    limits: Json = {"wall_seconds": 60, "grace_seconds": 2, "output_bytes": 64 << 20, "result_bytes": 64 << 20}
    limits.update(processes=4096, open_files=1024, file_bytes=1 << 40)
    sandbox: Json = {"mode": "none", "network": "none", "binds": [], "gpus": None, "python_prefixes": PREFIXES}
    limits.update(changes.pop("limits", {}))
    sandbox.update(changes.pop("sandbox", {}))
    spec = {"argv": QUICK, "env": {"JOB_ID": job}, "limits": limits, "sandbox": sandbox}
    spec.update({key: changes.pop(key) for key in ("argv", "env", "results_name", "prestart") if key in changes})
    fields: Json = {"job": job, "attempt": 1, "not_after": clock() + 60, "lease_until": None, "spec": spec}
    fields.update(changes)
    return fields


def sandbox_problem() -> str:
    """Why sandbox tests cannot run here; empty if they can."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is missing (Debian: apt-get install bubblewrap)"
    argv = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    done = subprocess.run(argv, capture_output=True, text=True)
    return f"bubblewrap does not work here: {done.stderr.strip()}" if done.returncode else ""


SANDBOX_PROBLEM = sandbox_problem()
needs_bwrap = pytest.mark.skipif(bool(SANDBOX_PROBLEM), reason=SANDBOX_PROBLEM or "bubblewrap works")
BWRAP = {"sandbox": {"mode": "bwrap"}}
MODES = [pytest.param({}, id="plain"), pytest.param(BWRAP, id="bwrap", marks=needs_bwrap)]


class Node:
    """One root folder and the agents started on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clients: list[Client] = []

    def connect(self, *words: str, **options: Any) -> Client:
        self.clients.append(Client(self.root, *words, **options))
        return self.clients[-1]

    def path(self, job: str, *parts: str) -> Path:
        return self.root.joinpath("attempts", f"{job}.1", *parts)

    def output(self, job: str, stream: str) -> bytes:
        """What is kept; its file is made when there is something."""
        path = self.path(job, stream)
        return path.read_bytes() if path.exists() else b""

    def supervisor(self, job: str) -> int:
        return int(json.loads(self.path(job, "supervisor.json").read_text())["pid"])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node; afterwards no process of it may live and the agents' log must be free of tracebacks."""
    root = tmp_path / "agent"
    node = Node(root)
    yield node
    for client in node.clients:
        with contextlib.suppress(OSError):
            client.close()
    for supervisor in root.glob("attempts/*/supervisor.json"):
        known = json.loads(supervisor.read_text())
        if identity(known["pid"]) == str(known["start_time"]):  # a test failed half-way: end what it left
            os.kill(known["pid"], signal.SIGTERM)
    eventually(lambda: not processes_with(str(root)), f"no process of {root} lives")
    log = (root / "agent.log").read_text() if (root / "agent.log").exists() else ""
    assert "Traceback" not in log, log


@pytest.fixture
def agent(node: Node) -> Client:
    return node.connect()


# ------------------------------------------------------------------------------------------------ the conversation


def test_version_is_the_hash_of_the_source() -> None:
    assert hashlib.sha256(AGENT_SOURCE).hexdigest().startswith(AGENT_VERSION)
    assert AGENT.read_bytes() == AGENT_SOURCE


def test_hello_introduces_the_node(agent: Client) -> None:
    hello = agent.ask("hello")
    assert hello["ok"]
    assert hello["protocol"] == PROTOCOL
    assert hello["agent_version"] == AGENT_VERSION
    assert hello["pid"] == agent.process.pid
    assert hello["uid"] == os.getuid()
    assert hello["attempts"] == []
    assert hello["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(hello["clock"] - clock()) < 5


def test_it_runs_from_a_bootstrap_without_a_file(tmp_path: Path) -> None:
    source = f"import sys; sys.argv = ['agent', 'serve', '--root', {str(tmp_path)!r}]; "
    source += f"exec(compile(open({str(AGENT)!r}).read(), 'agent', 'exec'))"
    request = b'{"op":"ping","id":7}\n{"op":"stop","id":8}\n'
    done = subprocess.run([PYTHON, "-I", "-S", "-c", source], input=request, capture_output=True, timeout=PATIENCE)
    assert [json.loads(line)["re"] for line in done.stdout.splitlines()] == [7, 8]
    assert done.returncode == 0


GARBAGE = [
    b"\n",
    b"hello\n",
    b"\xff\xfe\x00\n",
    b"[1,2]\n",
    b'"text"\n',
    b"[" * 100_000 + b"\n",
    b'{"op":"ping","id":1,"size":-1}\n',
    b'{"op":"ping","id":1,"size":"x"}\n',
    b'{"op":"ping","id":1,"size":99999999999}\n',
    b"x" * (5 << 20) + b"\n",
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: repr(line[:30]))
def test_garbage_is_answered_and_survived(agent: Client, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[agent.input.write(view) :]
    error, _ = agent.reply(None)
    assert (error["ok"], error["error"]) == (False, "bad_request")
    assert agent.ask("ping")["ok"]


BAD_REQUESTS: list[Json] = [
    {"op": "launch"},
    {"op": "nothing"},
    {"op": 5},
    {"op": "follow", "job": "../x", "attempt": 1},
    {"op": "follow", "job": "a" * 65, "attempt": 1},
    {"op": "follow", "job": "a\n", "attempt": 1},
    {"op": "follow", "job": "a", "attempt": 0},
    {"op": "follow", "job": "a", "attempt": True},
    {"op": "forget", "job": "..", "attempt": 1},
    {"op": "fetch", "job": "a", "attempt": 1, "what": "spec.json", "offset": 0, "length": 1},
    {"op": "kill", "job": "a", "attempt": 1, "reason": "whim"},
    {"op": "ping", "lease_until": "soon"},
    {"op": "launch", **launch_fields("a", argv=[])},
    {"op": "launch", **launch_fields("a", argv=["a\0b"])},
    {"op": "launch", **launch_fields("a", argv=["\ud800"])},
    {"op": "launch", **launch_fields("a", env={"A=B": "c"})},
    {"op": "launch", **launch_fields("a", results_name="../x")},
    {"op": "launch", **launch_fields("a", limits={"wall_seconds": float("nan")})},
]


@pytest.mark.parametrize("fields", BAD_REQUESTS, ids=[f"request-{number}" for number in range(len(BAD_REQUESTS))])
def test_bad_fields_are_refused(agent: Client, fields: Json) -> None:
    fields = dict(fields)
    reply = agent.ask(fields.pop("op"), **fields)
    assert (reply["ok"], reply["error"]) == (False, "bad_request")
    assert reply["message"]
    assert agent.ask("list")["attempts"] == []


def test_unknown_attempts(agent: Client) -> None:
    assert agent.ask("follow", job="a", attempt=1)["error"] == "unknown_attempt"
    assert agent.ask("kill", job="a", attempt=1)["error"] == "not_running"
    assert agent.ask("forget", job="a", attempt=1)["ok"]


# ------------------------------------------------------------------------------------------------ outcomes


@pytest.mark.parametrize("mode", MODES)
def test_a_job_that_does_nothing(node: Node, agent: Client, mode: Json) -> None:
    output, final, payload = agent.run("noop", "pass", **mode)
    record = final["record"]
    assert (record["exit_code"], record["signal"], record["reason"]) == (0, None, None)
    assert output == {"stdout": b"", "stderr": b""}
    assert final["results"] == {"state": "absent"}
    assert payload == b""
    assert record["survivors"] == 0
    assert record["stdout_sha256"] == hashlib.sha256(b"").hexdigest()
    entry = agent.ask("list")["attempts"][0]
    assert (entry["job"], entry["attempt"], entry["state"]) == ("noop", 1, "ended")
    assert entry["record"] == record
    eventually(lambda: node.path("noop", "exit.json").exists(), "the record is on disk")
    assert json.loads(node.path("noop", "exit.json").read_text()) == record


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [1, 3, 128, 255])
def test_exit_codes_are_the_jobs_own(agent: Client, mode: Json, code: int) -> None:
    record = agent.run("code", f"import os; os._exit({code})", **mode)[1]["record"]
    assert (record["exit_code"], record["signal"], record["reason"]) == (code, None, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_signals_are_told(agent: Client, mode: Json, number: int) -> None:
    record = agent.run("signal", f"import os; os.kill(os.getpid(), {int(number)}) or input()", **mode)[1]["record"]
    assert (record["exit_code"], record["signal"], record["reason"]) == (None, number, None)


@pytest.mark.parametrize("mode", MODES)
def test_output_is_kept_byte_by_byte(agent: Client, mode: Json) -> None:
    code = "import os; os.write(1, bytes(range(256)) * 40); os.write(2, b'\\xff\\x00\\x1b[31m'); os.write(1, b'end')"
    output, final, _ = agent.run("bytes", code, **mode)
    assert output == {"stdout": bytes(range(256)) * 40 + b"end", "stderr": b"\xff\x00\x1b[31m"}
    for stream, data in output.items():
        assert final["record"][f"{stream}_bytes"] == len(data)
        assert final["record"][f"{stream}_sha256"] == hashlib.sha256(data).hexdigest()
        assert final["record"][f"{stream}_truncated"] is False


def test_output_comes_while_the_job_runs(node: Node, agent: Client) -> None:
    code = "import os\nos.write(1, b'first\\n')\nwhile not os.path.exists('go'): pass\nprint('second')"
    assert agent.launch("live", code)["ok"]
    push, data = agent.push(lambda push: push["push"] == "output")
    assert (push["stream"], push["offset"], data) == ("stdout", 0, b"first\n")
    assert agent.ask("list")["attempts"][0]["state"] == "running"
    assert agent.ask("forget", job="live", attempt=1)["error"] == "still_running"
    node.path("live", "work", "go").touch()
    assert agent.output_until_exit("live")[0]["stdout"] == b"second\n"


def test_five_megabytes_on_stderr(agent: Client) -> None:
    code = "import sys\nfor i in range(5): sys.stderr.buffer.write(bytes([65 + i]) * (1 << 20))\nprint('done')"
    output, final, _ = agent.run("loud", code)
    assert output["stderr"] == b"".join(bytes([65 + i]) * (1 << 20) for i in range(5))
    assert output["stdout"] == b"done\n"
    assert final["record"]["exit_code"] == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_is_cut_and_the_job_goes_on(node: Node, agent: Client, stream: str) -> None:
    code = f"import sys, os\nfor _ in range(512): sys.{stream}.buffer.write(b'x' * (1 << 18))\n"
    code += "open('results.jsonl', 'w').write('{}')"
    output, final, payload = agent.run("flood", code, limits={"output_bytes": 100_000})
    record = final["record"]
    assert output[stream] == b"x" * 100_000
    assert record[f"{stream}_truncated"] is True
    assert record[f"{stream}_bytes"] == 100_000
    assert record[f"{stream}_produced"] == 128 << 20
    assert node.path("flood", stream).stat().st_size == 100_000
    assert (record["exit_code"], payload) == (0, b"{}")


@pytest.mark.parametrize("mode", MODES)
def test_a_nice_agent_has_nice_jobs(node: Node, mode: Json) -> None:
    agent = node.connect("--nice", "10", start_new_session=True)
    agent.launch("nice", "import os\nwhile True:\n    os.write(1, b'x' * 65536)", **mode)
    supervisor = node.supervisor("nice")
    ours = [agent.process.pid, supervisor, *(process.pid for process in descendants(supervisor))]
    assert len(ours) > 2
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in ours} == {10}

    def sessions_are_nice() -> bool:
        return all(Path(f"/proc/{pid}/autogroup").read_text().endswith(" nice 10\n") for pid in ours)

    # Others than root may be too quick for the kernel, see `share_as_nice`.
    if os.geteuid() == 0 and Path("/proc/self/autogroup").exists() and Path("/proc/self/autogroup").read_text():
        eventually(sessions_are_nice, "every session counts as little as its processes")
    agent.ask("kill", job="nice", attempt=1, reason="cancelled", grace=0)
    agent.exit("nice")


def test_the_supervisor_stays_small_under_a_flood(node: Node, agent: Client) -> None:
    code = "import os\nprint('x', flush=True)\nwhile True: os.write(1, b'y' * 65536)"
    assert agent.launch("huge", code, limits={"output_bytes": 1 << 20})["ok"]
    eventually(lambda: len(node.output("huge", "stdout")) == 1 << 20, "the cap is reached")
    status = Path(f"/proc/{node.supervisor('huge')}/status").read_text()
    anonymous = int(status.partition("RssAnon:")[2].split()[0])
    assert anonymous < 32 << 10  # KiB
    assert agent.ask("ping")["ok"]
    agent.ask("kill", job="huge", attempt=1, reason="cancelled", grace=0)
    assert agent.exit("huge")[0]["record"]["stdout_bytes"] == 1 << 20


def test_a_server_that_does_not_read_costs_no_memory_and_stops_nobody(node: Node, agent: Client) -> None:
    code = "import sys\nfor _ in range(40): sys.stdout.buffer.write(b'z' * (1 << 20))"
    reply = agent.launch("unread", code)
    assert reply["ok"]
    eventually(lambda: node.path("unread", "exit.json").exists(), "the job ends although nobody reads")
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    assert int(status.partition("RssAnon:")[2].split()[0]) < 32 << 10
    output, final, _ = agent.output_until_exit("unread")
    assert hashlib.sha256(output["stdout"]).hexdigest() == final["record"]["stdout_sha256"]


def test_a_missing_interpreter(agent: Client) -> None:
    reply = agent.launch("none", "pass", argv=["/no/such/python", "solution.py"])
    assert (reply["ok"], reply["error"]) == (False, "launch_failed")
    assert "/no/such/python" in reply["message"]
    entry = agent.ask("list")["attempts"][0]
    assert (entry["state"], entry["record"]["reason"]) == ("ended", "launch_failed")
    assert entry["record"]["exit_code"] is None


@needs_bwrap
def test_a_missing_interpreter_in_the_sandbox(agent: Client) -> None:
    reply = agent.launch("none", "pass", argv=["/no/such/python", "solution.py"], **BWRAP)
    assert (reply["ok"], reply["error"]) == (False, "launch_failed")
    assert "/no/such/python" in reply["message"]


def test_a_sandbox_that_cannot_be_set_up(node: Node, tmp_path: Path) -> None:
    tool = tmp_path / "bwrap"
    tool.touch(0o755)
    tool.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    agent = node.connect(env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    reply = agent.launch("boxless", "pass", **BWRAP)
    assert (reply["ok"], reply["error"]) == (False, "launch_failed")
    assert "No permissions" in reply["message"]
    seen = agent.ask("probe", python=PYTHON, sandbox="auto", gpus=None, binds=[], network="none")["sandbox"]
    assert (seen["works"], seen["bubblewrap"]) == (False, str(tool))
    assert "No permissions" in seen["reason"]


def test_a_full_disk_keeps_the_exit_record(node: Node, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "agent"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        agent = node.connect()
        code = "import os\nf = open('fill', 'wb', 0)\ntry:\n while True: f.write(b'x' * 4096)\n"
        code += "except OSError: pass\nprint('full' * 5000, flush=True)"
        _, final, _ = agent.run("full", code)
        record = final["record"]
        assert record["exit_code"] == 0
        assert record["stdout_truncated"]
        assert "space" in record["output_error"]
        eventually(lambda: node.path("full", "exit.json").exists(), "the record is kept")
        assert json.loads(node.path("full", "exit.json").read_text()) == record
        reply = agent.launch("next", b"#" * (1 << 20))
        assert reply["error"] == "disk_full"
        assert agent.ask("forget", job="full", attempt=1)["ok"]
        eventually(lambda: not any(disk.joinpath("trash").iterdir()), "the trash is empty")
        assert agent.run("again", "pass")[1]["record"]["exit_code"] == 0
        agent.close()
        eventually(lambda: not processes_with(str(disk)), "nothing uses the disk")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ------------------------------------------------------------------------------------------------ ending jobs

DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open('daemon', 'w').write(str(os.getpid()))
        while True: time.sleep(1)
    os._exit(0)
while not os.path.exists('daemon') or not open('daemon').read(): pass
print('parent ends', flush=True)
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_daemon_holding_stdout_ends_with_the_job(node: Node, agent: Client, mode: Json) -> None:
    output, final, _ = agent.run("daemon", DAEMON, **mode)
    assert output["stdout"] == b"parent ends\n"
    assert final["record"]["exit_code"] == 0
    assert final["record"]["survivors"] == 0
    assert final["record"]["wall_seconds"] < 10
    if not mode:
        assert identity(int(node.path("daemon", "work", "daemon").read_text())) is None


STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\nwhile True: time.sleep(1)"
POLITE = (
    "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit('bye'))\n"
    "print('on', flush=True)\nwhile True: time.sleep(1)"
)


@pytest.mark.parametrize("mode", MODES)
def test_a_job_that_ignores_sigterm_is_killed_after_the_grace(agent: Client, mode: Json) -> None:
    agent.launch("deaf", STUBBORN, **mode)
    agent.push(lambda push: push["push"] == "output")
    begin = clock()
    assert agent.ask("kill", job="deaf", attempt=1, reason="cancelled", grace=0.3)["ok"]
    record = agent.exit("deaf")[0]["record"]
    assert (record["signal"], record["exit_code"], record["reason"]) == (signal.SIGKILL, None, "cancelled")
    assert 0.3 <= record["ended_clock"] - begin < 3
    assert agent.ask("kill", job="deaf", attempt=1, reason="cancelled", grace=0)["error"] == "not_running"


@pytest.mark.parametrize("mode", MODES)
def test_a_job_may_end_politely_within_the_grace(agent: Client, mode: Json) -> None:
    agent.launch("polite", POLITE, **mode)
    agent.push(lambda push: push["push"] == "output")
    assert agent.ask("kill", job="polite", attempt=1, reason="superseded", grace=15)["ok"]
    output, final, _ = agent.output_until_exit("polite")
    assert output["stderr"] == b"bye\n"
    assert (final["record"]["exit_code"], final["record"]["reason"]) == (1, "superseded")


@pytest.mark.parametrize("mode", MODES)
def test_the_time_limit(agent: Client, mode: Json) -> None:
    record = agent.run("slow", STUBBORN, limits={"wall_seconds": 0.5, "grace_seconds": 0.2}, **mode)[1]["record"]
    assert record["reason"] == "timeout"
    assert 0.7 <= record["wall_seconds"] < 4


def test_the_time_limit_strikes_without_an_agent(node: Node, agent: Client) -> None:
    agent.launch("alone", STUBBORN, limits={"wall_seconds": 0.5, "grace_seconds": 0})
    agent.kill()
    eventually(lambda: node.path("alone", "exit.json").exists(), "the supervisor ends the job by itself")
    assert json.loads(node.path("alone", "exit.json").read_text())["reason"] == "timeout"


def test_a_lease_that_runs_out_kills(agent: Client) -> None:
    record = agent.run("leased", STUBBORN, lease_until=clock() + 0.5, limits={"grace_seconds": 0})[1]["record"]
    assert record["reason"] == "lease_expired"


def test_a_ping_renews_or_shortens_the_lease(agent: Client) -> None:
    agent.launch("renewed", STUBBORN, lease_until=clock() + 30, limits={"grace_seconds": 0})
    assert agent.ask("ping", lease_until=None)["ok"]
    assert agent.ask("ping")["clock"] == pytest.approx(clock(), abs=5)
    assert agent.ask("list")["attempts"][0]["state"] == "running"
    assert agent.ask("ping", lease_until=clock())["ok"]
    assert agent.exit("renewed")[0]["record"]["reason"] == "lease_expired"


def test_sigterm_to_the_supervisor_ends_its_job(node: Node, agent: Client) -> None:
    agent.launch("termed", POLITE)
    agent.push(lambda push: push["push"] == "output")
    os.kill(node.supervisor("termed"), signal.SIGTERM)
    assert agent.exit("termed")[0]["record"]["reason"] == "supervisor_terminated"


# They end by themselves, so that one that gets away does not trouble the tests after this one for ever.
HOPPERS = """
import os, time
end = time.monotonic() + 30
for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        while time.monotonic() < end:
            if os.fork(): os._exit(0)
        os._exit(0)
print('hopping', flush=True)
time.sleep(0.2)
"""
# Each in a session of its own: no signal to a group reaches them all.
SESSION_HOPPERS = HOPPERS.replace("if os.fork(): os._exit(0)\n", "if os.fork(): os._exit(0)\n            os.setsid()\n")


@pytest.mark.parametrize("code", [HOPPERS, SESSION_HOPPERS], ids=["of-one-group", "of-many-sessions"])
@pytest.mark.parametrize("mode", MODES)
def test_processes_that_fork_all_the_time(agent: Client, mode: Json, code: str) -> None:
    assert agent.run("hop", code, **mode)[1]["record"]["survivors"] == 0


# Its first thread ends, so that it reads as a zombie; another one goes on.
HEADLESS = """
import ctypes, os, threading, time
pid = os.fork()
if pid == 0:
    os.setsid()
    threading.Thread(target=time.sleep, args=(1000,)).start()
    ctypes.CDLL(None).pthread_exit(None)
while ') Z ' not in open(f'/proc/{pid}/stat').read():
    time.sleep(0.01)
print(pid, len(os.listdir(f'/proc/{pid}/task')), flush=True)
"""


def changed_agent(folder: Path, *changes: tuple[str, str]) -> Path:
    """The agent with these replacements: a node that is other than this machine."""
    source = AGENT.read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / "changed_agent.py"
    path.write_text(source)
    return path


def test_process_whose_first_thread_has_ended_is_killed_with_its_job(node: Node, tmp_path: Path) -> None:
    agent = node.connect(source=changed_agent(tmp_path, ("places = group_places()", "places = {}")))  # no groups
    streams, final, _ = agent.run("headless", HEADLESS)
    assert (final["record"]["exit_code"], final["record"]["survivors"]) == (0, 0)
    pid, threads = streams["stdout"].split()
    assert int(threads) == 2
    assert not Path(f"/proc/{int(pid)}").exists()


@pytest.mark.parametrize("code", [HOPPERS, SESSION_HOPPERS], ids=["of-one-group", "of-many-sessions"])
def test_what_lives_on_when_the_attempt_has_ended_is_told_of_until_it_is_gone(
    node: Node, tmp_path: Path, code: str
) -> None:
    agent = node.connect(source=changed_agent(tmp_path, ("KILL_LIMIT = 5.0", "KILL_LIMIT = -1.0")))
    assert agent.run("hop", code)[1]["record"]["survivors"] > 0
    assert agent.ask("forget", job="hop", attempt=1)["ok"]

    def clean() -> bool:
        return not agent.ask("probe", only="clean", idle_mib=1)["survivors"]

    eventually(clean, "the supervisor has ended them, and itself")
    assert not processes_with(str(node.path("hop")))
    assert not list(node.root.glob("survivors.*"))


# ------------------------------------------------------------------------------------------------ surviving the agent

COUNTING = """
import os, sys
i = 0
while not os.path.exists('stop'):
    print('line', i, flush=True); i += 1
print('lines', i)
"""


def test_a_new_agent_goes_on_at_the_byte(node: Node, agent: Client) -> None:
    agent.launch("long", COUNTING)
    agent.push(lambda push: push["offset"] > 0)
    agent.kill()
    first = node.path("long", "stdout").read_bytes()[:10]
    second = node.connect()
    assert [entry["state"] for entry in second.ask("hello")["attempts"]] == ["running"]
    assert second.ask("follow", job="long", attempt=1, stdout=len(first), stderr=0)["state"] == "running"
    second.push(lambda push: push["offset"] == len(first))[1]
    node.path("long", "work", "stop").touch()
    final, _ = second.exit("long")
    assert second.ask("follow", job="long", attempt=1, stdout=len(first), stderr=0)["state"] == "ended"
    second.pushes.clear()
    rest, final, _ = second.output_until_exit("long")
    whole = first + rest["stdout"]
    assert hashlib.sha256(whole).hexdigest() == final["record"]["stdout_sha256"]
    count = int(whole.split()[-1])
    assert whole == b"".join(b"line %d\n" % i for i in range(count)) + b"lines %d\n" % count


TURNS = """
import fcntl, os, struct, termios
for n in range(30):
    for fd, text in ((1, f'out {n};'), (2, f'err {n};')):
        while any(struct.unpack('i', fcntl.ioctl(pipe, termios.FIONREAD, b'    '))[0] for pipe in (1, 2)):
            pass  # until what was written before has been read: then it is certain which came first
        os.write(fd, text.encode())
while not os.path.exists('go'):
    pass
"""


def pieces(agent: Client, job: str) -> list[tuple[str, bytes]]:
    """(stream, bytes) of the output pushed up to the job's exit, neighbours of one stream joined."""
    agent.push(lambda push: push["push"] == "exit" and push["job"] == job)
    found: list[tuple[str, bytes]] = []
    for push, data in agent.pushes:
        same = bool(found) and found[-1][0] == push["stream"]
        found[-1:] = [(push["stream"], found[-1][1] + data)] if same else [*found[-1:], (push["stream"], data)]
    return found


def test_output_is_sent_in_the_order_of_its_coming_also_what_came_without_an_agent(node: Node, agent: Client) -> None:
    expected = [piece for n in range(30) for piece in (("stdout", b"out %d;" % n), ("stderr", b"err %d;" % n))]
    agent.launch("turns", TURNS)
    agent.close()
    eventually(lambda: node.output("turns", "stderr").endswith(b"err 29;"), "the job prints without an agent")
    second = node.connect()
    second.ask("follow", job="turns", attempt=1, stdout=0, stderr=0)
    node.path("turns", "work", "go").touch()
    assert pieces(second, "turns") == expected
    second.pushes.clear()
    second.ask("follow", job="turns", attempt=1, stdout=12, stderr=6)  # between two turns
    assert pieces(second, "turns") == [("stderr", b"err 1;"), *expected[4:]]


TORN_LINE = """
import os, time
os.write(2, b'left ')
while not os.path.exists('go'):
    time.sleep(0.01)
os.write(2, b'right\\n')
os.write(1, b'out\\n')
open('done', 'w').close()
time.sleep(1000)
"""


def test_the_rest_of_a_line_comes_before_what_the_other_stream_printed_after_it(node: Node, agent: Client) -> None:
    agent.launch("torn", TORN_LINE)
    eventually(lambda: node.output("torn", "stderr") == b"left ", "the line's first half is read")
    suspend(node.supervisor("torn"))  # both are in their pipes when it looks again
    node.path("torn", "work", "go").touch()
    eventually(node.path("torn", "work", "done").exists, "everything is printed")
    os.kill(node.supervisor("torn"), signal.SIGCONT)
    agent.ask("kill", job="torn", attempt=1, reason="cancelled", grace=0)
    assert pieces(agent, "torn") == [("stderr", b"left right\n"), ("stdout", b"out\n")]


def test_output_of_an_attempt_without_turns_is_sent_whole(node: Node, agent: Client) -> None:
    agent.launch("older", TURNS)
    eventually(lambda: node.output("older", "stderr").endswith(b"err 29;"), "the job prints")
    agent.close()
    node.path("older", "turns").unlink()  # a supervisor from before makes none
    second = node.connect()
    second.ask("follow", job="older", attempt=1, stdout=7, stderr=0)
    node.path("older", "work", "go").touch()
    out, err = (b"".join(b"%s %d;" % (name, n) for n in range(30)) for name in (b"out", b"err"))
    assert pieces(second, "older") == [("stdout", out[7:]), ("stderr", err)]


def test_an_exit_without_an_agent_is_found_later(node: Node, agent: Client) -> None:
    agent.launch("later", "import os\nwhile not os.path.exists('go'): pass\nprint('went')\nraise SystemExit(4)")
    agent.close()
    node.path("later", "work", "go").touch()
    eventually(lambda: node.path("later", "exit.json").exists(), "the job ends without an agent")
    second = node.connect()
    assert second.ask("follow", job="later", attempt=1, stdout=2, stderr=0)["state"] == "ended"
    output, final, _ = second.output_until_exit("later")
    assert output["stdout"] == b"nt\n"
    assert final["record"]["exit_code"] == 4


def test_launching_twice_runs_once(node: Node, agent: Client) -> None:
    code = "import os\nprint('ran', flush=True)\nwhile not os.path.exists('go'): pass"
    numbers = [agent.send("launch", code.encode(), **launch_fields("once")) for _ in range(4)]
    replies = [agent.reply(number)[0] for number in numbers]
    assert sorted(reply["attached"] for reply in replies) == [False, True, True, True]
    assert {reply["state"] for reply in replies if reply["attached"]} == {"running"}
    node.path("once", "work", "go").touch()
    agent.exit("once")
    assert node.path("once", "stdout").read_bytes() == b"ran\n"
    agent.pushes.clear()  # attaching begins at offset 0 again, each time
    reply = agent.launch("once", code)
    assert (reply["attached"], reply["state"]) == (True, "ended")
    assert agent.output_until_exit("once")[0]["stdout"] == b"ran\n"
    # One folder stands by for the next launch.
    eventually(lambda: len(os.listdir(node.root / "tmp")) <= 1, "the losers' folders are gone")


def test_a_launch_that_comes_too_late(node: Node, agent: Client) -> None:
    reply = agent.launch("late", "pass", not_after=clock() - 1)
    assert (reply["ok"], reply["error"]) == (False, "expired")
    assert not node.path("late").exists()


def test_many_jobs_at_once(agent: Client) -> None:
    numbers = [agent.send("launch", b"print(1)", **launch_fields(f"many-{i}")) for i in range(12)]
    assert all(agent.reply(number)[0]["ok"] for number in numbers)
    assert {agent.exit(f"many-{i}")[0]["record"]["exit_code"] for i in range(12)} == {0}


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_supervisor_takes_everything_along(node: Node, agent: Client, mode: Json) -> None:
    code = DAEMON + "\nimport time\nwhile True: time.sleep(1)"
    agent.launch("orphan", code, **mode)
    # The text and its newline are two writes.
    kept = node.path("orphan", "stdout")
    eventually(lambda: kept.exists() and kept.read_bytes() == b"parent ends\n", "both writes are kept")
    os.kill(node.supervisor("orphan"), signal.SIGKILL)
    _, final, _ = agent.output_until_exit("orphan")
    record = final["record"]
    assert (record["reason"], record["exit_code"], record["survivors"]) == ("supervisor_lost", None, 0)
    assert record["stdout_bytes"] == len(b"parent ends\n")
    assert agent.ask("list")["attempts"][0]["state"] == "lost"
    eventually(lambda: not processes_with(str(node.path("orphan"))), "nothing of the job is left")
    assert agent.ask("forget", job="orphan", attempt=1)["ok"]


@pytest.mark.parametrize("code", [HOPPERS, SESSION_HOPPERS], ids=["of-one-group", "of-many-sessions"])
def test_a_killed_supervisor_takes_along_what_forks_all_the_time(node: Node, agent: Client, code: str) -> None:
    agent.launch("orphans", code + "time.sleep(1000)")
    eventually(lambda: b"hopping" in node.output("orphans", "stdout"), "they fork")
    os.kill(node.supervisor("orphans"), signal.SIGKILL)
    assert agent.exit("orphans")[0]["record"]["survivors"] == 0
    for _ in range(20):  # one look alone may miss them
        assert not processes_with(str(node.path("orphans")))


def test_a_new_agent_displaces_a_hanging_one(node: Node, agent: Client) -> None:
    agent.launch("between", STUBBORN)
    os.kill(agent.process.pid, signal.SIGSTOP)
    second = node.connect()
    assert second.ask("hello")["attempts"][0]["state"] == "running"
    assert agent.process.wait(PATIENCE) == -signal.SIGKILL
    assert second.ask("follow", job="between", attempt=1)["ok"]
    second.ask("kill", job="between", attempt=1, reason="cancelled", grace=0)
    assert second.exit("between")[0]["record"]["reason"] == "cancelled"


HOLD_LOCK = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); input()"


def test_a_lock_that_cannot_be_had_is_fatal(node: Node) -> None:
    node.root.mkdir()
    holder = subprocess.Popen(
        [PYTHON, "-c", HOLD_LOCK, str(node.root / "agent.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    holder.stdout.readline()
    agent = node.connect()  # the lock's holder left no name, so nobody may be killed for it
    push, _ = agent.read(time.monotonic() + PATIENCE)
    assert (push["push"], push["error"]) == ("fatal", "locked")
    assert agent.process.wait(PATIENCE) == 3
    holder.communicate(b"\n")


def ping_for_ever(agent: Client) -> None:
    while True:
        agent.ask("ping")


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_an_agent_whose_folder_was_taken_away_ends_and_says_so_but_not_under_a_job(node: Node, what: str) -> None:
    agent = node.connect()
    agent.launch("held", "import time\ntime.sleep(1)\n")
    node.root.rename(node.root.with_name("away"))
    if what == "replaced":
        node.root.mkdir()
    assert agent.ask("ping")["ok"]
    assert agent.exit("held")[0]["record"]["exit_code"] == 0
    assert agent.ask("ping")["ok"]  # the server may not have taken that end yet
    assert agent.ask("forget", job="held", attempt=1)["ok"]
    with pytest.raises(EOFError):
        ping_for_ever(agent)
    last, _ = agent.pushes[-1]
    assert (last["push"], last["error"]) == ("fatal", "folder_gone")
    assert str(node.root) in last["message"]
    assert agent.process.wait(PATIENCE) == 0
    _, final, _ = node.connect().run("next", "print(1)\n")
    assert final["record"]["exit_code"] == 0


def test_leftovers_of_a_dead_agent_are_cleared(node: Node) -> None:
    for name in ("tmp/half", "trash/old"):
        (node.root / name / "work").mkdir(parents=True)
        (node.root / name / "lock").touch()
    agent = node.connect()
    agent.ask("ping")
    eventually(lambda: not node.root.joinpath("tmp", "half").exists(), "the half attempt is gone")
    agent.close()
    eventually(lambda: not os.listdir(node.root / "tmp") + os.listdir(node.root / "trash"), "the folders are empty")


def test_a_cleaner_between_a_locks_making_and_its_taking_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tmp", "trash", "attempts"):
        (tmp_path / name).mkdir()
    supervisor = agent_module.Supervisor(str(tmp_path), -1, "test")
    take_lock = agent_module.take_lock
    visits: list[int] = []

    def slow_take_lock(directory: int, create: bool = False) -> int | None:
        fd = os.open("lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=directory)
        visits.append(directory)
        if len(visits) < 3:
            with monkeypatch.context() as patch:
                patch.setattr(agent_module, "take_lock", take_lock)
                agent_module.clear_leftovers(str(tmp_path))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    monkeypatch.setattr(agent_module, "take_lock", slow_take_lock)
    with pytest.raises(OSError, match="cleared away"):
        supervisor._prepare()
    supervisor._prepare_again()
    assert len(visits) == 3
    assert os.path.samestat(os.fstat(supervisor.directory), os.stat(supervisor.preparing))
    for fd in (supervisor.lock, supervisor.directory, supervisor.exit_file, supervisor.identity_file):
        assert fd is not None
        os.close(fd)
    supervisor.control.close()


def test_a_killed_spare_supervisor_is_replaced(node: Node, agent: Client) -> None:
    def spares() -> list[Path]:
        """The records of the supervisors that stand by; each is there, empty, a moment before it is written."""
        return [path for path in node.root.glob("tmp/*/supervisor.json") if path.stat().st_size]

    for code in (b"print(1)", b"print(2)"):
        eventually(lambda: bool(spares()), "a supervisor stands by")
        for spare in spares():
            pid = int(json.loads(spare.read_text())["pid"])
            os.kill(pid, signal.SIGKILL)
            eventually(functools.partial(is_gone, pid), "it is dead")
        output = agent.run(f"job{code[6:7].decode()}", code)[0]
        assert output["stdout"] == code[6:7] + b"\n"
        shutil.rmtree(spare.parent)


# ------------------------------------------------------------------------------------------------ results


def test_small_results_come_with_the_exit(agent: Client) -> None:
    _, final, payload = agent.run("small", "import os; open(os.environ['RESULTS_FILE'], 'w').write('{\"a\": 1}\\n')")
    assert payload == b'{"a": 1}\n'
    expected = {"state": "inline", "bytes": 9, "sha256": hashlib.sha256(payload).hexdigest()}
    assert final["results"] == final["record"]["results"] == expected


def test_empty_results_are_not_absent(agent: Client) -> None:
    results = agent.run("empty", "open('results.jsonl', 'w')")[1]["results"]
    assert (results["state"], results["bytes"]) == ("inline", 0)


def test_large_results_are_fetched(agent: Client) -> None:
    _, final, payload = agent.run(
        "large", "f = open('out', 'wb')\nfor i in range(700000): f.write(b'%d\\n' % i)", results_name="out"
    )
    assert payload == b""
    results = final["results"]
    assert results["state"] == "large"
    data = b""
    while len(data) < results["bytes"]:
        number = agent.send("fetch", job="large", attempt=1, what="results", offset=len(data), length=1 << 20)
        reply, part = agent.reply(number)
        assert reply["ok"]
        assert reply["total"] == results["bytes"]
        data += part
    assert hashlib.sha256(data).hexdigest() == results["sha256"]


HOSTILE = {
    "symlink": "os.symlink('/etc/passwd', 'results.jsonl')",
    "fifo": "os.mkfifo('results.jsonl')",
    "hard link": "open('x', 'w').write('{}'); os.link('x', 'results.jsonl')",
    "directory": "os.mkdir('results.jsonl')",
    "socket": "import socket; socket.socket(socket.AF_UNIX).bind('results.jsonl')",
    "parent symlink": "os.chdir('/'); w = os.environ['HOME']; os.rename(w, w + '2'); os.symlink(w + '2', w); "
    "open(w + '2/results.jsonl', 'w').write('{}')",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_results_that_are_no_plain_file(agent: Client, kind: str) -> None:
    _, final, payload = agent.run(
        "evil", f"import os, sys; sys.path.append({STDLIB!r})\n{HOSTILE[kind]}", argv=[PYTHON, "-I", "solution.py"]
    )
    assert final["record"]["exit_code"] == 0, final
    assert final["results"]["state"] == "invalid"
    assert final["results"]["message"]
    assert payload == b""
    reply = agent.ask("fetch", job="evil", attempt=1, what="results", offset=0, length=10)
    assert reply["error"] == "results_invalid"


def test_results_that_are_too_large_are_never_read(agent: Client) -> None:
    code = "f = open('results.jsonl', 'w'); f.truncate(1 << 40)"
    final = agent.run("sparse", code, limits={"result_bytes": 1000})[1]
    assert final["results"]["state"] == "too_large"
    assert final["results"]["bytes"] == 1 << 40
    reply = agent.ask("fetch", job="sparse", attempt=1, what="results", offset=0, length=10)
    assert reply["error"] == "results_too_large"


def test_a_job_that_removes_everything_fails_alone(agent: Client) -> None:
    code = "import os, shutil\nprint('gone', flush=True)\nshutil.rmtree(os.path.dirname(os.environ['HOME']))"
    final = agent.run("vandal", code, argv=[PYTHON, "-I", "solution.py"])[1]
    assert final["results"] == {"state": "absent"}
    assert final["record"]["reason"] is None
    assert agent.ask("forget", job="vandal", attempt=1)["ok"]
    assert agent.run("honest", "print('fine')")[0]["stdout"] == b"fine\n"


# ------------------------------------------------------------------------------------------------ forgetting


def test_forget_removes_whatever_the_job_left(node: Node, agent: Client) -> None:
    code = "import os\nos.makedirs('a/b/c')\nopen('a/b/c/f', 'w')\n"
    code += "for i in range(300): os.mkdir('deep'); os.chdir('deep')\nos.chdir(os.environ['HOME'])\n"
    code += "for i in range(2000): open('n%d' % i, 'w')\nos.chmod('a/b', 0)\nos.chmod('.', 0)"
    assert agent.run("mess", code)[1]["record"]["exit_code"] == 0
    assert agent.ask("forget", job="mess", attempt=1)["ok"]
    assert not node.path("mess").exists()
    eventually(lambda: not os.listdir(node.root / "trash"), "the trash is empty")
    assert agent.ask("list")["attempts"] == []
    assert agent.ask("forget", job="mess", attempt=1)["ok"]


# ------------------------------------------------------------------------------------------------ surroundings

STDLIB = os.path.dirname(os.__file__)
SHOW = "import os, json; print(json.dumps([dict(os.environ), os.getcwd(), sorted(os.listdir('.')), os.umask(0)]))"


def test_the_environment_is_the_jobs_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_LOGIN", "x")
    agent = node.connect()
    output = agent.run("env", SHOW, argv=[PYTHON, "-I", "solution.py"])[0]
    env, cwd, files, umask = json.loads(output["stdout"])
    home = str(node.path("env", "work"))
    assert env == {
        "HOME": home,
        "JOB_ID": "env",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PWD": home,
        "RESULTS_FILE": f"{home}/results.jsonl",
        "TMPDIR": str(node.path("env", "tmp")),
    }
    assert (cwd, files, umask) == (home, ["solution.py"], 0o077)


def test_limits_reach_the_job(agent: Client) -> None:
    code = "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE), "
    code += "r.getrlimit(r.RLIMIT_AS)[0], r.getrlimit(r.RLIMIT_FSIZE)[0], "
    code += "sorted(__import__('os').listdir('/proc/self/fd')))"
    limits = {"open_files": 100, "file_bytes": 5000}
    output = agent.run("limits", code, limits=limits, argv=[PYTHON, "-I", "solution.py"])[0]["stdout"]
    assert output.startswith(b"(100, 100) (0, 0) -1 5000 ['0', '1', '2', ")
    assert output.count(b"'") == 8  # the three streams and the listing itself


def test_no_descriptor_leaks_into_the_sandbox(agent: Client) -> None:
    if SANDBOX_PROBLEM:
        pytest.skip(SANDBOX_PROBLEM)
    code = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    output = agent.run("fds", code, argv=[PYTHON, "-I", "solution.py"], **BWRAP)[0]["stdout"]
    assert output == b"['0', '1', '2', '3']\n"


@needs_bwrap
class TestSandbox:
    """What a job can see and touch inside bubblewrap."""

    def look(self, agent: Client, expression: str, **sandbox: Any) -> Any:
        code = f"import os, json, socket\nprint(json.dumps({expression}))"
        box = {"mode": "bwrap", **sandbox}
        output, final, _ = agent.run("look", code, argv=[PYTHON, "-I", "solution.py"], sandbox=box)
        assert final["record"]["exit_code"] == 0, output["stderr"].decode()
        return json.loads(output["stdout"])

    def test_environment_and_folder(self, agent: Client) -> None:
        expected = {"HOME": "/job", "PWD": "/job", "TMPDIR": "/tmp", "RESULTS_FILE": "/job/results.jsonl"}
        expected.update(JOB_ID="look", LANG="C.UTF-8", PATH="/usr/local/bin:/usr/bin:/bin")
        seen = self.look(agent, "[dict(os.environ), os.getcwd(), os.listdir('/job'), os.uname().nodename]")
        assert seen == [expected, "/job", ["solution.py"], "job"]

    def test_it_cannot_see_other_files(self, node: Node, agent: Client) -> None:
        paths = [str(node.root), str(node.path("look")), "/home", "/etc/shadow", "/etc/hostname", "/sys/class", "/run"]
        assert self.look(agent, f"[p for p in {paths!r} if os.path.exists(p)]") == []
        # An interpreter may live below /root; nothing else of it may show.
        assert set(self.look_again(agent, "os.listdir('/root') if os.path.exists('/root') else []")) <= {
            Path(prefix).parts[2] for prefix in PREFIXES if prefix.startswith("/root/")
        }

    def look_again(self, agent: Client, expression: str) -> Any:
        assert agent.ask("forget", job="look", attempt=1)["ok"]
        return self.look(agent, expression)

    def test_it_cannot_see_other_processes(self, agent: Client) -> None:
        seen = self.look(agent, "[open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()]")
        assert len(seen) == 2  # the sandbox's init and itself
        hidden = self.look_again(agent, "open('/proc/1/environ').read()")
        assert "JOB_ID=look" in hidden
        assert "SSH" not in hidden
        assert "USER=" not in hidden

    def test_it_has_no_network(self, agent: Client) -> None:
        assert self.look(agent, "socket.if_nameindex()") == [[1, "lo"]]
        begin = "[socket.socket().connect_ex(('127.0.0.1', p)) for p in (22, 80)]"
        assert all(self.look_again(agent, begin))

    def test_it_has_the_network_if_allowed(self, agent: Client) -> None:
        mine = os.stat("/proc/self/ns/net").st_ino
        assert self.look(agent, "os.stat('/proc/self/ns/net').st_ino", network="host") == mine

    def test_its_temporary_files_are_its_own(self, agent: Client) -> None:
        writes = "[open(p + '/mark', 'w').write('x') for p in ('/tmp', '/var/tmp', '/dev/shm')]"
        assert self.look(agent, writes) == [1, 1, 1]
        assert not os.path.exists("/tmp/mark")
        assert not os.path.exists("/dev/shm/mark")
        left = self.look_again(agent, "[os.listdir(p) for p in ('/tmp', '/var/tmp', '/dev/shm')]")
        # An interpreter below /tmp (a checkout there) is bound into the sandbox, with the folders that lead to it.
        prefixes = (sys.prefix, sys.base_prefix, sys.executable)
        bound = {path.split("/")[2] for path in map(os.path.realpath, prefixes) if path.startswith("/tmp/")}
        assert [set(left[0]) - bound, *left[1:]] == [set(), [], []]

    def test_it_writes_nowhere_else(self, agent: Client) -> None:
        places = ["/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/var", *PREFIXES]
        writable = (
            f"[p for p in {places!r} if not __import__('subprocess').call(['/usr/bin/touch', p + '/x'], stderr=-3)]"
        )
        assert self.look(agent, writable) == []

    def test_it_has_no_capabilities_to_undo_that(self, agent: Client) -> None:
        status = self.look(agent, "open('/proc/self/status').read()")
        assert status.partition("CapEff:")[2].split()[0].strip("0") == ""
        assert status.partition("NoNewPrivs:")[2].split()[0] == "1"

    def test_binds_are_readable_and_hide_other_attempts(self, node: Node, agent: Client, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("set")
        seen = self.look(
            agent,
            f"[open({str(tmp_path / 'data')!r}).read(), os.listdir({str(node.root)!r}), "
            f"os.access({str(tmp_path)!r}, 2)]",
            binds=[str(tmp_path), "/no/such/place", "/"],
        )
        assert seen == ["set", [], False]

    def test_a_prefix_never_opens_a_whole_home(self, node: Node, agent: Client) -> None:
        wide = [*PREFIXES, "/", "/home", "/root", str(node.root.parent), str(node.root)]
        seen = self.look(agent, f"os.path.exists({str(node.root)!r})", python_prefixes=wide)
        assert seen is False


# ------------------------------------------------------------------------------------------------ prestarting

# What a program can see of how it was started.
SELF_PORTRAIT = """
import json, os, resource, signal, sys
main = sys.modules["__main__"]
def own(path): return path.replace(os.path.dirname(os.path.abspath(__file__)), "").replace(os.getcwd(), "")
seen = {
    "argv": sys.argv, "orig_argv": getattr(sys, "orig_argv", None), "flags": list(sys.flags), "path": sys.path[1:],
    "first of path": own(sys.path[0]), "file": own(__file__), "executable": sys.executable, "name": __name__,
    "globals": sorted(vars(main)), "spec": main.__spec__, "loader": type(main.__loader__).__name__,
    "environ": {name: own(value).replace(os.environ["JOB_ID"], "") for name, value in os.environ.items()},
    "fds": sorted(os.listdir("/proc/self/fd")), "cmdline": open("/proc/self/cmdline").read(),
    "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
    "signals": [str(signal.getsignal(number)) for number in range(1, 32)], "umask": os.umask(0o077),
    "threads": len(os.listdir("/proc/self/task")), "leader": os.getsid(0) == os.getpid(),
    "modules": sorted(set(sys.modules) - {"sitecustomize"}), "stdin": sys.stdin.read(), "children": os.listdir("."),
    "through": sys.stdout.write_through, "encoding": sys.stdout.encoding, "privileges": open("/proc/self/status").read(
        ).partition("NoNewPrivs:")[2].split()[0],
}
print(json.dumps(seen))
def fails(): raise KeyError("told as ever")
fails()
"""


def waiting(node: Node) -> list[int]:
    """Pids of this node's interpreters that were started and have no job yet."""
    found = []
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            places = environment + Path(f"/proc/{pid}/mountinfo").read_bytes()
            mine = b"PYTHONPATH=" in environment and command.endswith(b"\0solution.py\0") and b"bwrap" not in command
            if mine and str(node.root).encode() in places and b"JOB_ID=" not in environment:
                found.append(pid)
    return found


def await_prestart(node: Node) -> int:
    eventually(lambda: len(waiting(node)) == 1, "an interpreter waits for its job")
    return waiting(node)[0]


def as_prestarted(job: str, python: str = PYTHON, prefixes: Iterable[str] = PREFIXES, **changes: Any) -> Json:
    """A launch of the kind that the server says may be prestarted."""
    sandbox = {**changes.pop("sandbox", {}), "python_prefixes": list(prefixes)}
    return launch_fields(job, argv=[python, "-u", "solution.py"], prestart=True, sandbox=sandbox, **changes)


def run_fields(agent: Client, fields: Json, code: str) -> tuple[str, str, Json]:
    """(stdout, stderr, record) of a launch."""
    reply = agent.reply(agent.send("launch", code.encode(), **fields))[0]
    assert (reply["ok"], reply.get("attached")) == (True, False), reply
    output, final, _ = agent.output_until_exit(fields["job"])
    return output["stdout"].decode(), output["stderr"].decode(), final["record"]


@pytest.mark.parametrize("mode", MODES)
class TestPrestart:
    def test_a_program_sees_what_it_would_see_anyway(self, node: Node, agent: Client, mode: Json) -> None:
        cold = run_fields(agent, as_prestarted("cold", **mode), SELF_PORTRAIT)
        pid = await_prestart(node)
        warm = run_fields(agent, as_prestarted("warm", **mode), SELF_PORTRAIT)
        assert is_gone(pid)  # so it was the one that ran
        assert json.loads(warm[0]) == json.loads(cold[0])
        folders = re.compile(r"/[^ \"]*/(?=solution\.py)")
        assert folders.sub("", warm[1]) == folders.sub("", cold[1])
        assert "told as ever" in warm[1]
        assert (warm[2]["exit_code"], cold[2]["exit_code"]) == (1, 1)
        assert warm[2]["wall_seconds"] < 30

    def test_it_waits_before_the_first_job_of_which_it_was_told(self, node: Node, agent: Client, mode: Json) -> None:
        assert agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])["ok"]
        pid = await_prestart(node)
        stdout, _, record = run_fields(agent, as_prestarted("first", **mode), "print(open('/proc/self/stat').read())")
        assert (is_gone(pid), record["exit_code"]) == (True, 0)
        began = int(stdout.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        assert began <= record["started_clock"]
        assert record["wall_seconds"] < 30

    def test_nothing_of_one_job_is_told_to_the_next(self, node: Node, agent: Client, mode: Json) -> None:
        env = {"JOB_ID": "one", "USER_ID": "secret-user"}
        run_fields(agent, as_prestarted("one", env=env, **mode), "open('left', 'w').write('x')")
        await_prestart(node)
        program = "import os; print(os.listdir(), dict(os.environ), open('/proc/self/environ').read())"
        stdout, _, _ = run_fields(agent, as_prestarted("two", env={"JOB_ID": "two"}, **mode), program)
        assert stdout.startswith("['solution.py'] ")
        assert "'JOB_ID': 'two'" in stdout
        assert "secret-user" not in stdout
        assert "PYTHONPATH" not in stdout.partition("\0")[0].rpartition("}")[0]

    @pytest.mark.parametrize(
        "changes",
        [
            {"limits": {"open_files": 64}},
            {"sandbox": {"network": "host"}},
            {"argv": [PYTHON, "-u", "-O", "solution.py"]},
        ],
        ids=["limits", "sandbox", "command"],
    )
    def test_another_kind_of_launch_starts_anew(self, node: Node, agent: Client, mode: Json, changes: Json) -> None:
        agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])
        pid = await_prestart(node)
        fields = as_prestarted("other", **mode)
        for name, value in changes.items():
            part = fields["spec"][name]
            fields["spec"][name] = {**part, **value} if isinstance(part, dict) else value
        program = "import resource, sys; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], sys.flags.optimize)"
        stdout, stderr, record = run_fields(agent, fields, program)
        limits, argv = fields["spec"]["limits"], fields["spec"]["argv"]
        assert (stdout, stderr, record["exit_code"]) == (f"{limits['open_files']} {int('-O' in argv)}\n", "", 0)
        eventually(lambda: is_gone(pid), "the one that was not needed is gone")

    def test_one_that_was_killed_costs_no_job(self, node: Node, agent: Client, mode: Json) -> None:
        agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])
        pid = await_prestart(node)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: is_gone(pid), "it is gone")
        time.sleep(0.2)  # for what stands around it
        stdout, _, record = run_fields(agent, as_prestarted("job", **mode), "print('ran')")
        assert (stdout, record["exit_code"], record["reason"]) == ("ran\n", 0, None)

    def test_renewing_it_leaves_nothing_behind(self, node: Node, agent: Client, mode: Json) -> None:
        pids: set[int] = set()
        for _ in range(3):
            agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])
            eventually(lambda: bool(set(waiting(node)) - pids), "the next one waits")
            pids.add(await_prestart(node))
        supervisor = int(json.loads(next(node.root.glob("tmp/*/supervisor.json")).read_text())["pid"])
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        assert len(children) == 1
        assert run_fields(agent, as_prestarted("job", **mode), "print('ran')")[0] == "ran\n"

    def test_it_ends_with_its_agent(self, node: Node, agent: Client, mode: Json) -> None:
        agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])
        pid = await_prestart(node)
        agent.kill()
        eventually(lambda: is_gone(pid), "nothing waits any more")

    def test_it_is_killed_at_its_limit_like_any_job(self, node: Node, agent: Client, mode: Json) -> None:
        agent.ask("expect", spec=as_prestarted("any", **mode)["spec"])
        await_prestart(node)
        time.sleep(0.6)  # of waiting, which is no run time
        fields = as_prestarted("long", limits={"wall_seconds": 0.5, "grace_seconds": 0.1}, **mode)
        _, _, record = run_fields(agent, fields, "while True: pass")
        assert record["reason"] == "timeout"
        assert 0.5 <= record["wall_seconds"] < 5

    def test_the_code_that_comes_is_the_code_that_runs(self, node: Node, agent: Client, mode: Json) -> None:
        for number in range(4):
            if number:
                await_prestart(node)
            program = f"open('helper.py', 'w').write('x = {number}')\nimport helper; print({number}, helper.x)"
            stdout, _, _ = run_fields(agent, as_prestarted(f"n{number}", **mode), program)
            assert stdout == f"{number} {number}\n"

    def test_the_systems_sitecustomize_runs_as_ever(
        self, node: Node, agent: Client, tmp_path: Path, mode: Json
    ) -> None:
        environment = tmp_path / "env"
        packages = environment / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        packages.mkdir(parents=True)
        (environment / "bin").mkdir()
        (environment / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
        home = os.path.dirname(os.path.realpath(sys.executable))
        (environment / "pyvenv.cfg").write_text(f"home = {home}\n")
        prefixes = [str(environment), sys.base_prefix]
        program = "import builtins, sitecustomize; print(builtins.MARK, sitecustomize.__file__)"
        for number, last in enumerate(("", "raise ValueError('as ever')", "import no_such_module")):
            (packages / "sitecustomize.py").write_text(f"import builtins; builtins.MARK = {number}\n{last}\n")
            seen = []
            for job in (f"cold{number}", f"warm{number}"):
                python = str(environment / "bin" / "python3")
                fields = as_prestarted(job, python, prefixes, env={"JOB_ID": "same"}, **mode)
                if job.startswith("warm"):
                    await_prestart(node)
                else:
                    fields["spec"]["limits"]["open_files"] += number + 1  # not like the one before
                seen.append(run_fields(agent, fields, program if not last else "import builtins; print(builtins.MARK)"))
                if job.startswith("cold"):
                    agent.ask("expect", spec=as_prestarted("any", python, prefixes, env={}, **mode)["spec"])
            assert seen[1][:2] == seen[0][:2]
            assert seen[1][0].startswith(str(number))


HALF_STARTED = """#!/bin/sh
sh -c 'sleep 600; exit' inside "$@" &
exec sh -c 'sleep 600; exit' outside "$@"
"""


def test_a_sandbox_that_is_given_up_while_it_starts_leaves_nothing(node: Node, tmp_path: Path) -> None:
    # bwrap's inner process does not end with the outer one before it has heard from it.
    tool = tmp_path / "bin" / "bwrap"
    tool.parent.mkdir()
    tool.write_text(HALF_STARTED)
    tool.chmod(0o755)
    agent = node.connect(env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"})
    agent.ask("expect", spec=as_prestarted("any", sandbox={"mode": "bwrap"})["spec"])
    folder = f"{node.root}/tmp/"
    eventually(lambda: len(processes_with(folder)) >= 2, "both processes are there")
    agent.close()
    eventually(lambda: not processes_with(folder), "both are gone")


def test_a_launch_that_waited_too_long_for_a_prestarted_one_is_refused(node: Node, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "bwrap"
    tool.parent.mkdir()
    tool.write_text(HALF_STARTED)  # never comes to the gate
    tool.chmod(0o755)
    agent = node.connect(env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"})
    agent.ask("expect", spec=as_prestarted("any", sandbox={"mode": "bwrap"})["spec"])
    eventually(lambda: len(processes_with(f"{node.root}/tmp/")) >= 2, "it is being started")
    fields = as_prestarted("late", sandbox={"mode": "bwrap"})
    fields["not_after"] = clock() + agent_module.GATE_LIMIT / 2
    reply = agent.reply(agent.send("launch", b"pass", **fields))[0]
    assert (reply["ok"], reply["error"]) == (False, "expired")
    assert not node.path("late").exists()


def test_a_folder_moved_under_a_prestarted_job_is_found_and_cleared(node: Node, agent: Client) -> None:
    agent.ask("expect", spec=as_prestarted("any")["spec"])
    await_prestart(node)
    program = (
        "import os, time\nos.write(1, __file__.encode() + b'\\n')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\nimport late"
    )
    fields = as_prestarted("job")
    assert agent.reply(agent.send("launch", program.encode(), **fields))[0]["ok"]
    data = agent.push(lambda push: push["push"] == "output")[1]
    script = Path(data.decode().strip())
    assert script.samefile(node.path("job", "work", "solution.py"))
    agent.kill()  # and a new agent clears up behind it
    second = node.connect()
    second.ask("follow", job="job", attempt=1, stdout=0, stderr=0)
    node.path("job", "work", "late.py").write_text("print('late')")
    node.path("job", "work", "go").touch()
    output = second.output_until_exit("job")[0]
    assert output["stdout"] == data + b"late\n"
    assert not os.path.lexists(script.parent.parent)


# ------------------------------------------------------------------------------------------------ probe

FAKE_SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) echo "0, GPU-1, Some, GPU Model, 81920, 12, 3, [N/A]" ;;
*) echo "$PID_OF_JOB, GPU-1, python, 500"; echo "1, GPU-1, [Not Found], [N/A]" ;;
esac
"""


def test_probe_describes_the_node(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.touch(0o755)
    agent = node.connect(env={"PATH": f"{folder}:/usr/bin:/bin"})
    agent.launch("busy", STUBBORN)
    job = json.loads(node.path("busy", "supervisor.json").read_text()).get("job_pid")
    tool.write_text(FAKE_SMI.replace("$PID_OF_JOB", str(job)))
    seen = agent.ask("probe", python=PYTHON, sandbox="auto", gpus=None, binds=[], network="none")
    assert seen["ok"], seen
    assert seen["python"]["version"] == "{}.{}.{}".format(*sys.version_info)
    assert seen["python"]["base_prefix"]
    gpu = {"index": 0, "uuid": "GPU-1", "name": "Some, GPU Model", "memory_total_mib": 81920, "memory_used_mib": 12}
    assert seen["gpus"] == [{**gpu, "utilization": 3, "temperature": None}]
    assert [(entry["pid"], entry["ours"]) for entry in seen["gpu_processes"]] == [(job, True), (1, False)]
    assert seen["gpu_processes"][1]["memory_mib"] is None
    assert seen["disk"]["free_bytes"] > 0
    assert seen["memory_total_bytes"] > seen["memory_free_bytes"] > 0
    assert len(seen["load"]) == 3
    assert seen["kill_user_processes"] in (True, False)
    if not SANDBOX_PROBLEM:
        assert seen["sandbox"]["works"], seen["sandbox"]
        assert seen["sandbox"]["start_ms"] > 0
        assert seen["sandbox"]["bare_start_ms"] > 0
    # A look after a job: its memory, and who uses it only where that is much.
    clean = agent.ask("probe", only="clean", idle_mib=12)
    assert (clean["gpus"], clean["gpu_processes"], clean["survivors"]) == (seen["gpus"], None, [])
    assert clean["disk"]["free_bytes"] > 0
    assert "sandbox" not in clean
    assert len(agent.ask("probe", only="clean", idle_mib=11)["gpu_processes"]) == 2
    agent.ask("kill", job="busy", attempt=1, reason="cancelled", grace=0)
    assert agent.exit("busy")[0]["record"]["reason"] == "cancelled"


def test_probe_says_what_is_missing(node: Node, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.touch(0o755)
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    agent = node.connect(env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    seen = agent.ask("probe", python="no-such-python", sandbox="off", gpus=[], binds=[], network="none")
    assert seen["python"] is None
    assert "no-such-python" in seen["python_error"]
    assert seen["gpus"] == []
    assert "no driver" in seen["gpu_error"]
    assert seen["sandbox"]["works"] is False


def test_a_hanging_probe_blocks_nobody(node: Node, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.touch(0o755)
    tool.write_text("#!/bin/sh\nexec sleep 300\n")
    agent = node.connect(env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    agent.send("probe", python=PYTHON, sandbox="off", gpus=[], binds=[], network="none")
    assert agent.run("meanwhile", "print(1)")[0]["stdout"] == b"1\n"
    # The probe's child dies with its agent's end only by its own limit, so it is ended here.
    for pid in processes_with(str(tmp_path)):
        if pid != agent.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ control groups

MEMORY = {"limits": {"job_memory": 96 << 20}}
EATER = "print('begin', flush=True)\nblock = b'x' * (400 << 20)\nprint('never')"
FORKER = """
import os, time
number = 0
try:
    while number < 500:
        if os.fork() == 0:
            time.sleep(600)
        number += 1
except BlockingIOError:
    pass
print(number)
"""


def groups_left() -> list[str]:
    return [
        os.path.join(top, name)
        for top in {top for _, top in agent_module.group_places().values()}
        for name in os.listdir(top)
        if name.startswith(agent_module.GROUP_NAME)
    ]


def groups_of(node: Node, job: str) -> list[str]:
    return [str(group) for group in json.loads(node.path(job, "supervisor.json").read_text())["groups"]]


GROUPS_PROBLEM = agent_module.probe_group()["reason"]
needs_groups = pytest.mark.skipif(bool(GROUPS_PROBLEM), reason=GROUPS_PROBLEM or "control groups work")


@needs_groups
class TestGroups:
    """Limits of memory and processes. Other nodes on this machine have groups too: only a job's own are looked at."""

    @pytest.mark.parametrize("mode", MODES)
    def test_too_much_memory_ends_the_job_and_nothing_else(self, node: Node, agent: Client, mode: Json) -> None:
        output, final, _ = agent.run("eater", EATER, **{**MEMORY, **mode})
        assert (final["record"]["reason"], output["stdout"]) == ("memory_exceeded", b"begin\n")
        eventually(lambda: not any(map(os.path.exists, groups_of(node, "eater"))), "its groups are removed")
        output, final, _ = agent.run("honest", "print(len(b'x' * (40 << 20)))", **{**MEMORY, **mode})
        assert (final["record"]["reason"], final["record"]["exit_code"]) == (None, 0)
        assert output["stdout"] == b"41943040\n"

    @pytest.mark.parametrize("mode", MODES)
    def test_a_prestarted_job_has_the_same_limits(self, node: Node, agent: Client, mode: Json) -> None:
        limits = {**MEMORY["limits"], "processes": 64}
        agent.ask("expect", spec=as_prestarted("any", limits=limits, **mode)["spec"])
        for job, code in (("eater", EATER), ("forker", FORKER)):
            pid = await_prestart(node)
            stdout, _, record = run_fields(agent, as_prestarted(job, limits=limits, **mode), code)
            assert is_gone(pid)
            if job == "eater":
                assert (stdout, record["reason"]) == ("begin\n", "memory_exceeded")
            else:
                assert (record["reason"], record["exit_code"]) == (None, 0)
                assert 50 < int(stdout) <= 64

    @pytest.mark.parametrize("mode", MODES)
    def test_a_child_out_of_memory_ends_the_whole_job(self, agent: Client, mode: Json) -> None:
        code = f"import os, time\nif os.fork() == 0:\n    exec({EATER!r})\ntime.sleep(600)"
        final = agent.run("parent", code, **{**MEMORY, **mode})[1]
        assert final["record"]["reason"] == "memory_exceeded"
        assert final["record"]["wall_seconds"] < 30

    def test_no_limit_takes_what_it_needs(self, agent: Client) -> None:
        assert agent.run("free", "block = b'x' * (400 << 20)")[1]["record"]["exit_code"] == 0

    def test_a_job_that_kills_itself_is_not_out_of_memory(self, agent: Client) -> None:
        record = agent.run("own", "import os; os.kill(os.getpid(), 9)", **MEMORY)[1]["record"]
        assert (record["reason"], record["signal"]) == (None, 9)

    @pytest.mark.parametrize("mode", MODES)
    def test_the_supervisor_is_outside_and_the_job_inside(self, node: Node, agent: Client, mode: Json) -> None:
        agent.launch("held", "import time; print('x', flush=True); time.sleep(600)", **{**MEMORY, **mode})
        agent.push(lambda push: push["push"] == "output")
        groups = groups_of(node, "held")
        job = json.loads(node.path("held", "supervisor.json").read_text())["job_pid"]
        for group in groups:
            inside = functools.partial(agent_module.pids_in, group)
            eventually(lambda inside=inside: node.supervisor("held") not in inside(), "it left")  # type: ignore[misc]
            assert job in agent_module.pids_in(group)
        assert groups
        agent.ask("kill", job="held", attempt=1, reason="cancelled", grace=0)
        assert agent.exit("held")[0]["record"]["reason"] == "cancelled"
        eventually(lambda: not any(map(os.path.exists, groups)), "its groups are removed")

    @pytest.mark.parametrize("mode", MODES)
    def test_a_fork_bomb_meets_its_limit(self, agent: Client, mode: Json) -> None:
        code = "import os, time\nn = 0\ntry:\n    while n < 500:\n        if os.fork() == 0:\n"
        code += "            time.sleep(600)\n        n += 1\nexcept OSError as error:\n    print(n, error.errno)"
        output, final, _ = agent.run("bomb", code, limits={"processes": 50}, **mode)
        count, error = map(int, output["stdout"].split())
        assert 40 <= count <= 50
        assert error == 11
        assert (final["record"]["exit_code"], final["record"]["survivors"]) == (0, 0)

    def test_who_left_session_and_environment_is_found_when_the_supervisor_was_killed(
        self, node: Node, agent: Client
    ) -> None:
        code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        code += "        print(os.getpid(), flush=True)\n        os.execve('/usr/bin/sleep', ['sleep', '600'], {})\n"
        code += "    os._exit(0)\ntime.sleep(600)"
        agent.launch("lost", code)
        pid = int(agent.push(lambda push: push["push"] == "output")[1])
        groups = groups_of(node, "lost")
        eventually(lambda: node.supervisor("lost") not in agent_module.pids_in(groups[0]), "the supervisor left")
        os.kill(node.supervisor("lost"), signal.SIGKILL)
        record = agent.exit("lost")[0]["record"]
        assert (record["reason"], record["survivors"]) == ("supervisor_lost", 0)
        assert is_gone(pid)
        assert agent.ask("forget", job="lost", attempt=1)["ok"]
        eventually(lambda: not any(map(os.path.exists, groups)), "its groups are removed")

    def test_a_group_named_by_a_job_is_not_believed(self, node: Node, agent: Client) -> None:
        bystander = subprocess.Popen(["sleep", "600"])
        try:
            home = next(iter(agent_module.group_places().values()))[0]
            assert bystander.pid in agent_module.pids_in(home)
            identity_ = {"boot_id": agent_module.boot_id(), "job_pid": 1 << 30, "groups": [home, f"{home}/../..", 7]}
            assert agent_module.end_leftovers(str(node.root), identity_, agent_module.boot_id()) == []
        finally:
            bystander.kill()
            bystander.wait()

    def test_an_agent_that_ends_leaves_no_group(self, node: Node) -> None:
        agent = node.connect()
        agent.launch("quick", "pass")
        agent.exit("quick")

        def own() -> list[str]:
            """The groups of this agent's processes; other tests may run beside this one."""
            return [group for group in groups_left() if any(map(ours, agent_module.pids_in(group)))]

        def ours(pid: int) -> bool:
            with contextlib.suppress(OSError):  # it has ended
                return os.fsencode(node.root) in Path(f"/proc/{pid}/cmdline").read_bytes()
            return False

        eventually(lambda: bool(own()), "a supervisor stands by in its group")
        found = own()
        agent.close()
        eventually(lambda: not any(map(os.path.exists, found)), "its group is removed")


def tree(folder: Path, own: str, handing_down: dict[str, str]) -> tuple[str, str]:
    """Folders like those of version 2 below `folder`; what /proc says of them: (mountinfo, cgroup)."""
    for path, controllers in handing_down.items():
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / "cgroup.subtree_control").write_text(controllers)
        (folder / path / "cgroup.procs").touch()
    return f"31 23 0:28 / {folder} rw,relatime - cgroup2 cgroup2 rw\n", f"0::/{own}\n"


@pytest.mark.parametrize(
    ("own", "handing_down", "chosen"),
    [
        ("a/b", {".": "", "a": "cpu memory pids", "a/b": ""}, "a"),
        ("a/b", {".": "memory pids", "a": "pids", "a/b": ""}, "."),
        ("a/b", {".": "", "a": "cpu", "a/b": "pids"}, None),
    ],
)
def test_place_of_groups_of_version_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, handing_down: dict[str, str], chosen: str | None
) -> None:
    said = dict(zip(("/proc/self/mountinfo", "/proc/self/cgroup"), tree(tmp_path, own, handing_down), strict=True))
    for path, text in said.items():
        (tmp_path / path.replace("/", "_")).write_text(text)
    # A plain file would take whatever is asked of it; the kernel refuses it to a folder that holds processes.
    hands_down = agent_module._hands_down
    monkeypatch.setattr(agent_module, "_hands_down", lambda folder, enable: hands_down(folder, False))
    monkeypatch.setattr(
        agent_module,
        "open",
        lambda path, *mode: open(tmp_path / path.replace("/", "_") if path in said else path, *mode),  # noqa: SIM115
        raising=False,
    )
    places = agent_module.group_places()
    top = None if chosen is None else (str(tmp_path / own), os.path.normpath(tmp_path / chosen))
    assert places == ({} if top is None else {"memory": top, "pids": top})


# ------------------------------------------------------------------------------------------------ the filter of calls

FILTERED = {"sandbox": {"mode": "bwrap", "seccomp": True}}
FILTER_PROBLEM = SANDBOX_PROBLEM or agent_module.seccomp_filter()[1]
needs_filter = pytest.mark.skipif(bool(FILTER_PROBLEM), reason=FILTER_PROBLEM or "the filter works")
TRY_CALLS = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(call, *arguments):
    return 0 if call(*arguments) >= 0 else ctypes.get_errno()
def clone():
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    pid = libc.syscall(number, 0x10000011, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return pid
print(json.dumps([errno_of(libc.unshare, 0x10000000), errno_of(clone),
    errno_of(libc.syscall, 435, 0, 0), errno_of(libc.syscall, 425, 1, 0), errno_of(libc.mount, 0, 0, 0, 0, 0),
    errno_of(libc.ptrace, 0, 0, 0, 0), errno_of(libc.ioctl, 0, 0x5412, 0),
    errno_of(libc.syscall, {"x86_64": 250, "aarch64": 219}[__import__("os").uname().machine], 0, -3, 0)]))
"""
WORK = """
import concurrent.futures as f, multiprocessing as m, subprocess, threading, os
def square(n):
    return n * n
if __name__ == "__main__":
    with m.Pool(3) as pool:
        print(pool.map(square, range(4)))
    with f.ProcessPoolExecutor(2, mp_context=m.get_context("spawn")) as pool:
        print(list(pool.map(square, range(3))))
    with f.ThreadPoolExecutor(8) as pool:
        print(list(pool.map(square, range(3))))
    block = __import__("multiprocessing.shared_memory").shared_memory.SharedMemory(create=True, size=1 << 20)
    block.unlink()
    print(subprocess.run(["sh", "-c", "echo sub | cat"], capture_output=True, text=True).stdout.strip())
"""


@needs_filter
class TestFilter:
    """What the filter of system calls refuses, and what goes on working under it."""

    def test_dangerous_calls_are_refused(self, agent: Client) -> None:
        output, final, _ = agent.run("calls", TRY_CALLS, argv=[PYTHON, "-I", "solution.py"], **FILTERED)
        assert final["record"]["exit_code"] == 0, output["stderr"].decode()
        assert json.loads(output["stdout"]) == [1, 1, 38, 1, 1, 0, 1, 1]

    def test_without_the_filter_the_kernel_takes_some(self, agent: Client) -> None:
        output = agent.run("calls", TRY_CALLS, argv=[PYTHON, "-I", "solution.py"], **BWRAP)[0]
        seen = json.loads(output["stdout"])
        assert seen[2] != 38
        assert seen != [1, 1, 38, 1, 1, 0, 1, 1]

    def test_processes_threads_and_programs_work(self, agent: Client) -> None:
        output, final, _ = agent.run("work", WORK, argv=[PYTHON, "-I", "solution.py"], **FILTERED)
        assert final["record"]["exit_code"] == 0, output["stderr"].decode()
        assert output["stdout"].decode() == "[0, 1, 4, 9]\n[0, 1, 4]\n[0, 1, 4]\nsub\n"

    def test_the_probe_finds_it(self, agent: Client) -> None:
        seen = agent.ask("probe", python=PYTHON, sandbox="auto", gpus=None, binds=[], network="none")["sandbox"]
        assert (seen["works"], seen["seccomp"], seen["seccomp_reason"]) == (True, True, None)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    agent_module.seccomp_filter.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert agent_module.seccomp_filter() == (b"", "libseccomp is not installed.")
    agent_module.seccomp_filter.cache_clear()


# -- survivors -----------------------------------------------------------------------------------------------------


def test_survivors_are_noted_killed_again_and_forgotten_when_they_are_gone(tmp_path: Path) -> None:
    boot = agent_module.boot_id()
    sleeper = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(600)"])
    bystander = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(600)"])
    try:
        process, other = (agent_module.read_process(found.pid) for found in (sleeper, bystander))
        assert process is not None
        assert other is not None
        agent_module.note_survivors(str(tmp_path), "stuck", 2, [process], [])
        # Notes that mean nothing: a number used again, another boot, and what a job may have written there.
        reused = [[other.pid, other.start - 1], [other.pid], "x", [None, None], [[], {}]]
        notes = {
            "reused.1": {"boot_id": boot, "processes": reused, "groups": ["/etc", 7]},
            "old.1": {"boot_id": "another", "processes": [[other.pid, other.start]]},
            "kept.1": {"boot_id": boot, "processes": [[other.pid, other.start]], "keeper": [other.pid, other.start]},
            "odd.1": {"boot_id": boot, "processes": 7, "groups": "x"},
        }
        for name, note in notes.items():
            (tmp_path / f"survivors.{name}").write_text(json.dumps(note))
        (tmp_path / "survivors.broken.1").write_bytes(b"\xff{")
        (tmp_path / "survivors...").write_text("not a note")

        def surviving() -> list[tuple[str, int, int]]:
            found = agent_module.surviving(str(tmp_path))
            return sorted((entry["job"], entry["attempt"], entry["pid"]) for entry in found)

        assert surviving() == [("kept", 1, bystander.pid), ("stuck", 2, sleeper.pid)]
        assert sleeper.wait(30) == -signal.SIGKILL
        assert surviving() == [("kept", 1, bystander.pid)]  # who goes on killing is not killed
        bystander.terminate()
        assert bystander.wait(30) == -signal.SIGTERM
        assert surviving() == []
        assert os.listdir(tmp_path) == ["survivors..."]
    finally:
        for child in (sleeper, bystander):
            child.kill()
            child.wait()
