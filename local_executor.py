"""Jobs on this very machine: the same agent as on a node, as a child process. The embedded default.

May import `errors`, `config`, `executor`, `node_agent`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from config import Settings
from errors import NodeUnreachable
from executor import RECEIVE_SIZE, NodeConnection, readable
from node_agent import AGENT_FILE, AGENT_VERSION

# Of the agents and the jobs, of which eight are two dozen processes: the server on the same processors has to answer
# everybody. At 19 jobs would stand still beside other busy programs: a no-op takes seconds then, at 10 half of one.
NICENESS = 10


class PipeStream:
    """The stdin and stdout of an agent that is a child of this process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._out = process.stdin
        self._in = process.stdout.fileno()

    def fileno(self) -> int:
        """The agent's stdout."""
        return self._in

    def ready(self) -> bool:
        """Whether bytes are there."""
        return bool(readable([self._in], 0))

    def send(self, data: bytes) -> None:
        """Write all to the agent's stdin."""
        try:
            self._out.write(data)
            self._out.flush()
        except (OSError, ValueError) as error:
            raise NodeUnreachable(f"The agent on this machine has ended: {error}.") from None

    def receive(self) -> bytes:
        """What the agent has written."""
        try:
            return os.read(self._in, RECEIVE_SIZE)
        except OSError as error:
            raise NodeUnreachable(f"The agent on this machine cannot be read: {error}.") from None

    def last_words(self) -> str:
        """The agent logs to a file of its own; its exit code is all there is."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        return f"the agent on this machine ended with {self._process.returncode}"

    def close(self) -> None:
        """End the agent by closing its stdin; its jobs go on."""
        with contextlib.suppress(OSError):
            self._out.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class LocalExecutor:
    """Slot `number` (from 1) of this machine; it owns GPU `number - 1` if there is one."""

    remote = False

    def __init__(self, number: int, settings: Settings, instance: str) -> None:
        self.node_id = f"local-{number}"
        self.address = "this machine"
        self._number = number
        self._settings = settings
        self._instance = instance

    @property
    def root(self) -> Path:
        """The folder that is this slot's node."""
        return self._settings.jobs_dir / ".nodes" / self._instance / self.node_id

    def python(self) -> str:
        """JOB_PYTHON, or the interpreter the server runs with."""
        return self._settings.job_python or sys.executable

    def gpus(self) -> list[int] | None:
        """One GPU per slot."""
        return [self._number - 1]

    def connect(self) -> NodeConnection:
        """Start an agent for the slot."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            process = subprocess.Popen(  # noqa: S603  # our own agent
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(AGENT_FILE),
                    "serve",
                    "--root",
                    str(self.root),
                    "--tag",
                    AGENT_VERSION,
                    "--nice",
                    str(NICENESS),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at the server's terminal is not for the agent
                cwd=self.root,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": os.path.expanduser("~")},
            )
        except OSError as error:
            raise NodeUnreachable(f"No agent can be started on this machine: {error}.") from None
        connection = NodeConnection(PipeStream(process), silence_limit=self._settings.node_ping_timeout)
        try:
            connection.greet(self._instance, timeout=30)
        except BaseException:
            connection.close()
            raise
        return connection
