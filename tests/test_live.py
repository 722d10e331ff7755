"""A job as it happens: `GET /api/logs/{id}?follow=true` and `GET /api/status/{id}?follow=true`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from live import Channels, Collapse, LogStream, encoding_of, json_string
from storage import OutputPart, Storage
from tests.fleet import Fleet, descendants
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release, work_folders
from tests.server import Server, wait_until
from wakeups import JobWatch

LINES = """
import sys, time
for number in range({count}):
    print(f"line {{number}} ä", flush=True)
    time.sleep({pause})
"""


def follow(server: Server, job_id: str, user: str, accept: str, **query: Any) -> requests.Response:
    """An open stream."""
    headers = {**server.bearer(user), "Accept": accept, **query.pop("headers", {})}
    url = f"{server.url}/api/logs/{job_id}?follow=true"
    return requests.get(url, headers=headers, params=query, stream=True, timeout=30)


def events(response: requests.Response) -> Iterator[dict[str, str]]:
    """The server-sent events."""
    event: dict[str, str] = {}
    for line in response.iter_lines(chunk_size=1, decode_unicode=True):
        if line == "":
            if event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


def test_plain_text_comes_while_the_job_runs_and_ends_with_it(server: Server) -> None:
    job_id = server.submit("live1", LINES.format(count=8, pause=0.2))
    response = follow(server, job_id, "live1", "text/plain")
    assert response.headers["content-type"].startswith("text/plain")
    arrived: list[float] = []
    text = b""
    for piece in response.iter_content(None):
        arrived.append(time.monotonic())
        text += piece
    assert text.decode() == "".join(f"line {n} ä\n" for n in range(8))
    assert arrived[-1] - arrived[0] > 0.8  # as it appeared, not in one piece at the end
    assert server.status(job_id, "live1")["status"] == "completed"


def test_events_carry_offsets_from_which_a_reader_resumes(server: Server) -> None:
    job_id = server.submit("live2", LINES.format(count=12, pause=0.1))
    response = follow(server, job_id, "live2", "text/event-stream")
    first = list(itertools.islice(events(response), 3))
    response.close()
    assert [event["event"] for event in first] == ["output"] * 3
    seen = "".join(json.loads(event["data"]) for event in first)
    assert int(first[-1]["id"]) == len(seen.encode())
    resume = {"Last-Event-ID": first[-1]["id"]}
    rest = list(events(follow(server, job_id, "live2", "text/event-stream", headers=resume)))
    assert rest[-1]["event"] == "end"
    assert json.loads(rest[-1]["data"])["status"] == "completed"
    seen += "".join(json.loads(event["data"]) for event in rest[:-1])
    assert seen == "".join(f"line {n} ä\n" for n in range(12))


def test_an_ended_job_is_sent_whole_and_tail_gives_its_end(server: Server) -> None:
    job_id = server.run_job("live3", "import sys; print('a' * 200_000); print('last')")["job_id"]
    whole = follow(server, job_id, "live3", "text/plain").content
    assert whole == b"a" * 200_000 + b"\nlast\n"
    assert follow(server, job_id, "live3", "text/plain", tail=5).content == b"last\n"
    assert follow(server, job_id, "live3", "text/plain", stream="stderr").content == b""


def test_carriage_returns_and_broken_characters_survive_events(server: Server) -> None:
    code = "import sys; sys.stdout.buffer.write('10%\\r20%\\rä'.encode() + b'\\xff\\xc3')"
    job_id = server.run_job("live4", code)["job_id"]
    found = [json.loads(e["data"]) for e in events(follow(server, job_id, "live4", "*/*")) if e["event"] == "output"]
    assert "".join(found) == "10%\r20%\rä\ufffd\ufffd"


def test_a_reader_far_behind_skips_ahead_and_is_told(server: Server) -> None:
    code = """
import sys, time
block = b"x" * (1 << 20)
for _ in range(40):
    sys.stdout.buffer.write(block)
sys.stdout.flush()
print("done", file=sys.stderr, flush=True)
time.sleep(30)
"""
    job_id = server.submit("live5", code)
    wait_until(lambda: int(server.get(f"/api/logs/{job_id}", "live5", stream=True).headers["x-log-size"]) == 40 << 20)
    found = list(itertools.islice(events(follow(server, job_id, "live5", "text/event-stream")), 1))
    assert found[0]["event"] == "skipped"
    assert json.loads(found[0]["data"]) == {"from": 0, "to": (40 << 20) - (1 << 16)}
    server.cancel(job_id, "live5")


FLOOD = """
import os
os.mkfifo('go')
block = b"x" * ((1 << 20) - 1) + b"\\n"
for _ in range(32):
    os.write(1, block)
open('go').read()
"""
TICKS = "import time\nwhile True:\n    print(time.monotonic(), flush=True)\n    time.sleep(0.02)\n"
FLOODED = 32 << 20


@pytest.mark.parametrize("where", ["server", "ssh_server"])
def test_a_flood_and_a_watcher_who_does_not_read_hurt_nobody(request: pytest.FixtureRequest, where: str) -> None:
    server: Server = request.getfixturevalue(where)
    quiet, loud = server.submit("quiet", TICKS), server.submit("loud", FLOOD)
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status")
    late: list[float] = []
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", server.port))
        head = (
            f"GET /api/logs/{loud}?follow=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token('loud')}\r\n"
        )
        slow.sendall(f"{head}\r\n".encode())
        before = memory(status)
        others = follow(server, quiet, "quiet", "*/*")

        def read() -> None:
            for event in events(others):
                words = json.loads(event["data"]).split() if event["event"] == "output" else []
                late.extend(time.monotonic() - float(word) for word in words[-1:])

        reading = threading.Thread(target=read)
        reading.start()
        while int(server.get(f"/api/logs/{loud}?tail=0", "loud").headers["x-log-size"]) < FLOODED:
            assert server.status(loud, "loud")["status"] in ("pending", "running")
        assert memory(status) - before < 16 << 20
        assert median(late) < 5  # the benchmarks have figures; here the machine may do anything else
        seen = b""
        while b"event: skipped" not in seen:
            seen = seen[-100:] + slow.recv(1 << 20)
        while b"}" not in (skipped := seen.partition(b"event: skipped")[2]):
            seen += slow.recv(1 << 20)
        assert f'"to": {FLOODED - (1 << 16)}}}'.encode() in skipped
    for job_id, user in ((quiet, "quiet"), (loud, "loud")):
        server.cancel(job_id, user)
    reading.join()


def test_a_flood_on_this_machine_leaves_the_processors_to_the_server_first(server: Server) -> None:
    job_id = server.submit("loud2", FLOOD)
    wait_until(lambda: int(server.get(f"/api/logs/{job_id}?tail=0", "loud2").headers["x-log-size"]) == FLOODED)
    (supervisor,) = server.jobs_dir.glob(f".nodes/*/*/attempts/{job_id}.*/supervisor.json")
    floods = [process.pid for process in descendants(json.loads(supervisor.read_text())["pid"])]
    assert floods
    assert server.process is not None
    own = os.getpriority(os.PRIO_PROCESS, server.process.pid)
    assert all(os.getpriority(os.PRIO_PROCESS, pid) > own for pid in floods)
    server.cancel(job_id, "loud2")


LAST_WORDS = """
import os, signal
def end(*_):
    os.write(2, b"y" * 100_000)
    os.write(1, b"last words after %d\\n" % n)
    os._exit(0)
n = 0
signal.signal(signal.SIGTERM, end)
while True:
    os.write(1, b"line %d\\n" % n); n += 1
"""


def test_nothing_printed_before_the_end_of_a_cancelled_job_is_lost(server: Server) -> None:
    job_id = server.submit("live15", LAST_WORDS)
    server.wait_for_output(job_id, "live15", "line 100\n")
    assert server.cancel(job_id, "live15").json()["status"] == "cancelled"
    answer = server.results(job_id, "live15")
    *lines, last = answer["stdout"].splitlines()
    count = int(last.removeprefix("last words after "))
    # A signal comes between a line and its number at worst.
    assert lines in ([f"line {n}" for n in range(count)], [f"line {n}" for n in range(count + 1)])
    assert answer["stderr"] == "y" * 100_000
    followed = follow(server, job_id, "live15", "text/plain", stream="merged").content
    assert followed.count(last.encode() + b"\n") == 1
    assert len(followed) == len(answer["stdout"]) + len(answer["stderr"])


def memory(status: Path) -> int:
    """Resident bytes of a process."""
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) << 10


def test_a_watcher_is_told_of_another_attempt_however_much_it_has_printed(tmp_path: Path) -> None:
    storage, growth, changes = Storage(tmp_path), JobWatch(), JobWatch()
    storage.prepare("job", b"", {})

    class Job:
        over = False

        def read(self, offset: int) -> OutputPart:
            return storage.read_output("job", "stdout", offset, 100)

        def ended(self) -> dict[str, Any] | None:
            return {"status": "completed"} if self.over else None

    async def watch() -> bytes:
        for each in (growth, changes):
            each.bind(asyncio.get_running_loop())
        channels, job, got, sent = Channels(growth, changes), Job(), bytearray(), asyncio.Event()

        async def send(message: Any) -> None:
            got.extend(message.get("body", b""))
            sent.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        def printed(attempt: int, text: bytes) -> None:
            output = storage.output("job", attempt)
            output.append("stdout", 0, text)
            output.close()

        async def seen(text: bytes) -> None:
            while text not in got:
                sent.clear()
                await asyncio.wait_for(sent.wait(), 20)

        printed(1, b"first")
        stream = LogStream(
            lambda waiter: channels.join("job", "stdout", lambda: job, waiter),
            lambda waiter: channels.leave("job", "stdout", waiter),
            lambda: False,
            *(0, encoding_of("stdout", plain=True)),
        )
        watching = asyncio.ensure_future(stream({}, receive, send))
        await seen(b"first")
        printed(2, b"second and longer")
        growth.changed("job")
        await seen(b"longer")
        job.over = True
        changes.changed("job")
        await asyncio.wait_for(watching, 20)
        assert growth.waiting() == changes.waiting() == 0
        return bytes(got)

    assert asyncio.run(watch()) == b"first\n[the job runs again from its beginning]\nsecond and longer"


def test_a_thread_with_much_output_lets_the_loop_have_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    growth, heard = JobWatch(), threading.Event()

    def tell() -> None:
        growth.heard()
        heard.set()

    async def busy_loop() -> None:
        growth.bind(asyncio.get_running_loop())
        monkeypatch.setattr("wakeups.TURN_MOST", 30.0)
        telling = threading.Thread(target=tell)
        telling.start()
        assert not heard.wait(0.1)  # nothing else gets its turn while this coroutine waits here
        while not heard.is_set():
            await asyncio.sleep(0)
        telling.join()
        heard.clear()
        monkeypatch.setattr("wakeups.TURN_MOST", 0.01)
        telling = threading.Thread(target=tell)
        telling.start()
        assert heard.wait(30)  # a loop that hangs holds up no job
        telling.join()

    growth.heard()  # without a loop there is none to wait for
    asyncio.run(busy_loop())
    growth.heard()


def test_others_may_not_listen(server: Server) -> None:
    job_id = server.run_job("live6")["job_id"]
    assert follow(server, job_id, "live7", "text/plain").status_code == 403


def test_a_stop_of_the_server_ends_streams_at_once() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        job_id = server.submit("alice", "import time; print('on', flush=True); time.sleep(60)")
        response = follow(server, job_id, "alice", "text/plain")
        pieces = response.iter_content(None)
        seen = b""
        while seen != b"on\n":
            seen += next(pieces)
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 5
        assert b"".join(pieces) == b""


# -- the status ----------------------------------------------------------------------------------------------------


def follow_status(server: Server, job_id: str, user: str, **headers: str) -> requests.Response:
    """An open stream of the job's status."""
    url = f"{server.url}/api/status/{job_id}?follow=true"
    return requests.get(url, headers={**server.bearer(user), **headers}, stream=True, timeout=60)


def statuses(response: requests.Response) -> Iterator[dict[str, str]]:
    """The events of a status stream besides transitions."""
    return (event for event in events(response) if event["event"] != "transition")


def test_the_status_is_seen_at_each_change() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        first, second = server.submit("alice", HOLD), server.submit("bob", HOLD)
        server.wait_for_output(first, "alice", "held")
        found = statuses(follow_status(server, second, "bob"))
        waiting = next(found)
        assert waiting["event"] == "status"
        assert json.loads(waiting["data"]).keys() == server.status(second, "bob").keys()
        assert [json.loads(waiting["data"])[name] for name in ("status", "queue_position")] == ["pending", 1]
        release(server, None, first)
        running = next(event for event in found if json.loads(event["data"])["status"] == "running")
        assert running["event"] == "status"
        release(server, None, second)
        *_, last_status, end = found
        assert (last_status["event"], end["event"]) == ("status", "end")
        assert json.loads(last_status["data"]) == json.loads(end["data"]) == server.status(second, "bob")
        assert json.loads(end["data"])["status"] == "completed"


def test_a_cancelled_job_ends_its_status_stream(server: Server) -> None:
    job_id = server.submit("live8", HOLD)
    server.wait_for_output(job_id, "live8", "held")
    found = statuses(follow_status(server, job_id, "live8"))
    assert json.loads(next(found)["data"])["status"] == "running"
    server.cancel(job_id, "live8")
    seen = list(found)
    assert seen[-1]["event"] == "end"
    assert json.loads(seen[-1]["data"])["status"] == "cancelled"
    again = list(statuses(follow_status(server, job_id, "live8")))
    assert [event["event"] for event in again] == ["status", "end"]


def test_every_transition_is_told_once_also_to_one_who_comes_again(server: Server) -> None:
    job_id = server.submit("live12", HOLD)
    server.wait_for_output(job_id, "live12", "held")
    early = follow_status(server, job_id, "live12")
    found = events(early)
    seen = [next(found) for _ in range(3)]
    early.close()
    release(server, None, job_id)
    server.wait_for(job_id, "live12")
    rest = list(events(follow_status(server, job_id, "live12", **{"Last-Event-ID": seen[-1]["id"]})))
    steps = [json.loads(event["data"]) for event in (*seen, *rest) if event["event"] == "transition"]
    trail = server.events(job_id, "live12")
    assert [step["event"] for step in steps] == ["submitted", "claimed", "started", "completed"]
    assert [{name: step[name] for name in trail[0]} for step in steps] == trail
    assert [step["status"] for step in steps if "status" in step] == ["pending", "running", "running", "completed"]
    assert [event["event"] for event in rest] == ["transition", "status", "end"]


def test_others_may_not_watch_the_status(server: Server) -> None:
    job_id = server.run_job("live9")["job_id"]
    assert follow_status(server, job_id, "live7").status_code == 403


def test_a_stop_of_the_server_ends_status_streams() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        job_id = server.submit("alice", HOLD)
        server.wait_for_output(job_id, "alice", "held")
        found = statuses(follow_status(server, job_id, "alice"))
        assert json.loads(next(found)["data"])["status"] == "running"
        assert server.terminate() == 0
        assert "end" not in [event["event"] for event in found]


# -- collapsed progress bars ---------------------------------------------------------------------------------------

BAR = "start\n" + "".join(f"\r{n:3}%|█{n}" for n in range(5)) + "\r100%|██\nplain\r\n\rlast\r"


def visible(data: bytes) -> bytes:
    """The reference, of all bytes at once."""
    ends_joined = re.sub(rb"\r+\n", b"\r\n", data)
    erased = re.sub(rb"[^\n]*\r(?=[^\r\n])", b"", ends_joined)
    return re.sub(rb"\r+\Z", b"", erased)


def fed(filter: Collapse, pieces: list[bytes]) -> bytes:
    """What passes of the pieces, with the end."""
    return b"".join(filter.feed(piece) for piece in pieces) + filter.finish()


def test_a_bar_collapses_wherever_it_is_cut() -> None:
    data = BAR.encode()
    assert visible(data) == "start\n100%|██\nplain\r\nlast".encode()
    for cut in range(len(data) + 1):
        assert fed(Collapse(), [data[:cut], data[cut:]]) == visible(data)
    assert fed(Collapse(), [data[at : at + 1] for at in range(len(data))]) == visible(data)


@given(st.text(st.sampled_from('a"\\\n\r\t\0\x7fä\u2028\U0001f600'), max_size=20), st.integers(0, 3), st.booleans())
def test_output_in_an_event_is_the_json_of_its_text(text: str, cut: int, last: bool) -> None:
    data = text.encode()[: len(text.encode()) - cut]
    sent, used = json_string(data, last=last)
    assert sent.isascii()
    assert len(sent.splitlines()) == 1
    assert json.loads(sent) == data[:used].decode("utf-8", "replace")
    assert used == len(data) or (not last and len(data) - used < 4)


PIECES = st.lists(st.text("ab\r\n", max_size=12).map(str.encode), max_size=12)


@given(PIECES)
def test_collapsed_pieces_are_the_collapsed_whole(pieces: list[bytes]) -> None:
    assert fed(Collapse(), pieces) == visible(b"".join(pieces))


@given(PIECES, st.integers(2, 9))
def test_with_long_lines_pieces_do_not_matter_and_positions_resume(pieces: list[bytes], most: int) -> None:
    data = b"".join(pieces)
    whole = fed(Collapse(most=most), [data])
    assert fed(Collapse(most=most), pieces) == whole
    reader, seen = Collapse(most=most), b""
    for piece in pieces:
        seen += reader.feed(piece)
        at = reader.position
        resumed = Collapse(at, before=data[max(0, at - 1) : at], most=most)
        assert seen + fed(resumed, [data[at:]]) == whole


def test_a_line_without_end_is_not_held_back_for_ever() -> None:
    filter = Collapse()
    passed = sum(len(filter.feed(b"x" * 50_000)) for _ in range(20))
    assert passed >= 1_000_000 - (2 << 16)
    assert filter.position == passed


def test_collapsed_output_is_sent_with_offsets_of_the_raw_stream(server: Server) -> None:
    job_id = server.run_job("live10", f"import sys; sys.stdout.buffer.write({BAR.encode()!r})")["job_id"]
    wanted = visible(BAR.encode())
    assert follow(server, job_id, "live10", "text/plain", collapse="true").content == wanted
    answer = server.get(f"/api/logs/{job_id}?collapse=true", "live10")
    assert answer.content == wanted
    assert answer.headers["x-log-next-offset"] == str(len(BAR.encode()) - 1)  # the return may yet erase the line
    found = list(events(follow(server, job_id, "live10", "*/*", collapse="true")))
    assert "".join(json.loads(event["data"]) for event in found if event["event"] == "output").encode() == wanted
    resume = {"Last-Event-ID": found[0]["id"]}
    rest = list(events(follow(server, job_id, "live10", "*/*", collapse="true", headers=resume)))
    both = [found[0], *rest]
    assert "".join(json.loads(event["data"]) for event in both if event["event"] == "output").encode() == wanted


def test_a_collapsed_bar_of_a_running_job_comes_line_by_line(server: Server) -> None:
    bar = "print('1%\\r2%\\r3%\\nrest', end='', flush=True)\n"
    job_id = server.submit("live11", f"import os\nos.mkfifo('go')\n{bar}{WAIT_FOR_RELEASE}")
    found = events(follow(server, job_id, "live11", "*/*", collapse="true"))
    first = next(found)
    assert (json.loads(first["data"]), first["id"]) == ("3%\n", "9")
    release(server, None, job_id)
    assert "".join(json.loads(event["data"]) for event in found if event["event"] == "output") == "rest"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_cut_at_its_cap_says_so(stream: str) -> None:
    with Server({"NUM_GPU_NODES": "1", "MAX_OUTPUT_BYTES": "1000"}) as server:
        job_id = server.run_job("alice", f"import sys; print('x' * 5000, file=sys.{stream})")["job_id"]
        for name in ("stdout", "stderr"):
            cut = name == stream
            answer = server.get(f"/api/logs/{job_id}?stream={name}", "alice")
            assert answer.headers.get("x-log-truncated") == ("true" if cut else None)
            response = follow(server, job_id, "alice", "*/*", stream=name)
            assert response.headers.get("x-log-truncated") == ("true" if cut else None)
            assert json.loads(list(events(response))[-1]["data"])["truncated"] is cut


# -- both streams merged -------------------------------------------------------------------------------------------

# Each write waits until the one before has been read from its pipe: then it is certain which came first.
SAY = """
import fcntl, os, struct, termios
def say(fd, text):
    for other in (1, 2):
        while struct.unpack("i", fcntl.ioctl(other, termios.FIONREAD, b"    "))[0]:
            pass
    os.write(fd, text.encode())
"""
OUT, ERR = "stdout", "stderr"


def merged(found: Iterable[dict[str, str]]) -> list[tuple[str, str]]:
    """What the events of merged output say: (stream, text), neighbours of one stream joined."""
    texts = ((event["event"], json.loads(event["data"])) for event in found if event["event"] in (OUT, ERR))
    groups = itertools.groupby(texts, key=lambda entry: entry[0])
    return [(stream, "".join(text for _, text in group)) for stream, group in groups]


def test_merged_output_is_in_the_order_in_which_it_was_printed(server: Server) -> None:
    code = SAY + "for n in range(50):\n    say(1, f'out {n} ä\\n'); say(2, f'err {n}\\n'); say(2, '.')\n"
    answer = server.run_job("live13", code)
    job_id = answer["job_id"]
    wanted = [piece for n in range(50) for piece in ((OUT, f"out {n} ä\n"), (ERR, f"err {n}\n."))]
    whole = "".join(text for _, text in wanted).encode()
    found = list(events(follow(server, job_id, "live13", "*/*", stream="merged")))
    assert merged(found) == wanted
    assert [event["id"] for event in found[:2]] == ["9", "16"]
    for stream in (OUT, ERR):
        assert "".join(text for name, text in wanted if name == stream) == answer[stream]
    resumed = events(follow(server, job_id, "live13", "*/*", stream="merged", headers={"Last-Event-ID": "16"}))
    assert merged(resumed) == wanted[2:]
    assert follow(server, job_id, "live13", "text/plain", stream="merged").content == whole
    read = server.get(f"/api/logs/{job_id}?stream=merged&tail=20", "live13")
    assert (read.content, read.headers["x-log-size"]) == (whole[-20:], str(len(whole)))
    parts, offset = b"", 0
    while part := server.get(f"/api/logs/{job_id}?stream=merged&offset={offset}", "live13"):
        if not part.content:
            break
        parts, offset = parts + part.content, int(part.headers["x-log-next-offset"])
    assert parts == whole
    assert "x-log-order" not in read.headers


def test_merged_output_is_followed_while_it_comes_and_its_bars_collapse(server: Server) -> None:
    code = SAY + "os.mkfifo('go')\nsay(1, 'a\\n'); say(2, '1%\\r2%'); say(1, 'b\\n'); say(2, '\\r3%\\n')\n"
    job_id = server.submit("live14", code + WAIT_FOR_RELEASE)
    wanted = [(OUT, "a\n"), (ERR, "1%\r2%"), (OUT, "b\n"), (ERR, "\r3%\n")]
    found = events(follow(server, job_id, "live14", "*/*", stream="merged"))
    seen: list[dict[str, str]] = []
    while merged(seen) != wanted:
        seen.append(next(found))
    release(server, None, job_id)
    assert [event["event"] for event in found] == ["end"]
    bars = follow(server, job_id, "live14", "*/*", stream="merged", collapse="true")
    assert merged(events(bars)) == [(OUT, "a\n"), (ERR, "2%"), (OUT, "b\n"), (ERR, "3%\n")]
    plain = follow(server, job_id, "live14", "text/plain", stream="merged", collapse="true")
    read = server.get(f"/api/logs/{job_id}?stream=merged&collapse=true", "live14")
    assert plain.content == read.content == b"a\n2%b\n3%\n"


def test_the_order_survives_a_killed_server(fleet: Fleet) -> None:
    with Server({"NODE_LOST_AFTER": "60", **fleet.settings()}) as server:
        code = SAY + "os.mkfifo('go')\n"
        for number, wait in enumerate((WAIT_FOR_RELEASE, WAIT_FOR_RELEASE, "")):
            code += (
                f"for n in range(20):\n    say(1, f'{number} out {{n}}\\n'); say(2, f'{number} err {{n}}\\n')\n{wait}"
            )
        job_id = server.submit("alice", code)
        server.wait_for_output(job_id, "alice", "0 err 19\n", stream="stderr")
        server.kill()
        release(server, fleet, job_id)
        (attempt,) = (folder.parent for folder in work_folders(server, fleet, job_id))
        wait_until(lambda: b"1 err 19\n" in (attempt / "stderr").read_bytes(), what="output without a server")
        server.start()
        release(server, fleet, job_id)
        server.wait_for(job_id, "alice")
        lines = server.get(f"/api/logs/{job_id}?stream=merged", "alice").text.splitlines()
        assert lines == [f"{part} {name} {n}" for part in range(3) for n in range(20) for name in ("out", "err")]
