"""Output as it happens: how late a line is, what many watchers cost, how much goes through, and what else feels it."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles

from benchmarks.measure import OURS, Findings, Goal, Row, bounded, compare, interleaved, skipped
from benchmarks.servers import Client, MeasuredServer, Missing, Run, profile, resident_bytes, yielding
from tests.fleet import Fleet
from tests.server import wait_until

ORDER = 6
TITLE = "Logs"
ABOUT = """
A line's way: the job prints the machine's monotonic clock fifty times a second, and a reader of its server-sent events
compares it with his. Many watchers: each an open stream on a socket of its own, all of one held job; memory is what the
server's process grows by, and "the last has it" is the time from the first watcher's byte to the last one's. MB/s: a
job prints a block of lines as fast as it can to one reader of events, beside `ssh node cat` of a file of the same bytes
from the same node into a pipe. Eight at once: eight jobs do that, each with a reader, and status calls are made
meanwhile: in eight slots of this machine, and on eight nodes, which stand for other machines and so get only what the
server and the readers leave of this one's processors (a control group with `cpu.idle`).
Flood: a job prints for ever and one watcher reads nothing; the server's memory and the calls of others are looked at.
"""
LINE = b"epoch 12 step 3400: loss 0.7123, accuracy 0.91, learning rate 1e-4, time 0.23 s, memory 10432 MiB of 24576\n"
TICKS = "import time\nwhile True:\n    print(time.monotonic(), flush=True)\n    time.sleep(0.02)\n"
HELD = "import os\nos.mkfifo('go')\nfor word in ('held', 'now'):\n    print(word, flush=True)\n    open('go').read()\n"
FOR_EVER = f"import os\nblock = {LINE!r} * 1000\nwhile True:\n    os.write(1, block)\n"
WATCHER_KIB = 40
LAST_MS = 100
LATE_MS = 50
STATUS_P99_MS = 20
COMPETE = "; the nodes take part of the server's processors, for want of a control group"


def measure(run: Run) -> Findings:
    """Everything of this page; nodes where there are any, this machine otherwise."""
    findings = Findings()
    plain = {"SANDBOX": "off", "MAX_OUTPUT_BYTES": str(512 << 20)}
    with run.server({**plain, "NUM_GPU_NODES": "8"}) as server:
        findings.rows.append(late("a line, this machine", server, 1, run))
        findings.rows += watchers(server, run.scaled(20, 2000, 2000), run)
        calm = calm_p99(server, run)
        findings.rows += flood(server, "this machine", run, calm)
        findings.rows.append(
            all_at_once(server, 2 if run.smoke else 8, "this machine", run, calm, contextlib.nullcontext(True))
        )
    try:
        fleet = run.fleet(8)
    except Missing as missing:
        findings.rows.append(skipped("output of one job", "MB/s", "ssh node cat", str(missing)))
        return findings
    with run.server({**plain, **fleet.settings()}) as server:
        findings.rows.append(late("a line, one SSH node", server, 1, run))
        findings.rows.append(late(f"a line, {fleet.size} busy SSH nodes", server, fleet.size, run))
        findings.rows += amount(server, fleet, run)
        calm = calm_p99(server, run)
        findings.rows.append(all_at_once(server, fleet.size, "SSH nodes", run, calm, yielding(fleet)))
        findings.rows += flood(server, "SSH nodes", run, calm)
    return findings


# -- jobs and readers ----------------------------------------------------------------------------------------------


class Reader:
    """A stream of server-sent events of a job's stdout, on a raw socket."""

    def __init__(self, server: MeasuredServer, user: str, job_id: str, *, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.settimeout(60)
        head = (
            f"GET /api/logs/{job_id}?follow=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token(user)}\r\n"
        )
        self.socket.sendall(f"{head}Accept: text/event-stream\r\n\r\n".encode())

    def read(self, size: int = 1 << 20) -> bytes:
        """What has come."""
        data = self.socket.recv(size)
        if not data:
            raise RuntimeError("the server closed the stream")
        return data

    def until(self, word: bytes) -> bytes:
        """Everything up to the piece with this word."""
        data = b""
        while word not in data:
            data += self.read()
        return data

    def lines(self) -> Iterator[bytes]:
        """Its lines. Looking for more than one character would cost as much as what is measured."""
        rest = b""
        while True:
            *lines, rest = (rest + self.read()).split(b"\n")
            yield from lines

    def drain(self) -> tuple[int, float]:
        """Read to the end: the bytes of output that came, and the seconds from the first to the last of them."""
        event, last, missed, began, ended = b"", 0, 0, 0.0, 0.0
        for line in self.lines():
            if line.startswith(b"event: "):
                event = line.removeprefix(b"event: ")
                if event == b"end":
                    break
            elif line.startswith(b"id: "):
                last, ended = int(line.removeprefix(b"id: ")), time.monotonic()
                began = began or ended
            elif event == b"skipped" and line.startswith(b"data: "):
                gap = json.loads(line.removeprefix(b"data: "))
                missed += gap["to"] - gap["from"]
        return last - missed, ended - began

    def close(self) -> None:
        """Leave."""
        self.socket.close()


@contextlib.contextmanager
def running(server: MeasuredServer, users: list[str], code: str) -> Iterator[dict[str, str]]:
    """A job of each user that is running: job ids by user; cancelled at the end."""
    jobs = {user: server.submit(user, code, expected_time=600) for user in users}
    try:
        for user, job_id in jobs.items():
            server.wait_for(job_id, user, ("running",))
        yield jobs
    finally:
        for user, job_id in jobs.items():
            server.cancel(job_id, user)
        for user, job_id in jobs.items():
            server.wait_for(job_id, user)


def people(number: int) -> list[str]:
    return [f"logs{one}" for one in range(number)]


class Prober:
    """Asks for a job's status again and again while something else goes on: milliseconds of each call."""

    def __init__(self, server: MeasuredServer, user: str, job_id: str) -> None:
        self.taken: list[float] = []
        self._client = Client(server.port, server.token(user))
        self._path = f"/api/status/{job_id}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.wait(0.01):
            began = time.perf_counter()
            status, _ = self._client.get(self._path)
            self.taken.append((time.perf_counter() - began) * 1000)
            if status != 200:
                raise RuntimeError(f"a status call was answered {status}")

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    @property
    def p99(self) -> float:
        """Of all calls; of a few, the slowest."""
        return quantiles(self.taken, n=100)[98] if len(self.taken) >= 100 else max(self.taken)


# -- what is measured ----------------------------------------------------------------------------------------------


def late(figure: str, server: MeasuredServer, jobs: int, run: Run) -> Row:
    """Milliseconds from `print` to the reader, with so many jobs printing and each followed."""
    taken: list[float] = []
    with running(server, people(jobs), TICKS) as started, contextlib.ExitStack() as things:
        readers = [Reader(server, user, job_id) for user, job_id in started.items()]
        for reader in readers:
            things.callback(reader.close)
            reader.until(b"data: ")
        wanted = run.scaled(5, 100, 1000) * jobs
        while len(taken) < wanted:
            for ready in select.select([reader.socket for reader in readers], [], [], 60)[0]:
                data = ready.recv(1 << 16)
                now = time.monotonic()
                taken += [(now - float(found)) * 1000 for found in re.findall(rb'data: "(\d+\.\d+)', data)]
    note = f"p99 {sorted(taken)[int(len(taken) * 0.99)]:.1f} ms of {len(taken)} lines"
    return bounded(figure, "ms", taken, at_most=LATE_MS, note=note)


def watchers(server: MeasuredServer, number: int, run: Run) -> list[Row]:
    """What an idle watcher costs in memory, and when the last of all has a line."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pid = server.pid
    user = people(1)[0]
    spans: list[float] = []
    costs: list[float] = []
    for _ in range(run.scaled(1, 3, 10)):
        with running(server, [user], HELD) as jobs, contextlib.ExitStack() as things:
            job_id = jobs[user]
            server.wait_for_output(job_id, user, "held")
            before = resident_bytes(pid)
            poll = things.enter_context(select.epoll())  # with `poll` it would be the looking that takes the time
            sockets = {}
            for _ in range(number):
                reader = Reader(server, user, job_id)
                things.callback(reader.close)
                reader.until(b"held")
                sockets[reader.socket.fileno()] = reader.socket
                poll.register(reader.socket, select.EPOLLIN)
            costs.append((resident_bytes(pid) - before) / number / 1024)
            (pipe,) = server.jobs_dir.glob(f".nodes/*/*/attempts/{job_id}.*/*/go")
            with open(pipe, "w"):
                pass
            first = 0.0
            while sockets:
                for descriptor, _ in poll.poll(30):
                    now = time.monotonic()
                    first = first or now
                    if b"now" in sockets[descriptor].recv(1 << 16):
                        poll.unregister(descriptor)
                        del sockets[descriptor]
            spans.append((now - first) * 1000)
    return [
        bounded(f"memory of one of {number} watchers", "KiB", costs[:1], at_most=WATCHER_KIB),
        bounded(f"a line to {number} watchers: the last after the first", "ms", spans, at_most=LAST_MS),
    ]


def printing(size: int) -> str:
    """A job that prints so many bytes."""
    blocks = max(1, size // (len(LINE) * 1000))
    code = f"import os, sys\nblock = {LINE!r} * 1000\nfor _ in range({blocks}):\n    sys.stdout.buffer.write(block)\n"
    return code + "open(os.environ['RESULTS_FILE'], 'w').close()\n"  # else the output would be made into records


def amount(server: MeasuredServer, fleet: Fleet, run: Run) -> list[Row]:
    """MB/s of one job's output to one reader, beside `cat` of as much over SSH."""
    size = run.scaled(1, 128, 512) << 20
    user = people(1)[0]
    node = fleet.node(1)
    name = node.home / "bench-output"
    name.write_bytes(LINE * (size // len(LINE)))
    name.chmod(0o644)

    def ours() -> float:
        job_id = server.submit(user, printing(size), expected_time=600)
        wait_until(lambda: server.status(job_id, user)["status"] != "pending", 30, "the job to start")
        reader = Reader(server, user, job_id)
        got, seconds = reader.drain()
        reader.close()
        server.wait_for(job_id, user)
        return got / seconds / 1e6

    def cat() -> float:
        words = ["ssh", "-F", str(fleet.ssh_config), "node1", "cat", str(name)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            got = len(process.stdout.read(1))
            began = time.monotonic()
            while data := process.stdout.read1(1 << 20):  # type: ignore[attr-defined]
                got += len(data)
            return got / (time.monotonic() - began) / 1e6

    try:
        values = interleaved({OURS: ours, "ssh node cat": cat}, rounds=run.scaled(1, 4, 10), seconds=run.seconds * 5)

        def shown() -> str:
            with running(server, [user], FOR_EVER) as jobs, following(server, jobs):
                return profile(server.pid, 3)

        goals = {"ssh node cat": Goal(at_least=0.5)}
        figure = "output of one job to one reader"
        return compare(figure, "MB/s", values, goals, profile=None if run.smoke else shown)
    finally:
        name.unlink()


@contextlib.contextmanager
def following(server: MeasuredServer, jobs: dict[str, str]) -> Iterator[Callable[[], int]]:
    """A reader of each job that reads as fast as it can; the function gives the bytes they have read on the wire."""
    readers = [Reader(server, user, job_id) for user, job_id in jobs.items()]
    read = [0] * len(readers)
    over = threading.Event()

    def pull(number: int) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while not over.is_set():
                read[number] += len(readers[number].read())

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(len(readers))]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(read)
    finally:
        over.set()
        for reader in readers:
            reader.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for reader in readers:
            reader.close()


def all_at_once(
    server: MeasuredServer,
    jobs: int,
    where: str,
    run: Run,
    calm: str,
    way: contextlib.AbstractContextManager[bool],
) -> Row:
    """Status calls while so many jobs print as fast as they can to a reader each.

    `way` is how the nodes make way while it is measured, and whether they do: not longer, or on a busy machine the
    cancelled jobs would find no time to end in.
    """
    users = people(jobs)
    with (
        running(server, users, FOR_EVER) as started,
        way as yields,
        following(server, started) as read,
        Prober(server, users[0], started[users[0]]) as prober,
    ):
        began, before = time.monotonic(), read()
        wait_until(lambda: len(prober.taken) >= run.scaled(5, 200, 1000), 120, "status calls")
        rate = (read() - before) / (time.monotonic() - began) / 1e6
    note = f"{jobs} readers together {rate:.0f} MB/s on the wire; {calm}{'' if yields else COMPETE}"
    return bounded(
        f"p99 of status while {jobs} jobs print, {where}", "ms", [prober.p99], at_most=STATUS_P99_MS, note=note
    )


def calm_p99(server: MeasuredServer, run: Run) -> str:
    """The p99 of status calls when nothing else goes on here, in words: what else the machine does is in it, too."""
    user = people(1)[0]
    job_id = server.submit(user)
    server.wait_for(job_id, user)
    with Prober(server, user, job_id) as prober:
        wait_until(lambda: len(prober.taken) >= run.scaled(5, 200, 1000), 120, "status calls")
    return f"p99 of status when nothing prints {prober.p99:.1f} ms"


def flood(server: MeasuredServer, where: str, run: Run, calm: str) -> list[Row]:
    """One job prints for ever, its one watcher reads nothing; memory, status calls, and the lines of another job."""
    pid = server.pid
    loud, quiet = people(2)
    taken: list[float] = []
    with (
        running(server, [loud], FOR_EVER) as noise,
        running(server, [quiet], TICKS) as ticks,
        contextlib.ExitStack() as things,
    ):
        slow = Reader(server, loud, noise[loud], receive_buffer=4096)
        things.callback(slow.close)
        reader = Reader(server, quiet, ticks[quiet])
        things.callback(reader.close)
        reader.until(b"data: ")
        size = server.jobs_dir / noise[loud] / "stdout"
        before, begin, began = resident_bytes(pid), size.stat().st_size, time.monotonic()
        grown = 0
        with Prober(server, loud, noise[loud]) as prober:
            while len(prober.taken) < run.scaled(5, 200, 1000):
                data = reader.read(1 << 16)
                now = time.monotonic()
                taken += [(now - float(found)) * 1000 for found in re.findall(rb'data: "(\d+\.\d+)', data)]
                grown = max(grown, resident_bytes(pid) - before)
        rate = (size.stat().st_size - begin) / (time.monotonic() - began) / 1e6
    note = f"the job prints {rate:.0f} MB/s; {calm}"
    return [
        bounded(f"flood, {where}: the server grows by", "MiB", [grown / (1 << 20)], at_most=64, note=note),
        bounded(f"flood, {where}: p99 of status", "ms", [prober.p99], at_most=STATUS_P99_MS),
        bounded(
            f"flood, {where}: a line of another job", "ms", taken, at_most=LATE_MS, note=f"median {median(taken):.1f}"
        ),
    ]
