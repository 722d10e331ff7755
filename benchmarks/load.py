"""A closed loop of HTTP clients in a process of its own, cheap enough to share two cores with what it measures.

    python3 -m benchmarks.load  < specification  > outcome        (both JSON: `Wanted`, `Outcome`)

Each client is one kept-alive connection that sends its next request when the answer to the last is whole. A request
may hold a mark, which becomes a number of seven digits, another one in every request.
Imports nothing of the project.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MARK = "@NUMBER"


@dataclass(frozen=True)
class Wanted:
    """The load: for so many seconds, or so many requests, whichever ends first.

    With `opening`, so many connections are made a second, each for one request; else all are made before.
    """

    port: int
    request: str  # latin-1
    clients: int
    seconds: float = 1.0
    requests: int = 1 << 40
    first: int = 0
    opening: int = 0


@dataclass
class Outcome:
    """What came: answers of the status 200 and others; milliseconds of each answer in order, and in all the seconds."""

    answered: int = 0
    refused: int = 0
    seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds in which that share of the answers had come."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Client:
    __slots__ = ("began", "buffer", "left", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.buffer = b""
        self.left = b""
        self.began = 0.0

    def send(self, data: bytes) -> bool:
        """Whether all of it is on its way."""
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        self.left = data[sent:]
        return not self.left

    def answer(self) -> int | None:
        """The status of a whole answer, None while it is not whole."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed a connection")
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        place = self.buffer.lower().find(b"content-length:", 0, end)
        if place < 0:
            raise ConnectionError(f"an answer without Content-Length: {self.buffer[:end]!r}")
        if len(self.buffer) < end + 4 + int(self.buffer[place + 15 :].split(b"\r\n", 1)[0]):
            return None
        status = int(self.buffer[9:12])
        self.buffer = b""
        return status


def run(wanted: Wanted) -> Outcome:
    """Do it."""
    template, mark = wanted.request.encode("latin-1"), MARK.encode()
    number, unanswered = wanted.first, 0
    outcome = Outcome()
    clients: dict[int, _Client] = {}
    poll = select.epoll()

    def send(client: _Client) -> None:
        nonlocal number, unanswered
        number += 1
        unanswered += 1
        client.began = time.perf_counter()
        done = client.send(template.replace(mark, b"%07d" % number))
        poll.modify(client.socket, select.EPOLLIN if done else select.EPOLLIN | select.EPOLLOUT)

    def connect() -> _Client:
        client = _Client(wanted.port)
        clients[client.socket.fileno()] = client
        poll.register(client.socket, 0)
        return client

    if not wanted.opening:
        for _ in range(wanted.clients):
            connect()
    began = time.perf_counter()
    for client in clients.values():
        send(client)
    until = began + wanted.seconds
    while True:
        now = time.perf_counter()
        if wanted.opening:
            while len(clients) < min(wanted.clients, (now - began) * wanted.opening):
                send(connect())
        more = now < until and number - wanted.first < wanted.requests
        if not unanswered and not (more and wanted.opening and len(clients) < wanted.clients):
            break
        for descriptor, event in poll.poll(0.001 if wanted.opening else 1.0):
            client = clients[descriptor]
            if event & select.EPOLLOUT and client.send(client.left):
                poll.modify(descriptor, select.EPOLLIN)
            status = client.answer() if event & ~select.EPOLLOUT else None
            if status is None:
                continue
            unanswered -= 1
            outcome.milliseconds.append((time.perf_counter() - client.began) * 1000)
            if status == 200:
                outcome.answered += 1
            else:
                outcome.refused += 1
            if more and not wanted.opening and number - wanted.first < wanted.requests:
                send(client)
    outcome.seconds = time.perf_counter() - began
    for client in clients.values():
        client.socket.close()
    return outcome


def apart(wanted: Wanted) -> Outcome:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        cwd=PROJECT,
        input=json.dumps(asdict(wanted)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Outcome(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(run(Wanted(**json.load(sys.stdin))))))
