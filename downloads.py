"""Bodies made of files: results as JSON without holding them in memory, and raw files with Range and ETag.

May import `errors`, `storage`, `schemas`.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import anyio.to_thread
from fastapi import Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette import responses
from starlette.types import Receive, Scope, Send

from errors import NotFound, RangeNotSatisfiable
from storage import STREAMS, Storage

BLOCK = 1 << 18
AT_ONCE_MOST = 1 << 20  # answers up to this size are made in one piece
NDJSON = "application/x-ndjson"
RESULTS = "results"


class RawFile(FileResponse):
    """A file with blocks of 1 MiB: at the 64 KiB of the base class a download costs twice as much."""

    chunk_size = 1 << 20

    def __init__(self, path: Path, **options: Any) -> None:
        # Opened now, so that the whole file can be sent even if retention removes it meanwhile.
        self._handle = open(path, "rb")  # noqa: SIM115
        descriptor = self._handle.fileno()
        super().__init__(f"/proc/self/fd/{descriptor}", stat_result=os.fstat(descriptor), **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._handle.close()

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        """The parts asked for; a Range that is none is passed over (RFC 9110, 14.2). Raises RangeNotSatisfiable."""
        try:
            return super()._parse_range_header(http_range, file_size)
        except responses.MalformedRangeHeader:
            return []
        except responses.RangeNotSatisfiable:
            raise RangeNotSatisfiable(
                f"The file has {file_size} bytes.", headers={"Content-Range": f"bytes */{file_size}"}
            ) from None


def raw_file(request: Request, path: Path, sha256: str, name: str) -> Response:
    """The sealed results as they are: Range and If-Range, ETag and If-None-Match, and their digest (RFC 9530).

    Raises FileNotFoundError.
    """
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
        "X-Content-SHA256": sha256,
        "Cache-Control": "private, no-cache",
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return RawFile(path, media_type=NDJSON, headers=headers, filename=name)


def refuse_when_gone(storage: Storage, job_id: str, *, started: bool) -> None:
    """Raise NotFound when a job that was started has no files any more: nothing is not what it printed."""
    if started and not storage.folder(job_id).is_dir():
        raise NotFound("The job's files are not kept any more.")


class KeptFiles:
    """A job's output and sealed results, opened before anything is answered.

    Retention takes a job's folder away as a whole, so what is still there after the opening was whole, and it stays
    readable until `close`. Raises NotFound when a job that was started has no files any more.
    """

    def __init__(self, storage: Storage, job_id: str, *, started: bool) -> None:
        self._files: dict[str, IO[bytes]] = {}
        paths = {name: storage.output_path(job_id, name) for name in STREAMS} | {RESULTS: storage.results_path(job_id)}
        for name, path in paths.items():
            with contextlib.suppress(FileNotFoundError):
                self._files[name] = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            refuse_when_gone(storage, job_id, started=started)
        except NotFound:
            self.close()
            raise

    def close(self) -> None:
        """Free the descriptors."""
        for file in self._files.values():
            file.close()

    def size(self) -> int:
        """Bytes of all of them."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    def whole(self, name: str) -> bytes:
        """The file's bytes; none when the job left no such file."""
        file = self._files.get(name)
        return file.read() if file is not None else b""

    async def blocks(self, name: str) -> AsyncIterator[bytes]:
        """The same in pieces, read in a thread."""
        file = self._files.get(name)
        while file is not None and (block := await anyio.to_thread.run_sync(os.read, file.fileno(), BLOCK)):
            yield block


def _at_once(files: KeptFiles, head: dict[str, Any]) -> bytes:
    texts = {name: files.whole(name).decode("utf-8", "replace") for name in STREAMS}
    body = json.dumps({**head, **texts}).encode()
    # The records are strict JSON lines already: sent as they are, not parsed and written again.
    return body[:-1] + b', "results": [' + b",".join(files.whole(RESULTS).splitlines()) + b"]}"


async def _in_pieces(files: KeptFiles, head: dict[str, Any]) -> AsyncIterator[bytes]:
    yield json.dumps(head).encode()[:-1]
    for name in STREAMS:
        yield f', "{name}": "'.encode()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        async for block in files.blocks(name):
            yield json.dumps(decoder.decode(block)).encode()[1:-1]
        yield json.dumps(decoder.decode(b"", True)).encode()[1:-1] + b'"'
    yield b', "results": ['
    first, ends_with_newline = True, False
    async for block in files.blocks(RESULTS):
        # Records hold no raw newline, so every newline is the end of one.
        text = block.replace(b"\n", b",")
        yield (b"," if ends_with_newline else b"") + (text[:-1] if block.endswith(b"\n") else text)
        first, ends_with_newline = False, block.endswith(b"\n")
    assert first or ends_with_newline  # sealed results end with a newline
    yield b"]}"


class _Pieces(StreamingResponse):
    """Closes the files however the answer ends, also when it was never begun to be sent."""

    def __init__(self, files: KeptFiles, head: dict[str, Any], headers: dict[str, str]) -> None:
        super().__init__(_in_pieces(files, head), media_type="application/json", headers=headers)
        self._kept = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._kept.close()


async def results_response(storage: Storage, job_id: str, head: dict[str, Any], headers: dict[str, str]) -> Response:
    """`schemas.JobResults`: small ones in one piece, large ones as a stream of bounded memory. Raises NotFound."""
    files = KeptFiles(storage, job_id, started=head["started_at"] is not None)
    if files.size() > AT_ONCE_MOST:
        return _Pieces(files, head, headers)
    try:
        return Response(_at_once(files, head), media_type="application/json", headers=headers)
    finally:
        files.close()
