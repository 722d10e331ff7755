"""What is measured against: our server, SSH nodes, a link with delay, clients that cost little. All of it on loopback
and ephemeral ports, ended by pid; nothing is left behind.

Imports `tests.server` and `tests.fleet`, which start the real things, and what the command line for tokens works with.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from auth import TokenDigest
from database import Database
from tests.fleet import Fleet, missing_tools
from tests.server import PROJECT, Server
from token_manager import TokenManager

# Limits that users meet, not what is measured here.
UNLIMITED = {"SUBMITS_PER_MINUTE": "1000000", "LOGIN_FAILURES_PER_MINUTE": "1000000", "LOG_LEVEL": "warning"}
NOTHING = b"pass\n"
IDLE_MOST = 2.0  # seconds; servers close connections that are idle for longer, uvicorn's after 5


class MeasuredServer(Server):
    """A server whose users' tokens are made in this process: by the command line each takes a second."""

    def __enter__(self) -> MeasuredServer:
        super().__enter__()
        return self

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self.process is not None
        return self.process.pid

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """The server's own, also before its first start."""
        database = Database(self.settings["DATABASE_URL"])
        try:
            yield database
        finally:
            database.close()

    @property
    def token_key(self) -> Path:
        """The file of the key of tokens."""
        return Path(self.settings["TOKEN_KEY_FILE"])

    def token(self, user_id: str, *, admin: bool = False) -> str:
        """The user's token, made at first use."""
        if user_id not in self.tokens:
            self.tokens[user_id] = f"token-of-{user_id}"
            with self.database() as database:
                manager = TokenManager(database, TokenDigest.from_file(self.token_key))
                manager.create(user_id, self.tokens[user_id], is_admin=admin)
        return self.tokens[user_id]


@dataclass
class Run:
    """What a subject's `measure` gets: how long it may take, and the things to measure. Closed by `__main__`."""

    mode: str = "short"  # smoke, short or full
    peers: bool = True
    _things: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _fleets: dict[int, Fleet] = field(default_factory=dict)
    _servers: dict[str, MeasuredServer] = field(default_factory=dict)
    _folder: Path | None = None

    @property
    def smoke(self) -> bool:
        """One iteration of everything, to see that it works: figures mean nothing, peers stay out."""
        return self.mode == "smoke"

    @property
    def rounds(self) -> int:
        """For `interleaved`."""
        return {"smoke": 1, "short": 12, "full": 100}[self.mode]

    @property
    def seconds(self) -> float:
        """For `interleaved`: one figure's share of the time."""
        return {"smoke": 0.0, "short": 4.0, "full": 60.0}[self.mode]

    @property
    def folder(self) -> Path:
        """For what several subjects need and is made once."""
        if self._folder is None:
            self._folder = Path(self._things.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-")))
        return self._folder

    def scaled(self, smoke: int, short: int, full: int) -> int:
        """A number that depends on the mode."""
        return {"smoke": smoke, "short": short, "full": full}[self.mode]

    def fleet(self, nodes: int) -> Fleet:
        """So many SSH nodes, the same ones for every subject; two for the smoke run. Raises Missing."""
        reason = missing_tools()
        if reason is not None:
            raise Missing(reason)
        if self.smoke:
            nodes = 2
        if nodes not in self._fleets:
            self._fleets[nodes] = self._things.enter_context(Fleet(nodes))
        return self._fleets[nodes]

    @contextlib.contextmanager
    def server(self, settings: Mapping[str, str] | None = None) -> Iterator[MeasuredServer]:
        """A server of its own with warm nodes: slots on this machine, or `fleet.settings()`. For the smoke run the
        same one whenever the settings are the same: starting servers would take most of the time."""
        wanted = {**UNLIMITED, **(settings or {})}
        if not self.smoke:
            with MeasuredServer(wanted) as server:
                yield server
            return
        key = json.dumps(wanted, sort_keys=True)
        if key not in self._servers:
            self._servers[key] = self._things.enter_context(MeasuredServer(wanted))
        yield self._servers[key]

    def close(self) -> None:
        """End what is left."""
        self._things.close()


class Missing(Exception):
    """Something to measure with is not installed; the message says what."""


# -- clients -------------------------------------------------------------------------------------------------------


class Client:
    """One kept-alive HTTP/1.1 connection with next to no cost of its own; used by one thread."""

    def __init__(self, port: int, token: str = "", *, timeout: float = 60) -> None:
        self._port, self._timeout = port, timeout
        self._socket: socket.socket | None = None
        self._used_at = 0.0
        self._head = f"Host: 127.0.0.1:{port}\r\n" + (f"Authorization: Bearer {token}\r\n" if token else "")
        self._buffer = b""

    def get(self, path: str, headers: str = "") -> tuple[int, bytes]:
        """Status and body; `headers` are whole lines with their ends."""
        return self.exchange(f"GET {path} HTTP/1.1\r\n{self._head}{headers}\r\n".encode())

    def post(self, path: str, body: bytes, content_type: str, headers: str = "") -> tuple[int, bytes]:
        """Status and body."""
        return self.exchange(self.prepared(path, body, content_type, headers))

    def prepared(self, path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
        """The bytes of a POST, to be sent by `exchange` as often as wanted."""
        lines = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        return f"POST {path} HTTP/1.1\r\n{self._head}{lines}".encode() + body

    def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send a whole request, read its whole answer."""
        self._connect().sendall(request)
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._fill()
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is None:
            raise RuntimeError(f"an answer without Content-Length: {head!r}")
        wanted = int(length[1])
        while len(self._buffer) < wanted:
            self._fill()
        body, self._buffer = self._buffer[:wanted], self._buffer[wanted:]
        self._used_at = time.monotonic()
        return int(head.split(b" ", 2)[1]), body

    def _connect(self) -> socket.socket:
        """The connection; a new one where the server may be about to close the old one for its idleness."""
        if self._socket is None or time.monotonic() - self._used_at > IDLE_MOST:
            self.close()
            self._socket = socket.create_connection(("127.0.0.1", self._port), self._timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _fill(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(1 << 20)
        if not data:
            raise RuntimeError("the server closed the connection")
        self._buffer += data

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def multipart(code: bytes, config: Mapping[str, Any]) -> tuple[bytes, str]:
    """The body of a submission, and its content type."""
    boundary = "b3e1f0c2d4a59687"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n'
    body = (
        (part % ("code", "solution.py")).encode()
        + code
        + b"\r\n"
        + (part % ("config_file", "config.json")).encode()
        + json.dumps(config).encode()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    return body, f"multipart/form-data; boundary={boundary}"


class User:
    """A user with a token and a connection of his own, whose submissions are prepared once."""

    def __init__(self, server: Server, user_id: str) -> None:
        self.token = server.token(user_id)
        self.client = Client(server.port, self.token)
        self._config = server.config(user_id)

    def submission(self, code: bytes = NOTHING, *, wait: bool = False) -> bytes:
        """The request's bytes, for `client.exchange`."""
        body, kind = multipart(code, self._config)
        return self.client.prepared("/api/submit" + ("?wait=true" if wait else ""), body, kind)

    def run(self, request: bytes) -> dict[str, Any]:
        """Send a submission that waits for its results; these."""
        status, body = self.client.exchange(request)
        answer: dict[str, Any] = json.loads(body)
        if status != 200 or answer["status"] != "completed":
            raise RuntimeError(f"a job that should have completed: {status} {answer}")
        return answer


# -- a link with delay ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def delayed(port: int, round_trip: float) -> Iterator[int]:
    """A loopback port behind which `port` is `round_trip` seconds away: a relay in a process of its own."""
    relay = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.relay", str(port), str(round_trip / 2)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert relay.stdout is not None
        yield int(relay.stdout.readline())
    finally:
        relay.terminate()
        relay.communicate()


# -- nodes that are other machines ------------------------------------------------------------------------------------


@contextlib.contextmanager
def yielding(fleet: Fleet) -> Iterator[bool]:
    """The nodes' processes get only what all others leave of the processors; False where no group can be made."""
    group = _idle_group()
    if group is None:
        yield False
        return
    try:
        for node in fleet.nodes:
            found = [*fleet.sessions(node.number), *fleet.processes(node.number)]
            _move([pid for pid in (node.pid, *(process.pid for process in found)) if pid is not None], group)
        yield True
    finally:
        while pids := (group / "cgroup.procs").read_text().split():
            _move(map(int, pids), group.parent)
        group.rmdir()


def _idle_group() -> Path | None:
    for top in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):  # version 1, version 2
        group = top / f"benchmarks-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / "cpu.idle").write_text("1")
        except OSError:
            group.rmdir()
            continue
        return group
    return None


def _move(pids: Iterable[int], group: Path) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))


# -- what a process costs ------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, more exactly than the hundredths of /proc."""
    return time.clock_gettime(~pid << 3 | 2)  # the id of its clock, see clock_getcpuclockid(3)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def profile(pid: int, seconds: float, *, lines: int = 25) -> str:
    """Where a process spends its time, most first: py-spy's samples of functions. Empty where it is not installed."""
    py_spy = Path(sys.executable).with_name("py-spy")
    if not py_spy.is_file():
        return ""
    words = [str(py_spy), "record", "--pid", str(pid), "--duration", f"{max(1, round(seconds))}", "--rate", "200"]
    done = subprocess.run(
        [*words, "--gil", "--format", "raw", "--output", "/dev/stdout"], capture_output=True, text=True, check=False
    )
    counts: dict[str, int] = {}
    total = 0
    for line in done.stdout.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack or not count.isdigit():
            continue
        total += int(count)
        for frame in {re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")}:
            counts[frame] = counts.get(frame, 0) + int(count)
    most = sorted(counts.items(), key=lambda item: -item[1])[:lines]
    return "\n".join(f"{100 * count / total:5.1f} %  {frame}" for frame, count in most)


def profile_during(pid: int, seconds: float, action: Callable[[], object]) -> str:
    """`profile` while `action` runs in a thread; it should take a little longer than that."""
    acting = threading.Thread(target=action)
    acting.start()
    try:
        return profile(pid, seconds)
    finally:
        acting.join()


def wait_seconds(seconds: float) -> None:
    """Let time pass while something is watched."""
    time.sleep(seconds)
