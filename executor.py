"""What running somewhere means: a connection to a node's agent, and plain data about the node and the job.

`ssh_executor` and `local_executor` implement `Executor`; they know nothing of the queue or the database. The protocol
spoken over a connection is described in `node_agent/agent.py`: JSON lines, each optionally followed by raw bytes.

May import `errors`, `config`, `node_agent`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from config import Settings, split_job_command
from errors import AgentError, NodeRefused, NodeUnreachable
from node_agent import PROTOCOL

RECEIVE_SIZE = 1 << 18
LINE_MOST = 4 << 20
PAYLOAD_MOST = 4 << 20
CLOCK_MOST = 1e12  # seconds
LAST_WORDS = 300  # characters of what a node says at its end
CODE_NAME = "solution.py"
# The command whose interpreter may be started before its script is there: it reads nothing of a job but the script.
PRESTARTED = ("{python}", "-u", "{code}")
RESULTS_NAME = "results.jsonl"

Message = dict[str, Any]


def readable(descriptors: list[int], timeout: float) -> list[int]:
    """Which of the descriptors can be read, or are at their end; waits at most `timeout` seconds for one.

    Not by `select`: it takes no descriptor above 1023, and each watcher of a stream has one.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(math.ceil(max(0.0, timeout) * 1000))]


class ByteStream(Protocol):
    """Bytes to and from an agent's stdin and stdout."""

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` has something to give."""

    def ready(self) -> bool:
        """Whether `receive` would give something without waiting."""

    def send(self, data: bytes) -> None:
        """Write all. Raises NodeUnreachable."""

    def receive(self) -> bytes:
        """What is there, at most RECEIVE_SIZE bytes, b"" at the end. Raises NodeUnreachable."""

    def close(self) -> None:
        """Close, without waiting."""

    def last_words(self) -> str:
        """The end of what the agent wrote to stderr, for error messages."""


class Frames:
    """Cuts a byte stream into messages; a payload is under the key `data` of its message."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: Message | None = None
        self._missing = 0

    def feed(self, data: bytes) -> list[Message]:
        """Add bytes; returns the messages that are complete. Raises NodeUnreachable when it is no protocol."""
        buffer = self._buffer
        buffer += data
        found: list[Message] = []
        position = 0
        while True:
            if self._head is None:
                end = buffer.find(b"\n", position)
                if end < 0:
                    if len(buffer) - position > LINE_MOST:
                        raise NodeUnreachable("The agent sent a line without end.")
                    break
                try:
                    head = json.loads(bytes(buffer[position:end]))
                    size = (head.get("size") or 0) if isinstance(head, dict) else None
                except (ValueError, RecursionError):
                    head = size = None
                if not isinstance(head, dict) or type(size) is not int or not 0 <= size <= PAYLOAD_MOST:
                    shown = bytes(buffer[position : min(end, position + 200)]).decode("utf-8", "replace")
                    raise NodeUnreachable(f"The agent's answer is not understood: {shown!r}.")
                position = end + 1
                self._missing = size
                if not self._missing:
                    found.append(head)
                    continue
                self._head = head
            if len(buffer) - position < self._missing:
                break
            self._head["data"] = bytes(memoryview(buffer)[position : position + self._missing])
            position += self._missing
            found.append(self._head)
            self._head = None
        del buffer[:position]
        return found


class NodeConnection:
    """A live connection to one node's agent, used by one thread.

    Every method that talks raises NodeUnreachable when the connection is lost, AgentError when the agent refuses.
    """

    def __init__(self, stream: ByteStream, *, silence_limit: float) -> None:
        self._stream = stream
        self._frames = Frames()
        self._pushes: deque[Message] = deque()
        self._replies: dict[int, Callable[[Message], None]] = {}
        self._next_id = 0
        self._later = b""
        self._silence_limit = silence_limit
        self._clock: tuple[float, float] | None = None
        self.heard_at = time.monotonic()
        self.hello: Message = {}

    # -- talking ---------------------------------------------------------------------------------------------------

    def send(
        self,
        op: str,
        payload: bytes = b"",
        *,
        on_reply: Callable[[Message], None] | None = None,
        later: bool = False,
        **fields: Any,
    ) -> None:
        """Send a request without waiting; `on_reply` is called with the reply from a later `wait` or `request`.

        `later`: together with the next one, or when something is waited for.
        """
        self._next_id += 1
        message: Message = {"op": op, "id": self._next_id, **fields}
        if payload:
            message["size"] = len(payload)
        if on_reply is not None:
            self._replies[self._next_id] = on_reply
        data = self._later + json.dumps(message).encode() + b"\n" + payload
        self._later = data if later else b""
        if not later:
            self._stream.send(data)

    def ask(self, op: str, payload: bytes = b"", **fields: Any) -> Callable[[float | None], Message]:
        """Send a request now; the function returned waits for its reply (see `request`)."""
        replies: list[Message] = []
        self.send(op, payload, on_reply=replies.append, **fields)

        def reply(timeout: float | None = None) -> Message:
            limit = self._silence_limit if timeout is None else timeout
            asked = time.monotonic()
            while not replies:
                # Without a time of its own, an answer may be as long on its way as a slow link needs: silence ends it.
                since = asked if timeout is not None else max(asked, self.heard_at)
                left = since + limit - time.monotonic()
                if left <= 0:
                    raise NodeUnreachable(f"The node did not answer within {limit:g} seconds.")
                self._pump(left, None)
            if not replies[0].get("ok"):
                message = str(replies[0].get("message", "no reason given"))
                raise AgentError(str(replies[0].get("error", "unknown")), message)
            return replies[0]

        return reply

    def request(self, op: str, payload: bytes = b"", *, timeout: float | None = None, **fields: Any) -> Message:
        """Send a request and wait for its reply, at most `timeout` seconds (default: until the limit of silence)."""
        return self.ask(op, payload, **fields)(timeout)

    def wait(self, timeout: float, wake_fd: int | None = None) -> list[Message]:
        """Pushes that came; waits at most `timeout` seconds for the first, or until `wake_fd` is readable."""
        if not self._pushes:
            self._pump(timeout, wake_fd)
        pushes = list(self._pushes)
        self._pushes.clear()
        return pushes

    def pushed(self, kind: str) -> bool:
        """Whether such a push came and was not taken by `wait` yet."""
        return any(push["push"] == kind for push in self._pushes)

    def _pump(self, timeout: float, wake_fd: int | None) -> None:
        if self._later:
            data, self._later = self._later, b""
            self._stream.send(data)
        if not self._stream.ready():
            descriptors = [self._stream.fileno()] + ([wake_fd] if wake_fd is not None else [])
            if self._stream.fileno() not in readable(descriptors, timeout) or not self._stream.ready():
                return  # or readable for something that is not for us, such as words on stderr
        data = self._stream.receive()
        if not data:
            words = self._stream.last_words()
            raise NodeUnreachable("The connection to the node was lost" + (f": {words}" if words else "."))
        self.heard_at = time.monotonic()
        for message in self._frames.feed(data):
            if "re" in message:
                clock, asked = message.get("clock"), message["re"]
                # A job without a sandbox may have replaced the agent: nothing but numbers counts.
                if isinstance(clock, (int, float)) and 0 <= clock < CLOCK_MOST:
                    self._clock = (float(clock), self.heard_at)
                callback = self._replies.pop(asked, None) if type(asked) is int else None
                if callback is not None:
                    callback(message)
            elif message.get("push") == "fatal":  # its last word
                raise NodeUnreachable(f"The node's agent has ended: {str(message.get('message'))[:LAST_WORDS]}")
            elif "push" in message:
                self._pushes.append(message)

    # -- what is known of the other side ---------------------------------------------------------------------------

    def silent_for(self) -> float:
        """Seconds since anything came."""
        return time.monotonic() - self.heard_at

    def node_clock(self) -> float:
        """The node's own clock, never later than it truly is: its last word on it plus the time since we got that.

        Deadlines sent to a node are in its clock, so the two clocks are never compared.
        """
        if self._clock is None:
            raise NodeUnreachable("The node's clock is not known yet.")
        clock, heard = self._clock
        return clock + (time.monotonic() - heard)

    def greet(self, instance: str, timeout: float) -> Message:
        """Say hello; raises NodeRefused when the agent speaks another protocol."""
        self.hello = self.request("hello", timeout=timeout, protocol=PROTOCOL, instance=instance)
        if self.hello.get("protocol") != PROTOCOL:
            raise NodeRefused(f"The node's agent speaks protocol {self.hello.get('protocol')}, not {PROTOCOL}.")
        return self.hello

    @property
    def boot_id(self) -> str:
        """Identity of the node's current boot."""
        return str(self.hello.get("boot_id", ""))

    def close(self) -> None:
        """Close; the agent ends, its jobs go on."""
        self._stream.close()


class Executor(Protocol):
    """A place where jobs run."""

    node_id: str
    address: str
    # Whether the place can be cut off from the server: then attempts carry a lease.
    remote: bool

    def connect(self) -> NodeConnection:
        """A greeted connection. Raises NodeUnreachable (try again) or NodeRefused (an operator must act)."""

    def python(self) -> str:
        """The interpreter for jobs, as the node should look it up."""

    def gpus(self) -> list[int] | None:
        """GPU indices that belong to the node; None: all that are there."""


class WakeUp:
    """A descriptor that other threads make readable."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Readable after `set`."""
        return self._read

    def set(self) -> None:
        """Wake the waiter. Any thread, any time, even after `close`."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._write, b"\0")

    def clear(self) -> None:
        """Take what was set."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._read, 4096)) == 4096:
                pass

    def wait(self, timeout: float) -> bool:
        """Wait alone, without a connection; True when it was set."""
        if readable([self._read], timeout):
            self.clear()
            return True
        return False

    def close(self) -> None:
        """Free the descriptors."""
        os.close(self._read)
        os.close(self._write)


@dataclass(frozen=True)
class Gpu:
    """One GPU as `nvidia-smi` reports it; memory in MiB, utilisation in percent, temperature in °C."""

    index: int
    uuid: str
    name: str
    memory_total_mib: int | None
    memory_used_mib: int | None
    utilization: int | None
    temperature: int | None


@dataclass(frozen=True)
class Probe:
    """What a look at a node found."""

    python: str | None
    python_version: str | None
    python_error: str | None
    python_prefixes: list[str]
    gpus: list[Gpu]
    gpu_error: str | None
    foreign_gpu_processes: list[dict[str, Any]]
    free_bytes: int
    total_bytes: int
    free_inodes: int
    load: list[float]
    cpus: int
    memory_total_bytes: int
    memory_free_bytes: int
    sandbox_works: bool
    sandbox_reason: str | None
    # To start and end an empty program in the sandbox, and without it.
    sandbox_start_ms: float | None
    bare_start_ms: float | None
    seccomp_works: bool
    seccomp_reason: str | None
    memory_limit_works: bool
    memory_limit_reason: str | None
    kill_user_processes: bool
    # Processes of ended attempts that could not be killed and still live: `{job, attempt, pid, state}`.
    survivors: list[dict[str, Any]]
    taken_at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, message: Message) -> Probe:
        """From the agent's reply to `probe`."""
        python = message.get("python") or {}
        sandbox = message.get("sandbox") or {}
        disk = message.get("disk") or {}
        group = message.get("group") or {}
        prefixes = {str(python[name]) for name in ("prefix", "base_prefix") if python.get(name)}
        return cls(
            python=python.get("executable"),
            python_version=python.get("version"),
            python_error=message.get("python_error"),
            python_prefixes=sorted(prefixes),
            gpus=[Gpu(**{name: gpu.get(name) for name in Gpu.__dataclass_fields__}) for gpu in message.get("gpus", [])],
            gpu_error=message.get("gpu_error"),
            foreign_gpu_processes=[found for found in message.get("gpu_processes") or [] if not found.get("ours")],
            free_bytes=int(disk.get("free_bytes") or 0),
            total_bytes=int(disk.get("total_bytes") or 0),
            free_inodes=int(disk.get("free_inodes") or 0),
            load=list(message.get("load") or []),
            cpus=int(message.get("cpus") or 0),
            memory_total_bytes=int(message.get("memory_total_bytes") or 0),
            memory_free_bytes=int(message.get("memory_free_bytes") or 0),
            sandbox_works=bool(sandbox.get("works")),
            sandbox_reason=sandbox.get("reason"),
            sandbox_start_ms=sandbox.get("start_ms"),
            bare_start_ms=sandbox.get("bare_start_ms"),
            seccomp_works=bool(sandbox.get("seccomp")),
            seccomp_reason=sandbox.get("seccomp_reason"),
            memory_limit_works=bool(group.get("memory")),
            memory_limit_reason=group.get("reason"),
            kill_user_processes=bool(message.get("kill_user_processes")),
            survivors=list(message.get("survivors") or []),
        )

    def renewed(self, message: Message) -> Probe:
        """This look with what a `"only": "clean"` one found since."""
        found = Probe.of(message)
        names = ("gpus", "gpu_error", "free_bytes", "total_bytes", "free_inodes", "survivors")
        asked = message.get("gpu_processes") is not None  # only where much memory is in use
        foreign = found.foreign_gpu_processes if asked else self.foreign_gpu_processes
        return replace(self, foreign_gpu_processes=foreign, **{name: getattr(found, name) for name in names})


def probe_request(executor: Executor, settings: Settings) -> Message:
    """The fields of a `probe` request."""
    return {
        "python": executor.python(),
        "sandbox": settings.sandbox,
        "network": settings.job_network,
        "binds": settings.sandbox_binds,
        "gpus": executor.gpus(),
    }


def check_probe(probe: Probe, settings: Settings) -> None:
    """Raise NodeRefused when jobs cannot run there as the settings ask."""
    if probe.python is None:
        raise NodeRefused(f"No usable Python: {probe.python_error or 'none found'} Set JOB_PYTHON or NODE_PYTHON.")
    if settings.sandbox == "required" and not probe.sandbox_works:
        raise NodeRefused(
            f"SANDBOX=required, but it does not work there: {probe.sandbox_reason or 'no reason given'} "
            "Install bubblewrap on the node, or set SANDBOX=auto."
        )


@dataclass(frozen=True)
class JobIdentity:
    """The words that a job's command and environment may show."""

    job_id: str
    user_id: str
    competition_id: str
    project_id: str


def job_spec(job: JobIdentity, time_limit: float, probe: Probe, gpus: list[int] | None, settings: Settings) -> Message:
    """The agent's `spec` for a job: argv, environment, limits, sandbox. No user string ever meets a shell."""
    words = {
        "python": probe.python or "python3",
        "code": CODE_NAME,
        "results": RESULTS_NAME,
        "job_id": job.job_id,
        "user_id": job.user_id,
        "competition_id": job.competition_id,
        "project_id": job.project_id,
    }
    present = [gpu.index for gpu in probe.gpus]
    visible = present if gpus is None else [index for index in gpus if index in present]
    return {
        "argv": [word.format_map(words) for word in split_job_command(settings.job_command)],
        "env": {
            "JOB_ID": job.job_id,
            "USER_ID": job.user_id,
            "COMPETITION_ID": job.competition_id,
            "PROJECT_ID": job.project_id,
            "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in visible),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        },
        "limits": {
            "wall_seconds": time_limit,
            "grace_seconds": settings.kill_grace,
            "output_bytes": settings.max_output_bytes,
            "result_bytes": settings.max_result_bytes,
            "processes": settings.max_processes,
            "open_files": settings.max_open_files,
            "file_bytes": settings.max_file_bytes,
            "job_memory": settings.max_job_memory,
        },
        "sandbox": {
            "mode": "bwrap" if settings.sandbox != "off" and probe.sandbox_works else "none",
            "seccomp": probe.seccomp_works,
            "network": settings.job_network,
            "binds": settings.sandbox_binds,
            "gpus": visible,
            "python_prefixes": probe.python_prefixes,
        },
        "results_name": RESULTS_NAME,
        "prestart": settings.prestart and split_job_command(settings.job_command) == PRESTARTED,
    }


def results_expected(settings: Settings) -> bool:
    """Whether the job's command names its results file, so that a missing one matters."""
    return any("{results}" in word for word in split_job_command(settings.job_command))
