"""A job as it happens: `GET /api/logs/{id}?follow=true` and `GET /api/status/{id}?follow=true`."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from live import Collapse
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release
from tests.server import Server, wait_until

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


def follow_status(server: Server, job_id: str, user: str) -> requests.Response:
    """An open stream of the job's status."""
    url = f"{server.url}/api/status/{job_id}?follow=true"
    return requests.get(url, headers=server.bearer(user), stream=True, timeout=60)


def test_the_status_is_seen_at_each_change() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        first, second = server.submit("alice", HOLD), server.submit("bob", HOLD)
        server.wait_for_output(first, "alice", "held")
        found = events(follow_status(server, second, "bob"))
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
    found = events(follow_status(server, job_id, "live8"))
    assert json.loads(next(found)["data"])["status"] == "running"
    server.cancel(job_id, "live8")
    seen = list(found)
    assert seen[-1]["event"] == "end"
    assert json.loads(seen[-1]["data"])["status"] == "cancelled"
    again = list(events(follow_status(server, job_id, "live8")))
    assert [event["event"] for event in again] == ["status", "end"]


def test_others_may_not_watch_the_status(server: Server) -> None:
    job_id = server.run_job("live9")["job_id"]
    assert follow_status(server, job_id, "live7").status_code == 403


def test_a_stop_of_the_server_ends_status_streams() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        job_id = server.submit("alice", HOLD)
        server.wait_for_output(job_id, "alice", "held")
        found = events(follow_status(server, job_id, "alice"))
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
