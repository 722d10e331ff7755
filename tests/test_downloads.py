"""What a reader gets while retention takes a job's files away: all of it, or that it is gone."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response

from downloads import AT_ONCE_MOST, KeptFiles, raw_file, results_response
from errors import NotFound
from storage import Storage

HEAD = {"job_id": "job", "status": "completed", "started_at": "2026-01-01T00:00:00Z"}
WITHIN = 30.0
SMALL, LARGE = 1000, 2 * AT_ONCE_MOST


def storage_with_a_job(folder: Path, size: int) -> Storage:
    storage = Storage(folder / "jobs")
    storage.prepare("job", b"print()", {})
    output = storage.output("job", 1)
    output.append("stdout", 0, b"x" * size)
    output.close()
    storage.results_path("job").write_bytes(b'{"output": "x"}\n')
    return storage


async def body_of(response: Response, before_body: Any = None) -> bytes:
    """What a client gets; `before_body` is called when the head of the answer was sent."""
    parts: list[bytes] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            if before_body is not None:
                before_body()
        else:
            parts.append(message.get("body", b""))

    await response({"type": "http", "method": "GET", "headers": [], "extensions": {}}, receive, send)
    return b"".join(parts)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_results_that_are_removed_while_they_are_sent_come_whole(tmp_path: Path, size: int) -> None:
    storage = storage_with_a_job(tmp_path, size)

    async def read() -> bytes:
        response = await results_response(storage, "job", HEAD, {})
        return await body_of(response, lambda: storage.remove("job", None))

    answer = json.loads(asyncio.run(read()))
    assert not storage.folder("job").exists()
    assert (len(answer["stdout"]), answer["results"]) == (size, [{"output": "x"}])


def test_a_raw_file_that_is_removed_while_it_is_sent_comes_whole(tmp_path: Path) -> None:
    storage = storage_with_a_job(tmp_path, SMALL)
    path = storage.results_path("job")
    path.write_bytes(b'{"output": "x"}\n' * 300_000)
    request = Request({"type": "http", "method": "GET", "headers": []})
    response = raw_file(request, path, "ab" * 32, "job.jsonl")
    assert len(asyncio.run(body_of(response, lambda: storage.remove("job", None)))) == 300_000 * 16
    with pytest.raises(FileNotFoundError):
        raw_file(request, path, "ab" * 32, "job.jsonl")


def test_files_of_a_started_job_that_are_gone_are_said_to_be_gone(tmp_path: Path) -> None:
    storage = storage_with_a_job(tmp_path, SMALL)
    storage.remove("job", None)
    with pytest.raises(NotFound, match="not kept any more"):
        KeptFiles(storage, "job", started=True)
    never_started = KeptFiles(storage, "job", started=False)
    assert (never_started.size(), never_started.whole("stdout")) == (0, b"")


def test_reading_and_removing_at_once_gives_all_or_that_it_is_gone(tmp_path: Path) -> None:
    for number in range(60):
        storage = storage_with_a_job(tmp_path / str(number), SMALL)
        start = threading.Barrier(4)

        def read(storage: Storage = storage, start: threading.Barrier = start) -> None:
            start.wait(WITHIN)
            try:
                answer = json.loads(bytes(asyncio.run(results_response(storage, "job", HEAD, {})).body))
            except NotFound:
                return
            assert (len(answer["stdout"]), answer["results"]) == (SMALL, [{"output": "x"}])

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            start.wait(WITHIN)
            storage.remove("job", None)
            for reader in readers:
                reader.result(WITHIN)
        with pytest.raises(NotFound):
            KeptFiles(storage, "job", started=True)
