"""A server whose nodes are simulated: they answer at once and run nothing, so that hundreds of them cost only what the
server spends on them.

    python3 -m benchmarks.simulated        with the settings of the environment; NUM_GPU_NODES nodes

Imports `main`, in whose place it decides which executors there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import config
import main
from benchmarks.servers import MeasuredServer
from config import Settings
from executor import Executor, Frames, NodeConnection
from node_agent import PROTOCOL
from tests.server import PROJECT, wait_until


class SimulatedAgent:
    """The agent's side of a connection, in the worker's own thread: an answer is there when the request is sent."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._answers = bytearray()
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Readable when an answer is there."""
        return self._readable

    def ready(self) -> bool:
        """Whether one is there."""
        return bool(self._answers)

    def send(self, data: bytes) -> None:
        """Answer every request in it."""
        for request in self._frames.feed(data):
            self._say({"re": request["id"], "ok": True, "clock": time.monotonic(), **self._answer(request)})
            if request["op"] == "launch":
                record = {"exit_code": 0, "signal": None, "reason": None, "stdout_bytes": 0, "stderr_bytes": 0}
                self._say({"push": "exit", "job": request["job"], "attempt": request["attempt"], "record": record})
        os.eventfd_write(self._readable, 1)

    def _say(self, message: dict[str, object]) -> None:
        self._answers += json.dumps(message).encode() + b"\n"

    @staticmethod
    def _answer(request: dict[str, object]) -> dict[str, object]:
        if request["op"] == "hello":
            return {"protocol": PROTOCOL, "boot_id": "simulated"}
        if request["op"] == "list":
            return {"attempts": []}
        if request["op"] == "probe":
            return {
                "python": {"executable": sys.executable, "version": "3", "prefix": sys.prefix},
                "disk": {"free_bytes": 1 << 40, "total_bytes": 1 << 40, "free_inodes": 1 << 30},
                "sandbox": {"works": True, "seccomp": True},
                "group": {"memory": True},
            }
        return {}

    def receive(self) -> bytes:
        """All answers that are there."""
        os.eventfd_read(self._readable)
        data, self._answers = bytes(self._answers), bytearray()
        return data

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self._readable)

    def last_words(self) -> str:
        """Nothing."""
        return ""


class SimulatedExecutor:
    """A node that runs nothing and says that it has."""

    remote = True

    def __init__(self, number: int, settings: Settings, instance: str) -> None:
        self.node_id = f"simulated-{number}"
        self.address = "nowhere"
        self._settings = settings
        self._instance = instance

    def connect(self) -> NodeConnection:
        """At once."""
        connection = NodeConnection(SimulatedAgent(), silence_limit=self._settings.node_ping_timeout)
        connection.greet(self._instance, timeout=5)
        return connection

    def python(self) -> str:
        """Never started."""
        return sys.executable

    def gpus(self) -> list[int] | None:
        """None."""
        return []


def make_executors(settings: Settings, instance: str) -> list[Executor]:
    """So many simulated nodes."""
    return [SimulatedExecutor(number, settings, instance) for number in range(1, settings.num_gpu_nodes + 1)]


class SimulatedServer(MeasuredServer):
    """The same in a process of its own."""

    def start(self) -> None:
        """Start and wait until every node is connected."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.simulated"],
                cwd=PROJECT,
                env=self.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_until(self._is_ready, 60, "the server to be ready")
        wait_until(self._all_connected, 60, "all nodes to be connected")


if __name__ == "__main__":
    main.make_executors = make_executors
    sys.exit(main.serve(config.settings()))
