"""What a fuzzer feeds bytes to: each target takes any bytes and fails only where the code breaks its promise.

`tests/test_fuzz.py` runs them for seconds with hypothesis, `python3 -m tests.fuzz.run` for as long as one likes with
atheris. A target knows how its bytes are split; SEEDS hold for each a few that mean something.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from auth import is_id
from config import Settings
from errors import InvalidRequest, NodeUnreachable, RequestError
from executor import Frames, NodeConnection, Probe
from node_agent import agent
from results import ResultsInvalid, ResultsTooLarge, parse_record, records_of_file, records_of_output, write_records
from submission import MAX_CONFIG_BYTES, Upload, parse_config, read_upload, validate_config

Target = Callable[[bytes], None]
SETTINGS = Settings(_env_file=None, max_code_bytes=4096)  # type: ignore[call-arg]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """The data in pieces of that many bytes."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def config(data: bytes) -> None:
    """Whatever is sent as a config is a valid one, or refused by a 400 that can be written as JSON."""
    try:
        found = parse_config(data)
        json.dumps(found, default=str)
        valid = validate_config(found, SETTINGS, token_optional=len(data) % 2 == 0)
    except InvalidRequest as error:
        json.dumps([error.detail, [[wrong.field, wrong.message] for wrong in error.errors]]).encode()
        return
    assert is_id(valid.user_id)
    assert is_id(valid.competition_id)
    assert is_id(valid.project_id)
    assert 1 <= valid.expected_time <= SETTINGS.max_expected_time
    assert "token" not in valid.kept
    json.dumps(valid.kept, allow_nan=False).encode()


def _upload(content_type: str, body: bytes, size: int) -> Upload | int:
    left = pieces(body, size)

    async def receive() -> dict[str, Any]:
        piece = next(left, b"")
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    async def read() -> Upload:
        return await read_upload(receive, content_type, None, SETTINGS)

    try:
        return asyncio.run(read())
    except RequestError as error:
        json.dumps(error.detail).encode()
        return error.status


def multipart(data: bytes) -> None:
    """A body is read the same however it is cut; its parts are whole and within their limits. The first line is the
    Content-Type."""
    head, _, body = data.partition(b"\n")
    content_type = head.decode("latin-1")
    whole = _upload(content_type, body, 1 << 20)
    assert _upload(content_type, body, 7) == whole
    if isinstance(whole, Upload):
        assert len(whole.code) <= SETTINGS.max_code_bytes
        assert len(whole.config_file) <= MAX_CONFIG_BYTES
        assert whole.code in body
        assert whole.config_file in body
    else:
        assert whole in (400, 413, 422)


class _Stream:
    """What an agent is said to have sent, as a connection reads it."""

    def __init__(self, data: bytes) -> None:
        self.left = list(pieces(data, 11))

    def fileno(self) -> int:
        raise AssertionError("never waited for")

    def ready(self) -> bool:
        return True

    def send(self, data: bytes) -> None:
        pass

    def receive(self) -> bytes:
        return self.left.pop(0) if self.left else b""

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        pass


def answers(data: bytes) -> None:
    """Whatever an agent sends is messages, the same however they are cut, or a connection that is given up."""

    def read(size: int) -> list[dict[str, Any]] | None:
        frames, found = Frames(), []
        try:
            for piece in pieces(data, size):
                found += frames.feed(piece)
        except NodeUnreachable as error:
            str(error).encode()
            return None
        return found

    assert read(1 << 20) == read(3)
    connection = NodeConnection(_Stream(data), silence_limit=1)
    replies: list[dict[str, Any]] = []
    for _ in range(3):
        connection.send("probe", on_reply=replies.append)
    try:
        while True:
            connection.wait(0)
    except NodeUnreachable:
        pass
    assert len(replies) <= 3
    with suppress(NodeUnreachable):
        assert math.isfinite(connection.node_clock())


class _Agent(agent.Agent):
    """The agent's reading and checking of requests; a launch and a look stop where a process would begin."""

    def __init__(self, root: str) -> None:
        super().__init__(root, "fuzz", "")
        self.sent: list[dict[str, Any]] = []
        self.ops["launch"] = self._checked
        self.ops["probe"] = self._looked

    def _send(self, header: dict[str, Any], payload: bytes = b"", lazy: bool = False) -> None:
        json.dumps(header).encode()
        self.sent.append(header)

    def _clean(self) -> None:
        pass

    def _checked(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        job, attempt = agent.take_key(request)
        spec, _ = agent.take_spec(request), self._offsets(request)
        launch = agent.Launch(
            job, attempt, agent.take_number(request, "not_after"), agent.take_clock(request, "lease_until"), spec
        )
        for word in [*spec["argv"], *spec["env"], *spec["env"].values()]:
            assert "\0" not in word
            os.fsencode(word)
        assert all(isinstance(value, (int, float)) and value >= 0 for value in spec["limits"].values())
        return {"launch": json.loads(json.dumps(list(launch), allow_nan=False))[0]}, b""

    def _looked(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        agent.take_text(request, "python", "python3")
        agent.take_gpus(request)
        agent.take_texts(request, "binds")
        return {}, b""


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """A folder of an agent without attempts: one for all requests, which change nothing in it."""
    root = tempfile.TemporaryDirectory(prefix="fuzz-requests-")
    for folder in ("tmp", "trash", "attempts"):
        os.mkdir(os.path.join(root.name, folder))
    return root


@contextmanager
def _quiet() -> Iterator[None]:
    """The agent logs to descriptor 2: into nothing."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def requests(data: bytes) -> None:
    """Whatever is sent to an agent is read the same however it is cut, and each request gets one answer, which never
    is that the agent failed."""

    def read(size: int) -> list[tuple[Any, bytes]]:
        reader = agent.FrameReader()
        return [(head, bytes(load)) for piece in pieces(data, size) for head, load in reader.feed(piece)]

    found = read(1 << 20)
    assert read(3) == found
    root = _root().name
    with _quiet():
        node = _Agent(root)
        for number, (head, load) in enumerate(found, 1):
            assert head is None or isinstance(head, dict)
            node._answer(head, bytearray(load))
            assert len(node.sent) == number
            assert node.sent[-1].get("error") not in ("internal", "launch_failed"), node.sent[-1]
        assert sorted(os.listdir(root)) == ["attempts", "tmp", "trash"]


def looks(data: bytes) -> None:
    """Whatever nvidia-smi prints becomes rows, and they a Probe."""
    text = data.decode("utf-8", "replace")
    rows = agent.parse_csv(text, agent.GPU_FIELDS) + agent.parse_csv(text, agent.PROCESS_FIELDS)
    json.dumps(rows)
    Probe.of({"gpus": agent.parse_csv(text, agent.GPU_FIELDS), "gpu_processes": [], "survivors": []})


def results(data: bytes) -> None:
    """Whatever a job wrote is strict records, one a line and the same when read again, or refused; whatever it printed
    is strict records."""
    most = 1 + data[0] if data else 1
    body = data[1:]
    refusals: tuple[type[Exception], ...] = (ResultsInvalid, ResultsTooLarge)
    for read, refused in ((records_of_file, refusals), (records_of_output, ResultsTooLarge)):
        target = io.BytesIO()
        try:
            written = write_records(read(io.BytesIO(body), most), target, 1 << 16)
        except refused as error:
            str(error).encode()
            continue
        content = target.getvalue()
        assert written.size == len(content)
        lines = content.split(b"\n")
        assert lines.pop() == b""
        assert len(lines) == written.records
        for line in lines:
            parse_record(line.decode())
            assert len(line.decode().splitlines()) <= 1 or b"\r" not in line
        again = io.BytesIO()
        write_records(records_of_file(io.BytesIO(content), 1 << 16), again, 1 << 16)
        assert again.getvalue() == content


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (config, multipart, answers, requests, looks, results)
}

_CONFIG = b'{"competition_id": "c", "project_id": "p", "user_id": "u", "expected_time": 60, "token": "abcd"}'
_PART = b'--B\r\nContent-Disposition: form-data; name="%s"; filename="x"\r\nContent-Type: a/b\r\n\r\n%s\r\n'
_SPEC = (
    b'"spec": {"argv": ["python3", "solution.py"], "env": {"A": "b"}, "results_name": "results.jsonl", "limits": '
    b'{"wall_seconds": 1, "grace_seconds": 1.5, "output_bytes": 1, "result_bytes": 2, "processes": 3, "open_files": 4, '
    b'"file_bytes": 5, "job_memory": 6}, "sandbox": {"mode": "bwrap", "gpus": [0], "network": "none", "seccomp": true, '
    b'"binds": ["/data"], "python_prefixes": ["/usr"]}}'
)
SEEDS: dict[str, list[bytes]] = {
    "config": [
        _CONFIG,
        b"competition_id: c\nproject_id: p\nuser_id: u\nexpected_time: '60'\ntoken: abcd\nmore: [1, {a: .5e3}]\n",
        b"\xef\xbb\xbf---\n? a\n: &x !!int '1'\n*x : |\n  text\n...\n",
    ],
    "multipart": [
        b"multipart/form-data; boundary=B\n"
        + _PART % (b"code", b"print(1)")
        + _PART % (b"config_file", b"{}")
        + b"--B--\r\n",
        b'multipart/form-data; boundary="B"\n\r\n' + _PART % (b"code", b"--B\r") + _PART % (b"x", b"") + b"--B--",
        b"multipart/form-data; boundary=B\n\r\nC\n\r\nprint\n--B---B\r\nC\x00\x00\r\n",
    ],
    "answers": [
        b'{"re": 1, "ok": true, "clock": 12.5, "size": 3}\nabc{"push": "exit", "job": "j", "attempt": 1}\n',
        b'{"re": null, "ok": false, "error": "bad_request", "message": "m", "clock": NaN}\n{"re": 2, "clock": 1e400}\n',
    ],
    "requests": [
        b'{"op": "launch", "id": 1, "job": "j", "attempt": 1, "not_after": 1.5, "lease_until": null, "size": 4, '
        + _SPEC
        + b"}\ncode",
        b'{"op": "hello", "id": 1}\n{"op": "list", "id": 2}\n{"op": "ping", "id": 3, "lease_until": 7}\n',
        b'{"op": "follow", "id": 1, "job": "j", "attempt": 1}\n{"op": "forget", "id": 2, "job": "j", "attempt": 1}\n',
        b'{"op": "kill", "id": 1, "job": "j", "attempt": 1, "reason": "cancelled"}\n{"op": "stop", "id": 9}\n',
        b'{"op": "fetch", "id": 1, "job": "j", "attempt": 1, "what": "results", "offset": 0, "length": 9}\n',
        b'{"op": "probe", "id": 1, "python": "p", "gpus": [0], "binds": ["/x"], "sandbox": "off", "only": "clean"}\n',
    ],
    "looks": [
        b"0, GPU-1, NVIDIA A100, 40, GB, 81920, 12, 3, 40\n1, GPU-2, [N/A], [N/A], 1.5, [Not Supported], x\n",
        b"4711, GPU-1, python3, 12\n0, GPU-1, -inf, 1e999, nan, 1.2.3, .\n",
    ],
    "results": [
        b'\x64{"a": 1}\n\n{"b": [true, null, -1.5e3, "\\u00e4"]}\r\n',
        b'\xff{\n  "a": {"b": []}\n}\n',
        b'\x20plain text\n{"a": NaN}\n{"a": 1, "a": 2}\n\xff\n',
    ],
}
