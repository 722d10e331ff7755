"""Downloads of a large results file."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import OURS, Findings, Goal, Side, bounded, compare, interleaved
from benchmarks.references import reference
from benchmarks.servers import Run, profile_during, resident_bytes

ORDER = 6
TITLE = "Downloading results"
ABOUT = """
One client downloads the raw results of a job, a gigabyte from the page cache, with its token, as
`GET /api/results/{job_id}?format=jsonl`. Beside it: a program that does nothing but `sendfile` of the same file. What
the server's memory grows by is looked at while the download runs.
"""
SENDFILE = "a bare sendfile server"
MB = 1e6


def download(port: int, request: bytes, size: int) -> float:
    """Megabytes a second; all of them must come."""
    block = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        began = time.perf_counter()
        connection.sendall(request)
        head = connection.recv(1 << 16)
        if not head.startswith(b"HTTP/1.1 200") or b"\r\n\r\n" not in head:
            raise RuntimeError(f"no download: {head[:300]!r}")
        left = size - (len(head) - head.index(b"\r\n\r\n") - 4)
        while left > 0 and (got := connection.recv_into(block)):
            left -= got
        if left:
            raise RuntimeError(f"{left} bytes did not come")
        return size / MB / (time.perf_counter() - began)


def measure(run: Run) -> Findings:
    """The rate beside sendfile, and the memory."""
    findings = Findings()
    size = run.scaled(10, 1000, 1000) * 1_000_000
    with contextlib.ExitStack() as things:
        server = things.enter_context(run.server({"SANDBOX": "off"}))
        pid = server.pid
        job = server.run_job("alice", "print('{}')\n")
        # As if the job had made it: what is sent is the file as it is.
        path = server.jobs_dir / job["job_id"] / "results.jsonl"
        if not path.is_file():
            raise RuntimeError(f"the sealed results are not at {path}")
        fill(path, size)
        token = server.token("alice")
        head = f"GET /api/results/{job['job_id']}?format=jsonl HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        ours = partial(download, server.port, f"{head}Connection: close\r\n\r\n".encode(), size)
        sides: dict[str, Side] = {OURS: ours}
        if run.peers:
            port, _ = things.enter_context(reference(path))
            sides[SENDFILE] = partial(download, port, b"GET / HTTP/1.1\r\n\r\n", size)
        values = interleaved(sides, rounds=run.scaled(1, 7, 25), seconds=run.seconds * 3)
        shown = partial(profile_during, pid, 2, lambda: [ours() for _ in range(4)])
        findings.rows += compare("download of 1 GB", "MB/s", values, {SENDFILE: Goal(at_least=0.6)}, profile=shown)
        before = resident_bytes(pid)
        with most_of(pid) as most:
            for _ in range(run.scaled(1, 3, 10)):
                ours()
        grown = max(0.0, (most[0] - before) / MB)
        findings.rows.append(bounded("growth of the server's memory while it sends", "MB", [grown], at_most=20))
    return findings


def fill(path: Path, size: int) -> None:
    """Make the file that large."""
    block = b'{"score": 0.5}\n' * 70_000
    with open(path, "r+b") as file:
        file.truncate(0)
        while file.tell() < size:
            file.write(block[: size - file.tell()])


@contextlib.contextmanager
def most_of(pid: int) -> Iterator[list[int]]:
    """What a process's memory is at most meanwhile, in bytes; one number, looked at fifty times a second."""
    most, ended = [resident_bytes(pid)], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], resident_bytes(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        ended.set()
        looking.join()
