"""A job's results: bytes it wrote in, strict JSON lines out. Nothing in them is trusted. Pure but for reading and
writing the streams it is given. May import nothing of the project.

Strict means RFC 8259 and what api.md promises on top: every record is an object, no NaN or Infinity, no key twice in
one object, valid UTF-8, and bounded depth and length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

MAX_DEPTH = 100


class ResultsInvalid(ValueError):
    """The results are not what was promised; the message names the line."""


class ResultsTooLarge(ValueError):
    """The results are over a limit."""


@dataclass(frozen=True)
class ResultsFile:
    """What was written: length in bytes, hex SHA-256, number of records."""

    size: int
    sha256: str
    records: int


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:40]!r} is there twice")
            seen.add(key)
    return record


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def _too_deep(text: str) -> bool:
    """Whether brackets nest deeper than MAX_DEPTH; brackets in strings count too, so this only ever errs on records
    that hold that many opening brackets in strings, which are then measured exactly."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    depth = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif character in "}]":
            depth -= 1
    return False


def parse_record(text: str) -> dict[str, Any]:
    """One strict JSON object. Raises ValueError with a sentence."""
    if _too_deep(text):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _lines(source: IO[bytes], max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := source.readline(max_line_bytes + 1):
        number += 1
        if len(line) > max_line_bytes:
            raise ResultsTooLarge(f"line {number} of the results is longer than {max_line_bytes} bytes")
        yield number, line.strip(b" \t\r\n")


def records_of_file(source: IO[bytes], max_line_bytes: int) -> Iterator[bytes]:
    """The records of a file the job wrote, each one line without its end; blank lines are left out.

    A file that holds one pretty-printed object is one record. Raises ResultsInvalid, ResultsTooLarge.
    """
    for number, line in _lines(source, max_line_bytes):
        if not line:
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise ResultsInvalid(f"line {number} of the results is not valid UTF-8") from None
        try:
            parse_record(text)
        except ValueError as error:
            whole = _pretty_printed(source, max_line_bytes)
            if whole is not None:
                yield whole
                return
            raise ResultsInvalid(f"line {number} of the results: {error}") from None
        yield _one_line(line)


def _one_line(record: bytes) -> bytes:
    """The record without carriage returns: blank space in JSON, but the end of a line for some readers."""
    return record.replace(b"\r", b" ")


def _pretty_printed(source: IO[bytes], max_bytes: int) -> bytes | None:
    source.seek(0)
    content = source.read(max_bytes + 1)
    if len(content) > max_bytes or not content.lstrip().startswith(b"{"):
        return None
    try:
        record = parse_record(content.decode("utf-8"))
        return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except ValueError:  # UnicodeError is one too: a lone surrogate, or bytes that are no UTF-8
        return None


def _output_lines(source: IO[bytes], most: int) -> Iterator[tuple[bytes, bool]]:
    """The lines without their ends, and whether each is a whole line: one over the limit comes in several pieces."""
    begins = True
    piece = source.readline(most)
    while piece:
        ends = piece.endswith(b"\n")
        after = source.readline(most)
        if not ends and after in (b"\n", b"\r\n"):  # the limit fell just before the line's end
            ends, after = True, source.readline(most)
        yield piece.rstrip(b"\r\n"), begins and (ends or not after)
        begins, piece = ends, after


def records_of_output(source: IO[bytes], max_line_bytes: int) -> Iterator[bytes]:
    """The records of a job that wrote no results file: each stdout line that is a strict JSON object as it is, any
    other as `{"output": "<line>"}`. A line over the limit is cut into several records."""
    for stripped, whole in _output_lines(source, max_line_bytes):
        if whole and stripped.lstrip().startswith(b"{"):
            try:
                parse_record(stripped.decode("utf-8"))
            except ValueError:
                pass
            else:
                yield _one_line(stripped.strip())
                continue
        yield json.dumps({"output": stripped.decode("utf-8", "replace")}, ensure_ascii=False).encode("utf-8")


def describe(sealed: IO[bytes]) -> ResultsFile:
    """What is known of results that were written before."""
    digest = hashlib.sha256()
    size = count = 0
    while block := sealed.read(1 << 20):
        digest.update(block)
        size += len(block)
        count += block.count(b"\n")
    return ResultsFile(size, digest.hexdigest(), count)


def write_records(records: Iterable[bytes], target: IO[bytes], max_bytes: int) -> ResultsFile:
    """Write the records as lines and return what was written. Raises ResultsTooLarge beyond `max_bytes`."""
    digest = hashlib.sha256()
    size = count = 0
    buffer: list[bytes] = []
    buffered = 0
    for record in records:
        size += len(record) + 1
        if size > max_bytes:
            raise ResultsTooLarge(f"the results are larger than {max_bytes} bytes")
        count += 1
        buffer += (record, b"\n")
        buffered += len(record) + 1
        if buffered > 1 << 18:
            block = b"".join(buffer)
            digest.update(block)
            target.write(block)
            buffer.clear()
            buffered = 0
    block = b"".join(buffer)
    digest.update(block)
    target.write(block)
    return ResultsFile(size, digest.hexdigest(), count)
