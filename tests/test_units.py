"""Single modules by themselves: parsing, judging, planning, files. No server, no node."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import getpass
import hashlib
import io
import json
import math
import os
import re
import resource
import shlex
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as rules
from hypothesis import strategies as st
from starlette.requests import Request

import clock
import config
import executor
import metrics
import ssh_executor
import states
import verdict
from auth import ID_PATTERN, MAX_TOKEN_LENGTH, Authenticator, TokenDigest, is_id
from config import NodeConfig, Settings
from database import Database
from errors import ConfigurationError, InvalidRequest, NodeUnreachable, TooManyRequests, Unauthenticated
from estimates import Line, Range
from executor import Frames, readable
from forecast import remaining_seconds, start_times
from nodes import NOT_LOOKED_AT, NodeRecord, NodeRegistry
from rate_limiter import KNOWN_CALLERS_MOST, LoginLimiter, MovingWindows, SubmitLimiter, address_key
from results import (
    MAX_DEPTH,
    ResultsInvalid,
    ResultsTooLarge,
    parse_record,
    records_of_file,
    records_of_output,
    write_records,
)
from storage import STREAMS, Storage
from submission import MAX_CONFIG_BYTES, parse_config, validate_config
from tests.server import wait_until
from token_manager import TokenManager, TokenRefused, strong_token

rules.register_profile("units", deadline=None, print_blob=True)
rules.load_profile("units")
LINE = 1 << 16  # a limit on lines that nothing here reaches by accident


# -- results: what a job wrote -------------------------------------------------------------------------------------


def of_file(content: bytes, most: int = LINE) -> list[bytes]:
    return list(records_of_file(io.BytesIO(content), most))


def of_output(content: bytes, most: int = LINE) -> list[bytes]:
    return list(records_of_output(io.BytesIO(content), most))


def strict(line: bytes) -> dict[str, Any]:
    """The record of a published line, by a reader that forgives nothing."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "a key is there twice"
        return dict(pairs)

    def constant(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    assert b"\n" not in line
    assert b"\r" not in line
    record = json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    assert type(record) is dict
    return record


def test_records_of_a_file_are_kept_byte_by_byte() -> None:
    lines = [
        b"{}",
        b'{"a":1}',
        b'{ "a" : [1, 2.50, -0, 1e3, true, null, {"b": "\\u00e9"}] }',
        '{"é": "日本 \u2028"}'.encode(),
        b'{"big": 123456789012345678901234567890, "small": 1e-400, "large": 1e999}',
        b'{"half": "\\ud800"}',
    ]
    assert of_file(b"\n".join(lines) + b"\n") == lines
    assert of_file(b"\n".join(lines)) == lines  # without the last line's end
    assert of_file(b"\r\n".join(lines)) == lines


def test_blank_lines_are_left_out() -> None:
    assert of_file(b"\n  \n\t\r\n") == []
    assert of_file(b"") == []
    assert of_file(b'\n {"a":1}  \n\n{"b":2}\n \n') == [b'{"a":1}', b'{"b":2}']


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1]", "not a JSON object"),
        (b"1", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [Infinity]}', "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "the key 'a' is there twice"),
        (b'{"a": 1, "\\u0061": 2}', "the key 'a' is there twice"),
        (b'{"a": 1}{"b": 2}', "Extra data"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": 1}\x00', "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1,}', " at column "),
        (b'{"a": 01}', "delimiter"),
        (b'{"a": "\x01"}', "control character"),
        (b'{"a": "\t"}', "control character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
        (b'\xef\xbb\xbf{"a": 1}', "Expecting value"),
        (b'{"a": \xc2\xa01}', "Expecting value"),
        (b"plain text", "Expecting value"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_what_is_not_strict_is_refused_with_its_line(line: bytes, why: str) -> None:
    with pytest.raises(ResultsInvalid, match=r"^line 3 of the results: ") as raised:
        of_file(b'{"a":1}\n\n' + line + b'\n{"b":2}\n')
    assert why in str(raised.value)
    assert len(str(raised.value)) < 300


def test_bytes_that_are_no_text_are_refused_with_their_line() -> None:
    for wrong in (b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xc0\xaf"}', b"\x80"):
        with pytest.raises(ResultsInvalid, match=r"^line 2 of the results is not valid UTF-8$"):
            of_file(b'{"a":1}\n' + wrong + b"\n")


def test_a_long_key_that_is_there_twice_is_not_repeated_whole() -> None:
    key = b"k" * 10_000
    with pytest.raises(ResultsInvalid) as raised:
        of_file(b'{"' + key + b'":1,"' + key + b'":2}')
    assert len(str(raised.value)) < 200


def test_depth_is_bounded_exactly_and_brackets_in_text_do_not_count() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert of_file(nested(MAX_DEPTH)) == [nested(MAX_DEPTH)]
    for depth in (MAX_DEPTH + 1, 10_000, 500_000):
        began = time.monotonic()
        with pytest.raises(ResultsInvalid, match=f"line 1 of the results: nested deeper than {MAX_DEPTH}"):
            of_file(nested(depth), 1 << 21)
        assert time.monotonic() - began < 20
    many = b'{"a":"' + b"[{" * 5000 + b'\\"[", "b":[' + b"[]," * 500 + b"[]]}"
    assert of_file(many) == [many]
    flat = b'{"a":[' + b"{}," * 5000 + b"{}]}"
    assert of_file(flat) == [flat]


def test_a_pretty_printed_object_is_one_record() -> None:
    record = {"score": 0.5, "names": ["é", "日本"], "nested": {"deep": [1, 2, {"x": None}]}, "text": "a\nb"}
    for text in (
        json.dumps(record, indent=2),
        "\n\n" + json.dumps(record, indent="\t", ensure_ascii=False) + "\n\n",
        json.dumps(record, indent=4).replace("\n", "\r\n"),
    ):
        (line,) = of_file(text.encode())
        assert strict(line) == record


def test_more_than_one_pretty_printed_object_is_refused() -> None:
    text = json.dumps({"a": 1}, indent=2).encode()
    for content in (text + b"\n" + text, b'{"a":1}\n' + text, b"[\n" + text + b"\n]"):
        with pytest.raises(ResultsInvalid, match=r"line \d of the results"):
            of_file(content)
    for wrong in (b'{\n"a": NaN\n}', b'{\n"a": 1,\n"a": 2\n}', b'{\n"a": "\xff"\n}', b'{\n"a": 1e999\n}'):
        with pytest.raises(ResultsInvalid):
            of_file(wrong)


def test_a_line_over_the_limit_is_too_large_and_never_read_whole() -> None:
    class Counted(io.BytesIO):
        taken = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            self.taken += len(line)
            return line

    source = Counted(b'{"a":1}\n{"a":"' + b"x" * 1_000_000 + b'"}\n')
    with pytest.raises(ResultsTooLarge, match="line 2 of the results is longer than 1000 bytes"):
        list(records_of_file(source, 1000))
    assert source.taken < 3000
    exact = b'{"a":"' + b"x" * 92 + b'"}'
    assert of_file(exact, 100) == [exact]
    with pytest.raises(ResultsTooLarge):
        of_file(exact, 99)


def test_a_record_never_holds_a_line_end_of_any_kind() -> None:
    # A carriage return is blank space in JSON and the end of a line for readers with universal line ends.
    (line,) = of_file(b'{"a":\r1,\r\r"b":"\\r"}\n')
    assert strict(line) == {"a": 1, "b": "\r"}
    (line,) = of_output(b'{"a":\r1}\n')
    assert strict(line) == {"a": 1}


def test_output_lines_become_records() -> None:
    content = b'hello\n{"a": 1}\n  {"b":2}  \r\n[1]\n\n{"a": NaN}\n{"a":1,"a":2}\n{broken\ntail'
    assert [strict(line) for line in of_output(content)] == [
        {"output": "hello"},
        {"a": 1},
        {"b": 2},
        {"output": "[1]"},
        {"output": ""},
        {"output": '{"a": NaN}'},
        {"output": '{"a":1,"a":2}'},
        {"output": "{broken"},
        {"output": "tail"},
    ]
    assert of_output(b"") == []
    assert of_output(b'{"a": 1}\n') == [b'{"a": 1}']


def test_output_that_is_no_text_stays_json() -> None:
    lines = of_output(b'\xff\xfe\x00\x1b[31m<script>\xe2\x80\xa8\n{"a": "\xff"}\n' + b"progress 1%\rprogress 2%\n")
    assert [strict(line) for line in lines] == [
        {"output": "\ufffd\ufffd\x00\x1b[31m<script>\u2028"},
        {"output": '{"a": "\ufffd"}'},
        {"output": "progress 1%\rprogress 2%"},
    ]


def test_a_long_output_line_is_cut_into_records() -> None:
    assert [strict(line)["output"] for line in of_output(b"abcdefghij\nkl\n", 4)] == ["abcd", "efgh", "ij", "kl"]
    # Where the limit falls just before the line's end, nothing is left over.
    assert [strict(line)["output"] for line in of_output(b"abcd\nefgh\r\nijkl", 4)] == ["abcd", "efgh", "ijkl"]
    whole = b'{"a": 1}'
    assert of_output(whole + b"\n" + whole, len(whole)) == [whole, whole]


def test_a_piece_of_a_cut_line_is_output_even_when_it_looks_like_a_record() -> None:
    assert [strict(line) for line in of_output(b'12345678{"b": 1}\n{"c": 1}\n', 8)] == [
        {"output": "12345678"},
        {"output": '{"b": 1}'},
        {"c": 1},
    ]
    assert [strict(line) for line in of_output(b'{"b": 1}12345678\n', 8)] == [
        {"output": '{"b": 1}'},
        {"output": "12345678"},
    ]


def test_writing_stops_at_the_limit() -> None:
    target = io.BytesIO()
    written = write_records([b"{}", b'{"a":1}'], target, 11)
    assert target.getvalue() == b'{}\n{"a":1}\n'
    assert (written.size, written.records) == (11, 2)
    assert written.sha256 == hashlib.sha256(target.getvalue()).hexdigest()
    with pytest.raises(ResultsTooLarge, match="larger than 10 bytes"):
        write_records([b"{}", b'{"a":1}'], io.BytesIO(), 10)
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"{}"

    with pytest.raises(ResultsTooLarge):
        write_records(endless(), io.BytesIO(), 1_000_000)
    assert taken <= 333_334


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
RECORDS = st.dictionaries(st.text(max_size=10), JSON_VALUES, max_size=4)
LINES = st.one_of(
    st.binary(max_size=30),
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")),
    RECORDS.map(lambda record: json.dumps(record, indent=1).replace("\n", "\r").encode()),
    st.sampled_from(
        (b'{"a": NaN}', b'{"a":1,"a":2}', b"{" * 200, b'{"a":"\xff"}', b'{"a":"\\ud800"}', b'{"a":1e999}', b"{}", b"")
    ),
)
CONTENTS = st.lists(LINES, max_size=5).flatmap(
    lambda lines: st.sampled_from((b"\n", b"\r\n", b"\r", b"")).map(lambda end: end.join(lines))
)


@rules(max_examples=200)
@given(CONTENTS, st.integers(min_value=1, max_value=200))
@example(b'{"a":\r1}', 100)
@example(b'{\n"a":"\\ud800"\n}', 100)
def test_whatever_a_results_file_holds_it_is_strict_records_or_refused(content: bytes, most: int) -> None:
    target = io.BytesIO()
    try:
        written = write_records(records_of_file(io.BytesIO(content), most), target, 10_000)
    except (ResultsInvalid, ResultsTooLarge):
        return
    check_written(target.getvalue(), written.size, written.sha256, written.records)


@rules(max_examples=200)
@given(CONTENTS, st.integers(min_value=1, max_value=200))
@example(b"\r\n\r\n", 1)
def test_whatever_a_job_prints_it_becomes_strict_records(content: bytes, most: int) -> None:
    target = io.BytesIO()
    written = write_records(records_of_output(io.BytesIO(content), most), target, 1_000_000)
    check_written(target.getvalue(), written.size, written.sha256, written.records)
    if content.strip(b"\r\n"):
        assert written.records


def check_written(content: bytes, size: int, sha256: str, records: int) -> None:
    assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest())
    lines = content.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == records
    for line in lines:
        strict(line)


@given(RECORDS)
def test_every_record_python_can_write_is_taken_as_it_is(record: dict[str, Any]) -> None:
    line = json.dumps(record).encode()
    assert of_file(line) == [line]
    assert parse_record(line.decode()) == record


# -- submission: the config ----------------------------------------------------------------------------------------

GOOD = {"competition_id": "comp", "project_id": "proj", "user_id": "alice", "expected_time": 60, "token": "secret"}


def refused(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as raised:
        parse_config(data)
    assert raised.value.errors[0].field == "config_file"
    return raised.value.detail


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        "\ufeff" + json.dumps(GOOD, indent=2),
        yaml.safe_dump(GOOD),
        yaml.safe_dump(GOOD, default_flow_style=True),
        "---\n# a comment\n" + yaml.safe_dump(GOOD) + "...\n",
        yaml.safe_dump(GOOD).replace("\n", "\r\n"),
        "{competition_id: comp, project_id: proj, user_id: alice, expected_time: 60, token: secret,}",
    ],
)
def test_a_config_is_json_or_yaml(text: str) -> None:
    assert parse_config(text.encode()) == GOOD


def test_yaml_words_that_only_yaml_takes_for_something_else_stay_text() -> None:
    text = "a: no\nb: 1:30\nc: 2001-01-01\nd: 0x10\ne: 1_000\nf: on\ng: =\n<<: x\nh: 010\ni: ~\nj: 1e3\nk: 'null'\n"
    assert parse_config(text.encode()) == {
        **{"a": "no", "b": "1:30", "c": "2001-01-01", "d": "0x10", "e": "1_000", "f": "on", "g": "=", "<<": "x"},
        **{"h": 10, "i": None, "j": 1000.0, "k": "null"},
    }


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "mapping"),
        (b"just text", "mapping"),
        (b"1: a", "mapping"),
        (b"null: a", "mapping"),
        (b'{"a": 1, "a": 2}', "there twice"),
        (b"a: 1\na: 2", "there twice"),
        (b"a: {b: 1, b: 2}", "there twice"),
        (b"a: &x [1]\nb: *x", "anchors"),
        (b"a: *x", "anchors"),
        (b"a: !!python/object/apply:os.system [id]", "tags"),
        (b"a: !!str 1", "tags"),
        (b"? [a]\n: 1", "keys"),
        (b"? {a: 1}\n: 1", "keys"),
        (b"a: 1\n---\nb: 2", "another document"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"a: " + b"9" * 101, "digits"),
        (b'{"a":' * 30 + b"1" + b"}" * 30, None),
        (b'{"a":' * 10_000, ""),
        (b"[" * 60_000, ""),
        (b"[" * 1000, "nested too deep"),
        (b"- " * 30_000, ""),
        (b"- " * 1000, "nested too deep"),
        (b"a: [" + b"1," * 2500 + b"]", "too many entries"),
        (b'{"a": 1', "neither JSON nor YAML"),
        (b"a: 'x", "neither JSON nor YAML"),
        (b"a:\n\t- b", "neither JSON nor YAML"),
        (b"a: \x00", "not allowed"),
        (b'a: "\\U00110000"', "range"),
        (b'a: "\\UFFFFFFFF"', None),
        (b'{"a": "\\UFFFFFFFF"}', None),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_what_is_no_config_is_refused_with_a_reason(data: bytes, why: str | None) -> None:
    if why is None:
        with contextlib.suppress(InvalidRequest):  # either way, but no other error
            parse_config(data)
        return
    assert why in refused(data)


def test_the_largest_and_strangest_config_is_read_in_bounded_time() -> None:
    pieces = (
        *(
            b"[",
            b"{",
            b"[a,",
            b"{a: ",
            b'{"a":',
            b"- ",
            b"? ",
            b"a ",
            b"a: ",
            b"x\n",
            b"\n",
            b"#\n",
            b"---\n",
            b"...\n",
        ),
        *(
            b'"',
            b"'",
            b"\\",
            b"!",
            b"&a ",
            b"*a ",
            b"%TAG ",
            b"%\n",
            b"|\n",
            b">\n",
            b", ",
            b": ",
            b"\t",
            b"-",
            b"=",
            b"0",
        ),
        *("é".encode(), "\u2028".encode(), "\ufeff".encode()),
    )
    for prefix in (b"", b"a: ", b'a: "', b"a: |\n ", b"{a: ["):
        for piece in pieces:
            data = (prefix + piece * MAX_CONFIG_BYTES)[:MAX_CONFIG_BYTES]
            began = time.monotonic()
            with contextlib.suppress(InvalidRequest):
                parse_config(data)
            assert time.monotonic() - began < 10, (prefix, piece)


YAML_LIKE = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "b",
                "user_id",
                "1",
                "-1",
                ".5",
                "1e3",
                ".inf",
                ".nan",
                "~",
                "null",
                "true",
                "0x1",
                "1:2",
                "é",
                "\x00",
            ),
            *(": ", ":", "- ", "? ", ", ", "[", "]", "{", "}", "\n", "\n  ", "\t", " ", "'", '"', "\\", "\\u0041"),
            *("\\UFFFFFFFF", "\\xFF", "|", ">", "|2+\n", "&a ", "*a", "!!int ", "!x", "!", "<<", "=", "%YAML 1.1\n"),
            *("%TAG ! x\n", "---\n", "...\n", "# c\n", "\r\n", "\u2028", "\ufeff", "NaN", "Infinity", "9" * 120),
        ]
    ),
    max_size=30,
).map("".join)


@rules(max_examples=500)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode), YAML_LIKE.map(str.encode)))
def test_whatever_is_sent_as_config_it_is_a_mapping_or_refused(data: bytes) -> None:
    try:
        found = parse_config(data)
    except InvalidRequest:
        return
    assert type(found) is dict
    assert all(type(key) is str for key in found)


# Each begins with a letter: text such as 0e0 is a number in one version of YAML and none in the other.
WORDS = st.text("abcdefxyz019 -_:#,[]{}'\"\\é日😀\n\t&*!|>%@`?~.", max_size=20).map(lambda text: "t" + text)
SIMPLE = st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(WORDS, SIMPLE | WORDS | st.lists(SIMPLE | WORDS, max_size=4), max_size=5))
def test_json_and_yaml_of_one_config_mean_the_same(record: dict[str, Any]) -> None:
    assert parse_config(json.dumps(record).encode()) == record
    assert parse_config(yaml.safe_dump(record).encode()) == record
    assert parse_config(yaml.safe_dump(record, allow_unicode=True, default_flow_style=True).encode()) == record


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The defaults, whatever the environment says."""
    return defaults(monkeypatch)


def defaults(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Settings:
    for name in list(os.environ):
        if name.lower() in Settings.model_fields:
            monkeypatch.delenv(name)
    return config.load(_env_file=None, **values)


def test_every_wrong_field_of_a_config_is_named_at_once(settings: Settings) -> None:
    with pytest.raises(InvalidRequest) as raised:
        validate_config(
            {"competition_id": "../x", "project_id": 5, "expected_time": "soon", "token": ""},
            settings,
            token_optional=False,
        )
    assert {error.field for error in raised.value.errors} == {
        *("competition_id", "project_id", "user_id", "expected_time", "token")
    }
    for error in raised.value.errors:
        assert f"{error.field} {error.message}" in raised.value.detail
    with pytest.raises(InvalidRequest, match="token is missing"):
        validate_config({**GOOD, "token": None}, settings, token_optional=False)
    found = validate_config({**GOOD, "token": None, "more": 1}, settings, token_optional=True)
    assert found.token is None


def test_the_kept_config_holds_no_token(settings: Settings) -> None:
    found = validate_config(GOOD, settings, token_optional=False)
    assert found.token == "secret"
    assert "secret" not in json.dumps(found.kept)
    assert found.kept == {name: value for name, value in GOOD.items() if name != "token"}


@pytest.mark.parametrize("value", [1, 1.0, 60, "60", "1e3", " 60 ", 86400, "86400.0"])
def test_seconds_that_are_accepted(settings: Settings, value: object) -> None:
    found = validate_config({**GOOD, "expected_time": value}, settings, token_optional=False)
    assert type(found.expected_time) is float
    assert found.expected_time == float(str(value))


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.999, 86400.1, 1e308, 10**400, math.nan, math.inf, -math.inf, True, False, None, [], {}, [60]),
        *("", "x", "nan", "inf", "1_000", "٦٠", "0x10", "60s", "6" * 21, "1e999"),
    ],
)
def test_seconds_that_are_refused(settings: Settings, value: object) -> None:
    with pytest.raises(InvalidRequest) as raised:
        validate_config({**GOOD, "expected_time": value}, settings, token_optional=False)
    assert [error.field for error in raised.value.errors] == ["expected_time"]
    assert "from 1 to 86400" in raised.value.detail


# -- ids and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "A_b", "0", "_", "a.b-c", "x" * 64, "a_b", "CON", "a..b", "1e3"])
def test_ids_that_are_legal(text: str) -> None:
    assert is_id(text)
    assert re.match(ID_PATTERN, text)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", ".a", "-a", "x" * 65, "a/b", "../../x", "a b", "a\n", "\na", "a\x00", "a'", 'a"', "$(id)"),
        *(
            "a;b",
            "é",
            "\u0430",
            "\uff41",
            "\uff11",
            "a\u200b",
            "a%2e",
            "a\\b",
            "~",
            "*",
            "a\r\n",
            5,
            None,
            ["a"],
            b"a",
            True,
        ),
    ],
)
def test_ids_that_are_refused(text: object) -> None:
    assert not is_id(text)


@given(st.text(max_size=70))
def test_an_id_is_what_the_rule_says(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert is_id(text) == (1 <= len(text) <= 64 and set(text) <= allowed and text[0] not in ".-")


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[tuple[TokenManager, Authenticator, Database]]:
    database = Database(f"sqlite:///{tmp_path / 'database.db'}")
    database.start()
    digest = TokenDigest.from_file(tmp_path / "token.key")
    yield TokenManager(database, digest), Authenticator(database, digest), database
    database.close()


Tokens = tuple[TokenManager, Authenticator, Database]


def test_a_user_has_one_active_token(tokens: Tokens) -> None:
    manager, authenticator, _ = tokens
    assert not manager.create("alice", "first_token").replaced
    assert authenticator.caller("first_token").user_id == "alice"
    made = manager.create("alice", "second_token", is_admin=True)
    assert made.replaced
    assert not made.renewed
    assert authenticator.caller("second_token").is_admin
    with pytest.raises(Unauthenticated, match="revoked"):
        authenticator.caller("first_token")


def test_a_token_string_belongs_to_its_first_user_for_ever(tokens: Tokens) -> None:
    manager, authenticator, _ = tokens
    manager.create("alice", "the_token")
    for _ in range(2):
        with pytest.raises(TokenRefused, match="another user"):
            manager.create("bob", "the_token")
        with contextlib.suppress(TokenRefused):
            manager.revoke(token="the_token")
    with pytest.raises(TokenRefused, match="was revoked"):
        manager.create("alice", "the_token")
    with pytest.raises(Unauthenticated):
        authenticator.caller("the_token")


def test_a_replaced_token_can_be_renewed_by_its_user_and_revoked_for_good(tokens: Tokens) -> None:
    manager, authenticator, _ = tokens
    manager.create("alice", "first_token", is_admin=True)
    manager.create("alice", "second_token")
    made = manager.create("alice", "first_token")
    assert made.renewed
    assert made.replaced
    assert not authenticator.caller("first_token").is_admin  # as asked now, not as it once was
    assert manager.revoke(token="second_token") == "alice"
    with pytest.raises(TokenRefused):
        manager.create("alice", "second_token")
    assert authenticator.caller("first_token").user_id == "alice"
    assert manager.revoke(user_id="alice") == "alice"
    for again in ({"token": "first_token"}, {"user_id": "alice"}, {"token": "never_was"}, {"user_id": "bob"}):
        with pytest.raises(TokenRefused, match="no such token"):
            manager.revoke(**again)


@pytest.mark.parametrize("days", [0, -1, 31, 10**9])
def test_a_token_lives_thirty_days_at_most(tokens: Tokens, days: int) -> None:
    with pytest.raises(TokenRefused, match="30 days"):
        tokens[0].create("alice", "the_token", days=days)


def test_the_use_of_tokens_is_noted_within_a_moment_in_one_write(tokens: Tokens) -> None:
    manager, authenticator, database = tokens
    users = [f"user{number}" for number in range(5)]
    for user_id in users:
        manager.create(user_id, f"token-of-{user_id}")
    before, writes = clock.now_us(), metrics.EVENTS.get_sample_value("gpujobs_database_writes_total")
    for user_id in users[:4] * 2:
        authenticator.caller(f"token-of-{user_id}")

    def used() -> dict[str, int]:
        with database.reading() as connection:
            rows = connection.exec_driver_sql("SELECT user_id, last_used_at FROM tokens WHERE last_used_at NOT NULL")
            return {row.user_id: row.last_used_at for row in rows}

    found = wait_until(used, 30, "a note of the tokens' use")
    assert sorted(found) == users[:4]
    assert all(before <= at <= clock.now_us() for at in found.values())
    assert writes is not None
    assert metrics.EVENTS.get_sample_value("gpujobs_database_writes_total") == writes + 1


def test_a_token_ends_with_its_last_day(tokens: Tokens) -> None:
    manager, authenticator, database = tokens
    before = clock.now_us()
    made = manager.create("alice", "the_token", days=30)
    assert before <= made.expires_at - 30 * 86_400_000_000 <= clock.now_us()
    with database.reading() as connection:
        (row,) = connection.exec_driver_sql("SELECT created_at, expires_at FROM tokens").all()
    database.write(
        lambda transaction: (
            transaction.connection.exec_driver_sql(
                f"UPDATE tokens SET created_at = 1, expires_at = {clock.now_us() - 1}"
            ).rowcount
        )
    )
    assert row.expires_at == made.expires_at
    with pytest.raises(Unauthenticated, match=r"expired at 20.*Z"):
        authenticator.caller("the_token")


@pytest.mark.parametrize("token", ["", "abc", "x" * 257, "has space", "tab\tbed", "é" * 8, "new\nline", "nul\x00byte"])
def test_token_strings_that_are_refused(tokens: Tokens, token: str) -> None:
    with pytest.raises(TokenRefused):
        tokens[0].create("alice", token)
    with pytest.raises(Unauthenticated):
        tokens[1].caller(token)


def test_a_token_for_an_illegal_user_is_refused(tokens: Tokens) -> None:
    for user_id in ("", "../x", "a b", "-x"):
        with pytest.raises(TokenRefused, match="not valid"):
            tokens[0].create(user_id, "the_token")


def test_any_text_as_a_token_is_refused_and_raises_nothing_else(tokens: Tokens) -> None:
    for text in ("\ud800" * 8, "\x00", "é", "x" * MAX_TOKEN_LENGTH, "x" * 100_000, "' OR 1=1 --"):
        with pytest.raises(Unauthenticated) as raised:
            tokens[1].caller(text)
        assert raised.value.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_database_never_holds_a_token(tokens: Tokens, tmp_path: Path) -> None:
    tokens[0].create("alice", "a_very_secret_token")
    tokens[1].caller("a_very_secret_token")
    tokens[2].write(lambda transaction: None)
    for path in tmp_path.iterdir():
        assert b"a_very_secret_token" not in path.read_bytes(), path
    for row in tokens[0].rows():
        assert "a_very_secret_token" not in repr(row)


def test_two_makers_of_the_key_agree_on_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            path = tmp_path / str(number) / "token.key"
            start = threading.Barrier(8)

            def make(_: int, path: Path = path, start: threading.Barrier = start) -> bytes:
                start.wait(60)
                return TokenDigest.from_file(path).of("x")

            assert len(set(pool.map(make, range(8)))) == 1
            assert os.listdir(path.parent) == ["token.key"]
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_is_none_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    for content in (b"", b"short", b"\n" * 100):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"TOKEN_KEY_FILE.*backup"):
            TokenDigest.from_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigurationError, match="TOKEN_KEY_FILE"):
        TokenDigest.from_file(path)


# -- rate limits ---------------------------------------------------------------------------------------------------


def guess(limiter: LoginLimiter, host: str, times: int) -> int:
    """How many of so many wrong tokens got an answer other than 429."""
    answered = 0
    for _ in range(times):
        try:
            limiter.check(host, None)
        except TooManyRequests:
            continue
        answered += 1
        limiter.failed(host)
    return answered


def test_guessing_is_slowed_and_known_callers_go_on() -> None:
    limiter = LoginLimiter(5)
    limiter.check("203.0.113.9", 7)  # worked from there before the guessing began
    assert 5 <= guess(limiter, "203.0.113.9", 500) <= 11  # the window's edge may fall into the test
    limiter.check("203.0.113.9", 7)
    with pytest.raises(TooManyRequests) as raised:
        limiter.check("203.0.113.9", 8)  # even a valid token: it may have been guessed
    assert raised.value.retry_after is not None
    assert 1 <= raised.value.retry_after <= 120
    limiter.check("203.0.113.10", 8)
    assert guess(limiter, "203.0.113.10", 1) == 1
    assert limiter.stats()["known"] == 2


def test_the_addresses_of_one_ipv6_network_count_as_one() -> None:
    limiter = LoginLimiter(5)
    assert sum(guess(limiter, f"2001:db8:1:2::{number:x}", 1) for number in range(200)) <= 11
    assert guess(limiter, "2001:db8:1:3::1", 1) == 1
    assert address_key("2001:db8:1:2::5") == address_key("2001:db8:1:2:ffff::") != address_key("2001:db8:1:3::5")
    assert address_key("203.0.113.9") != address_key("203.0.113.10")
    assert len(address_key("x" * 1000)) <= 64


def test_memory_of_the_login_limiter_is_bounded() -> None:
    limiter = LoginLimiter(5)
    for number in range(KNOWN_CALLERS_MOST + 500):
        limiter.check("203.0.113.9", number)
    assert limiter.stats()["known"] == KNOWN_CALLERS_MOST
    # The least recently seen were forgotten, not the latest.
    guess(limiter, "203.0.113.9", 50)
    limiter.check("203.0.113.9", KNOWN_CALLERS_MOST + 499)
    with pytest.raises(TooManyRequests):
        limiter.check("203.0.113.9", 0)
    storage: Any = limiter._limiter.storage
    for number in range(2000):
        limiter.failed(f"10.0.{number // 250}.{number % 250}")
    assert len(storage.storage) >= 2000
    assert max(list(storage.expirations.values())) <= time.time() + 121
    for key in list(storage.expirations):  # its own thread forgets some meanwhile
        storage.expirations[key] = 0.0  # two minutes pass
    limiter.failed("203.0.113.99")
    wait_until(lambda: len(storage.storage) <= 2, 20, "old addresses to be forgotten")


def test_submissions_of_one_user_are_counted_and_of_others_not() -> None:
    limiter = SubmitLimiter(5)

    def request(user_id: str) -> Request:
        made = Request({"type": "http", "method": "POST", "path": "/api/submit", "headers": [], "state": {}})
        made.state.user_id = user_id
        return made

    async def scenario() -> None:
        left = []
        for _ in range(5):
            headers = await limiter.admit(request("alice"))
            assert headers["X-RateLimit-Limit"] == "5"
            left.append(headers["X-RateLimit-Remaining"])
        assert left == ["4", "3", "2", "1", "0"]
        with pytest.raises(TooManyRequests, match="5 submissions per minute") as raised:
            await limiter.admit(request("alice"))
        assert raised.value.retry_after is not None
        assert 1 <= raised.value.retry_after <= 61
        assert raised.value.headers["X-RateLimit-Remaining"] == "0"
        await limiter.admit(request("bob"))

    asyncio.run(scenario())


# -- descriptors ---------------------------------------------------------------------------------------------------


def test_a_wait_works_on_descriptors_beyond_what_select_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    read, write = os.pipe()
    far = fcntl.fcntl(read, fcntl.F_DUPFD, 1500)
    try:
        assert readable([far], 0) == []
        os.write(write, b"x")
        assert readable([far], 20) == [far]
    finally:
        for descriptor in (read, write, far):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_submit_limiter_moves_its_window_and_forgets_whose_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    windows = MovingWindows()
    for left in (True, True, True, False, False):
        assert windows.acquire_entry("alice", 3, 60) is left
        now += 10
    now = 1060.5  # a minute after the first one there is room for one more
    assert windows.acquire_entry("alice", 3, 60)
    assert not windows.acquire_entry("alice", 3, 60)
    assert windows.get_moving_window("alice", 3, 60) == (1010.0, 3)
    assert not windows.acquire_entry("greedy", 3, 60, amount=4)
    for number in range(600):
        now += 1
        assert windows.acquire_entry(f"user{number}", 3, 60)
        if number % 21 == 0:
            assert windows.acquire_entry("always", 3, 60)
    assert len(windows.events) <= 64


# -- storage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "jobs")


WHEN = 1_700_000_000_123_456  # 2023-11-14 22:13:20 UTC


def sealed(storage: Storage, job_id: str, text: str = '{"a":1}\n') -> None:
    storage.prepare(job_id, b"print()", {"user_id": "alice"})
    storage.output(job_id, 1).close()
    storage.seal_results(job_id, io.BytesIO(text.encode()), 1000, 1000)


def test_the_files_of_a_job_are_its_own(storage: Storage) -> None:
    storage.prepare("job", b"\x00code\xff", {"user_id": "é"})
    folder = storage.folder("job")
    assert (folder / "solution.py").read_bytes() == b"\x00code\xff"
    assert json.loads((folder / "config.json").read_text("utf-8")) == {"user_id": "é"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    storage.prepare("job", b"again", {})  # doing it again is fine


def test_a_result_is_never_overwritten(storage: Storage) -> None:
    for number in range(3):
        sealed(storage, f"job{number}", f'{{"n":{number}}}\n')
    names = [storage.publish(f"job{number}", "u", "c", WHEN).name for number in range(3)]
    assert names == [f"u_c_20231114_221320{end}.jsonl" for end in ("", "_2", "_3")]
    for number, name in enumerate(names):
        assert (storage.results_dir / name).read_text() == f'{{"n":{number}}}\n'


def test_users_whose_names_run_together_have_two_files(storage: Storage) -> None:
    sealed(storage, "one", '{"n":1}\n')
    sealed(storage, "two", '{"n":2}\n')
    first, second = storage.publish("one", "a_b", "c", WHEN), storage.publish("two", "a", "b_c", WHEN)
    assert first.name != second.name
    assert (storage.results_dir / first.name).read_text() == '{"n":1}\n'
    assert (storage.results_dir / second.name).read_text() == '{"n":2}\n'
    # Each is found again as its own.
    assert storage.publish("one", "a_b", "c", WHEN + 9_000_000).name == first.name
    assert storage.publish("two", "a", "b_c", WHEN + 9_000_000).name == second.name


def test_publishing_twice_finds_the_first_name(storage: Storage) -> None:
    sealed(storage, "job")
    first = storage.publish("job", "u", "c", WHEN)
    again = Storage(storage.jobs_dir).publish("job", "u", "c", WHEN + 60_000_000)
    assert again.name == first.name
    assert os.listdir(storage.results_dir) == [first.name]
    # Sealing again, as after a crash, neither changes it nor gives it a second name.
    storage.seal_results("job", io.BytesIO(b'{"other":1}\n'), 1000, 1000)
    assert storage.publish("job", "u", "c", WHEN).name == first.name
    assert (storage.results_dir / first.name).read_text() == '{"a":1}\n'


def test_many_publish_into_the_same_second(storage: Storage) -> None:
    for number in range(24):
        sealed(storage, f"job{number}", f'{{"n":{number}}}\n')
    start = threading.Barrier(8)

    def publish(who: int) -> list[str]:
        start.wait(60)
        return [storage.publish(f"job{number}", "u", "c", WHEN).name for number in range(who, 24, 8)]

    with ThreadPoolExecutor(8) as pool:
        names = [name for found in pool.map(publish, range(8)) for name in found]
    assert len(set(names)) == 24
    contents = {(storage.results_dir / name).read_text() for name in names}
    assert contents == {f'{{"n":{number}}}\n' for number in range(24)}
    assert sorted(os.listdir(storage.results_dir)) == sorted(names)


def test_results_may_lie_on_another_file_system(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=shared, prefix="gpu-job-server-test-") as elsewhere:
        jobs = tmp_path / "jobs"
        jobs.mkdir()
        (jobs / "results").symlink_to(elsewhere)
        storage = Storage(jobs)
        for number in range(3):
            sealed(storage, f"job{number}", f'{{"n":{number}}}\n')
        start = threading.Barrier(3)

        def publish(number: int) -> str:
            start.wait(60)
            return storage.publish(f"job{number}", "u", "c", WHEN).name

        with ThreadPoolExecutor(3) as pool:
            names = list(pool.map(publish, range(3)))
        assert sorted(names) == sorted(os.listdir(elsewhere))
        for number, name in enumerate(names):
            assert (Path(elsewhere) / name).read_text() == f'{{"n":{number}}}\n'


def test_results_that_are_refused_leave_nothing_behind(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    storage.output("job", 1).close()
    before = sorted(os.listdir(storage.folder("job")))
    with pytest.raises(ResultsInvalid):
        storage.seal_results("job", io.BytesIO(b'{"a":1}\nno\n'), 1000, 1000)
    with pytest.raises(ResultsTooLarge):
        storage.seal_results("job", io.BytesIO(b'{"a":1}\n' * 1000), 1000, 1000)
    assert sorted(os.listdir(storage.folder("job"))) == before


def test_without_a_results_file_the_output_is_sealed(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    output = storage.output("job", 1)
    output.append("stdout", 0, b'hello\n{"a":1}\n')
    output.close()
    written = storage.seal_results("job", None, 1000, 1000)
    content = storage.results_path("job").read_bytes()
    assert content == b'{"output": "hello"}\n{"a":1}\n'
    assert (written.size, written.sha256, written.records) == (len(content), hashlib.sha256(content).hexdigest(), 2)


def test_output_grows_by_what_is_new(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    output = storage.output("job", 1)
    output.append("stdout", 0, b"hello ")
    output.append("stdout", 0, b"hello ")  # sent again
    output.append("stdout", 3, b"lo world")  # overlaps
    output.append("stdout", 2, b"llo")  # lies wholly in what is there
    output.append("stderr", 0, b"oops")
    with pytest.raises(ValueError, match="stdout continues at 15, but only 11 bytes are here"):
        output.append("stdout", 15, b"gap")
    assert output.offsets == {"stdout": 11, "stderr": 4}
    output.close()
    again = storage.output("job", 1)  # after a restart: goes on where it stopped
    assert again.offsets == {"stdout": 11, "stderr": 4}
    again.append("stdout", 11, b"!")
    again.sync()
    again.close()
    assert storage.output_path("job", "stdout").read_bytes() == b"hello world!"
    assert storage.output_path("job", "stderr").read_bytes() == b"oops"


@rules(max_examples=50)
@given(st.binary(min_size=1, max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=20))
def test_output_sent_in_any_pieces_is_the_same_output(content: bytes, pieces: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-job-server-test-") as folder:
        storage = Storage(Path(folder))
        storage.prepare("job", b"", {})
        output = storage.output("job", 1)
        for offset, length in [*pieces, (0, 0)]:
            piece = content[offset : offset + length]
            have = output.offsets["stdout"]
            if offset > have:
                with pytest.raises(ValueError, match="continues"):
                    output.append("stdout", offset, piece)
                assert output.offsets["stdout"] == have
            elif offset <= len(content):
                output.append("stdout", offset, piece)
                assert output.offsets["stdout"] == max(have, offset + len(piece))
        have = output.offsets["stdout"]
        output.close()
        assert storage.output_path("job", "stdout").read_bytes() == content[:have]


@rules(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([*STREAMS, "reopen"]), st.integers(1, 9)), max_size=30), st.data())
def test_merged_output_is_every_byte_once_in_the_order_of_its_coming(
    steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-job-server-test-") as folder:
        storage = Storage(Path(folder))
        storage.prepare("job", b"", {})
        output = storage.output("job", 1)
        expected: list[tuple[str, int]] = []
        for stream, length in steps:
            if stream == "reopen":  # after a restart
                output.close()
                output = storage.output("job", 1)
                continue
            piece = bytes((len(expected) + number) % 251 for number in range(length))
            output.append(stream, output.offsets[stream], piece)
            expected += [(stream, byte) for byte in piece]
        output.close()
        offset, most = data.draw(st.integers(0, len(expected) + 2)), data.draw(st.integers(0, 40))
        part = storage.read_output("job", "merged", offset, most)
        assert part.size == len(expected)
        assert [(stream, byte) for stream, piece in part.pieces for byte in piece] == expected[offset : offset + most]


def test_merged_output_without_an_order_has_stdout_first_and_keeps_what_it_said(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    output = storage.output("job", 1)
    for stream in ("stdout", "stderr", "stdout"):
        output.append(stream, output.offsets[stream], stream.encode())
    output.close()
    (storage.folder("job") / "turns").unlink()  # as before there were any
    pieces = [("stdout", b"stdoutstdout"), ("stderr", b"stderr")]
    assert storage.read_output("job", "merged", 0, 100).pieces == pieces
    again = storage.output("job", 1)
    again.append("stderr", 6, b"+")
    assert storage.read_output("job", "merged", 0, 100).pieces == [pieces[0], ("stderr", b"stderr"), ("stderr", b"+")]
    again.append("stdout", 12, b"!")
    again.close()
    assert storage.read_output("job", "merged", 19, 100).pieces == [("stdout", b"!")]


def test_an_order_that_says_more_than_is_there_is_cut(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    output = storage.output("job", 1)
    for stream in ("stdout", "stderr", "stdout", "stderr"):
        output.append(stream, output.offsets[stream], b"12345")
    output.close()
    os.truncate(storage.output_path("job", "stdout"), 7)  # after a loss of power
    again = storage.output("job", 1)
    again.append("stdout", 7, b"abc")
    again.close()
    read = storage.read_output("job", "merged", 0, 100)
    assert b"".join(piece for stream, piece in read.pieces if stream == "stdout") == b"1234512abc"
    assert b"".join(piece for stream, piece in read.pieces if stream == "stderr") == b"1234512345"
    assert read.pieces[:2] == [("stdout", b"12345"), ("stderr", b"12345")]


def test_merged_output_of_another_attempt_is_another(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    origins = set()
    for attempt in (1, 2):
        output = storage.output("job", attempt)
        for stream in ("stderr", "stdout", "stderr"):
            output.append(stream, output.offsets[stream], b"%d" % attempt)
        output.close()
        read = storage.read_output("job", "merged", 0, 100)
        assert read.pieces == [(stream, b"%d" % attempt) for stream in ("stderr", "stdout", "stderr")]
        origins.add(read.origin)
    assert len(origins) == 2


def test_output_can_be_fetched_from_its_beginning_again(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    output = storage.output("job", 1)
    output.append("stdout", 0, b"damaged and too long")
    output.truncate()
    assert output.offsets == dict.fromkeys(STREAMS, 0)
    output.append("stdout", 0, b"right")
    output.close()
    assert storage.output_path("job", "stdout").read_bytes() == b"right"


def test_what_a_former_attempt_left_is_put_aside(storage: Storage) -> None:
    storage.prepare("job", b"", {})
    for attempt in (1, 2, 4):
        output = storage.output("job", attempt)
        assert output.offsets == dict.fromkeys(STREAMS, 0)
        output.append("stdout", 0, b"attempt %d" % attempt)
        output.close()
    folder = storage.folder("job")
    assert (folder / "stdout").read_bytes() == b"attempt 4"
    assert (folder / "stdout.attempt-1").read_bytes() == b"attempt 1"
    assert (folder / "stdout.attempt-2").read_bytes() == b"attempt 2"


def test_results_of_a_former_attempt_are_never_those_of_the_next(storage: Storage) -> None:
    sealed(storage, "job", '{"attempt":1}\n')
    storage.publish("job", "u", "c", WHEN)  # and then the node was lost before the job became final
    storage.output("job", 2).close()
    assert os.listdir(storage.results_dir) == []
    assert not storage.results_path("job").exists()
    storage.seal_results("job", io.BytesIO(b'{"attempt":2}\n'), 1000, 1000)
    name = storage.publish("job", "u", "c", WHEN).name
    assert (storage.results_dir / name).read_text() == '{"attempt":2}\n'


def test_removing_a_job_removes_all_of_it_and_nothing_else(storage: Storage) -> None:
    for job in ("old", "kept"):
        sealed(storage, job)
    old, kept = (storage.publish(job, job, "c", WHEN).name for job in ("old", "kept"))
    for _ in range(2):  # again is fine
        storage.remove("old", old)
    assert not storage.folder("old").exists()
    assert os.listdir(storage.results_dir) == [kept]
    assert sorted(os.listdir(storage.jobs_dir)) == ["kept", "results"]
    storage.remove("never-was", None)


# -- verdict -------------------------------------------------------------------------------------------------------

BAD_RESULTS = (states.RESULTS_INVALID, "line 1 of the results: no")


@pytest.mark.parametrize(
    ("record", "problem", "state", "reason"),
    [
        ({"exit_code": 0}, None, states.COMPLETED, None),
        ({"exit_code": 0}, BAD_RESULTS, states.FAILED, states.RESULTS_INVALID),
        ({"exit_code": 1}, None, states.FAILED, states.EXIT_CODE),
        ({"exit_code": 1}, BAD_RESULTS, states.FAILED, states.EXIT_CODE),
        ({"exit_code": 255}, None, states.FAILED, states.EXIT_CODE),
        ({"exit_code": None, "signal": 9}, None, states.FAILED, states.SIGNAL),
        ({"exit_code": None, "signal": 64}, None, states.FAILED, states.SIGNAL),
        ({"exit_code": None, "signal": 9, "reason": "timeout"}, None, states.FAILED, states.TIMEOUT),
        ({"exit_code": 0, "reason": "timeout"}, None, states.FAILED, states.TIMEOUT),
        ({"signal": 9, "reason": "memory_exceeded"}, None, states.FAILED, states.MEMORY_EXCEEDED),
        ({"signal": 15, "reason": "cancelled"}, BAD_RESULTS, states.CANCELLED, None),
        ({}, None, states.FAILED, states.EXIT_CODE),
    ],
)
def test_the_verdict_on_a_job(
    record: dict[str, Any], problem: tuple[str, str] | None, state: str, reason: str | None
) -> None:
    found = verdict.judge(record, expected_time=10, time_limit=20, results_problem=problem)
    assert (found.state, found.failure_reason) == (state, reason)
    assert found.message.endswith((".", "no", "see stderr."))
    assert verdict.infrastructure_failure(record, "node-1") is None
    if reason == states.SIGNAL:
        assert "memory" not in found.message.lower()  # signal 9 is not "out of memory"
    if reason == states.TIMEOUT:
        assert "20 seconds" in found.message


def test_a_signal_is_named_where_it_has_a_name() -> None:
    assert verdict.signal_name(9) == "SIGKILL"
    assert verdict.signal_name(63) == "signal 63"
    assert verdict.signal_name(-5) == "signal -5"


@pytest.mark.parametrize("reason", sorted(verdict.INFRASTRUCTURE))
def test_an_infrastructure_failure_is_told_apart_and_explained(reason: str) -> None:
    found = verdict.infrastructure_failure({"reason": reason, "message": "no {braces} %s here."}, "node-1")
    assert found is not None
    assert found[0] in states.INFRASTRUCTURE_FAILURES
    assert "node-1" in found[1]
    assert found[1].endswith(".")
    assert "{node}" not in found[1]


def test_every_reason_is_either_the_jobs_or_the_infrastructures() -> None:
    assert not set(states.USER_FAILURES) & set(states.INFRASTRUCTURE_FAILURES)
    assert set(states.FAILURE_REASONS) == {
        *("exit_code", "signal", "timeout", "memory_exceeded", "results_missing", "results_invalid"),
        *("results_too_large", "node_lost", "launch_failed", "node_disk_full", "gpu_fault"),
    }
    assert states.JOB_STATES == ("pending", "running", "completed", "failed", "cancelled")
    assert all(before not in states.FINAL for before, _ in states.TRANSITIONS)


# -- forecast ------------------------------------------------------------------------------------------------------


def simulated(pending: list[int], free_in: list[int]) -> list[int]:
    """When each job starts, second by second: whenever a node is free, it takes the next job."""
    busy_until = list(free_in)
    starts: list[int] = []
    second = 0
    while len(starts) < len(pending):
        for node, until in enumerate(busy_until):
            if until <= second and len(starts) < len(pending):
                busy_until[node] = second + pending[len(starts)]
                starts.append(second)
        second += 1
    return starts


@given(
    st.lists(st.integers(1, 30), max_size=20),
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
def test_the_forecast_is_what_a_simulation_shows(pending: list[int], free_in: list[int]) -> None:
    heap = sorted(map(float, free_in))
    assert start_times(map(float, pending), heap) == simulated(pending, free_in)
    assert heap[0] == simulated([*pending, 1], free_in)[-1]


def test_without_nodes_there_is_a_position_and_no_time() -> None:
    line = Line([], [(5, Range(1, 1, 1)), (6, Range(1, 1, 1))])
    assert (line.place(5), line.place(6), line.place(7)) == ((1, None), (2, None), (3, None))
    assert line.newcomer is None
    assert Line([Range(0, 1, 2)]).newcomer == Range(0, 1, 2)


def test_a_job_past_its_declared_time_is_expected_to_end_within_its_limit() -> None:
    assert remaining_seconds(60, 120, 0) == 60
    assert remaining_seconds(60, 120, 59) == 1
    assert remaining_seconds(60, 120, 60) == 30
    assert remaining_seconds(60, 120, 100) == 10
    assert remaining_seconds(60, 120, 500) == 0


# -- frames --------------------------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(("op", "re", "push", "text")), st.text(max_size=10)), st.binary(max_size=40)
    ),
    max_size=8,
)


def framed(messages: list[tuple[dict[str, Any], bytes]]) -> bytes:
    stream = b""
    for head, payload in messages:
        stream += json.dumps({**head, "size": len(payload)} if payload else head).encode() + b"\n" + payload
    return stream


@given(MESSAGES, st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_messages_are_the_same_however_the_stream_is_cut(
    messages: list[tuple[dict[str, Any], bytes]], cuts: list[int]
) -> None:
    stream = framed(messages)
    frames = Frames()
    found = []
    position = 0
    number = 0
    while position < len(stream):
        size = cuts[number % len(cuts)]
        found += frames.feed(stream[position : position + size])
        position += size
        number += 1
    assert [{name: value for name, value in message.items() if name != "size"} for message in found] == [
        {**head, "data": payload} if payload else head for head, payload in messages
    ]


def test_a_payload_that_looks_like_messages_is_payload() -> None:
    trick = b'{"push": "exit"}\n\n{"re": 1}\n'
    found = Frames().feed(framed([({"op": "a"}, trick), ({"op": "b"}, b"")]))
    assert [message.get("data") for message in found] == [trick, None]
    assert [message["op"] for message in found] == ["a", "b"]


FRAME_LIKE = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from((b'{"re":1}\n', b'{"size":3}\nabc', b'{"size":-5}\n', b'{"size":1e999}\n', b'{"size":"x"}\n')),
        st.sampled_from(
            (b'{"size":-12}\n', b"[]\n", b"null\n", b"\n", b'{"size":true}\n', b'{"size":[1]}\n', b"[" * 5000)
        ),
    ),
    max_size=8,
).map(b"".join)


@rules(max_examples=300)
@given(FRAME_LIKE)
@example(b'{"size":-12}\n')
@example(b'{"size":1e999}\n')
@example(b'{"a":' * 100_000 + b"\n")
@example(b'{"size":' + b"9" * 5000 + b"}\n")
def test_what_is_no_protocol_is_unreachable_and_nothing_else(stream: bytes) -> None:
    with contextlib.suppress(NodeUnreachable):
        for message in Frames().feed(stream):
            assert type(message) is dict


@pytest.mark.parametrize(
    "size", ["-1", "-13", "1.5", '"3"', "[3]", "true", "NaN", "1e999", "1000000000000", "9" * 5000]
)
def test_a_size_that_is_none_is_refused(size: str) -> None:
    # -13 would lead back to the beginning of this very line.
    with pytest.raises(NodeUnreachable, match="not understood"):
        Frames().feed(b'{"size":%s}\nabcdefghij{}\n' % size.encode())


def test_no_line_and_no_payload_grows_without_end() -> None:
    frames = Frames()

    def endless() -> None:
        for _ in range(100):
            frames.feed(b"x" * (1 << 20))

    with pytest.raises(NodeUnreachable, match="line without end"):
        endless()


def test_many_small_frames_cost_linear_time() -> None:
    stream = framed([({"push": "output"}, b"x" * 10)] * 20_000)
    began = time.monotonic()
    frames = Frames()
    found = sum(
        len(frames.feed(stream[at : at + executor.RECEIVE_SIZE])) for at in range(0, len(stream), executor.RECEIVE_SIZE)
    )
    assert found == 20_000
    assert time.monotonic() - began < 20


# -- the job's command ---------------------------------------------------------------------------------------------


def probe(**values: Any) -> executor.Probe:
    return executor.Probe.of({"python": {"executable": "/usr/bin/python3", "version": "3.11.0"}, **values})


def gpu(index: int) -> dict[str, Any]:
    return {"index": index, "uuid": f"GPU-{index}", "name": "A100"}


IDENTITY = executor.JobIdentity("job-1", "alice", "comp", "proj")


def test_the_command_is_words_and_never_a_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = defaults(
        monkeypatch, job_command="python grade_code.py {code} {competition_id} '{results} x' {{}} a{user_id}b"
    )
    spec = executor.job_spec(IDENTITY, 20.0, probe(), None, settings)
    assert spec["argv"] == ["python", "grade_code.py", "solution.py", "comp", "results.jsonl x", "{}", "aaliceb"]
    hostile = executor.JobIdentity("j", "$(reboot); 'x' {code}", "a b", "*")
    spec = executor.job_spec(
        hostile, 20.0, probe(), None, defaults(monkeypatch, job_command="run {user_id} {competition_id}")
    )
    assert spec["argv"] == ["run", "$(reboot); 'x' {code}", "a b"]


def test_a_job_sees_its_names_and_its_gpus_and_no_token(settings: Settings) -> None:
    both = probe(gpus=[gpu(0), gpu(1)])
    spec = executor.job_spec(IDENTITY, 20.0, both, None, settings)
    assert spec["argv"] == ["/usr/bin/python3", "-u", "solution.py"]
    assert spec["env"] == {
        **{"JOB_ID": "job-1", "USER_ID": "alice", "COMPETITION_ID": "comp", "PROJECT_ID": "proj"},
        **{"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    }
    assert executor.job_spec(IDENTITY, 20.0, both, [1, 7], settings)["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert executor.job_spec(IDENTITY, 20.0, probe(), None, settings)["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert spec["limits"]["wall_seconds"] == 20.0


def test_only_the_default_command_is_prestarted(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, expected in (
        ({}, True),
        ({"prestart": False}, False),
        ({"job_command": "{python} grade_code.py {code}"}, False),
        ({"job_command": "/opt/run -u {code}"}, False),
        ({"job_command": "{python} -I -u {code}"}, False),  # it would not heed PYTHONPATH
    ):
        settings = defaults(monkeypatch, **changes)
        assert executor.job_spec(IDENTITY, 20.0, probe(), None, settings)["prestart"] is expected


def test_the_sandbox_is_used_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, works, mode in (("auto", True, "bwrap"), ("auto", False, "none"), ("off", True, "none")):
        settings = defaults(monkeypatch, sandbox=setting)
        spec = executor.job_spec(IDENTITY, 20.0, probe(sandbox={"works": works}), None, settings)
        assert spec["sandbox"]["mode"] == mode


def test_a_missing_results_file_matters_only_where_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not executor.results_expected(defaults(monkeypatch))
    assert executor.results_expected(defaults(monkeypatch, job_command="grade {code} --out={results}"))


# -- ssh: where a node is ------------------------------------------------------------------------------------------

SSH_CONFIG = """
Host lab-*
    User labuser
    Port 2200
    IdentityFile ~/.ssh/lab_key

Host lab-1
    HostName 10.0.0.1

Host inner
    HostName 10.9.9.9
    ProxyJump bastion

Host bastion
    HostName bastion.example.org
    User jumper
    Port 2022
    IdentityFile ~/.ssh/bastion_key

Host far
    ProxyJump gate:2222,other@10.0.0.7

Host deep
    ProxyJump middle

Host middle
    ProxyJump bastion

Host loop-a
    ProxyJump loop-b

Host loop-b
    ProxyJump loop-a

Host self
    ProxyJump self

Host direct
    ProxyJump none
"""


def target_of(
    monkeypatch: pytest.MonkeyPatch, node: NodeConfig, text: str | None = SSH_CONFIG, **values: Any
) -> ssh_executor.Target:
    ssh_config = paramiko.SSHConfig.from_text(text) if text is not None else None
    return ssh_executor.resolve(node, defaults(monkeypatch, **values), ssh_config)


def test_without_ssh_config_the_usual_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="gpu-1"), None)
    assert found == ssh_executor.Target("gpu-1", 22, getpass.getuser(), ())
    assert str(found) == f"{getpass.getuser()}@gpu-1:22"


def test_ssh_config_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="lab-1"))
    assert (found.host, found.port, found.user) == ("10.0.0.1", 2200, "labuser")
    assert found.key_files == (os.path.expanduser("~/.ssh/lab_key"),)
    assert found.jumps == ()


def test_the_settings_come_before_ssh_config(monkeypatch: pytest.MonkeyPatch) -> None:
    node = NodeConfig(host="lab-1", port=22, user="me", key_file="~/mine")
    found = target_of(monkeypatch, node)
    assert (found.host, found.port, found.user) == ("10.0.0.1", 22, "me")
    assert found.key_files == (os.path.expanduser("~/mine"),)
    found = target_of(monkeypatch, NodeConfig(host="lab-1"), gpu_node_user="gpu", ssh_key_file="/k")
    assert (found.user, found.key_files) == ("gpu", ("/k",))


def test_a_jump_host_of_ssh_config_is_looked_up_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="inner"))
    assert found.host == "10.9.9.9"
    (jump,) = found.jumps
    assert (jump.host, jump.port, jump.user) == ("bastion.example.org", 2022, "jumper")
    assert jump.key_files == (os.path.expanduser("~/.ssh/bastion_key"),)


def test_the_login_on_the_nodes_is_not_that_of_the_jump_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="inner"), gpu_node_user="gpu")
    assert found.user == "gpu"
    assert found.jumps[0].user == "jumper"


def test_jump_hosts_are_passed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="far"))
    assert [(jump.host, jump.port) for jump in found.jumps] == [("gate", 2222), ("10.0.0.7", 22)]
    assert found.jumps[1].user == "other"
    found = target_of(monkeypatch, NodeConfig(host="x", jump="a@one:1, two"), None, gpu_node_user="gpu")
    assert [str(jump) for jump in found.jumps] == ["a@one:1", "gpu@two:22"]


def test_a_jump_host_behind_a_jump_host_is_reached_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target_of(monkeypatch, NodeConfig(host="deep"))
    assert [jump.host for jump in found.jumps] == ["bastion.example.org", "middle"]


def test_a_circle_of_jump_hosts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("loop-a", "self"):
        with pytest.raises(ConfigurationError, match="circle"):
            target_of(monkeypatch, NodeConfig(host=host))


def test_a_jump_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_of(monkeypatch, NodeConfig(host="direct")).jumps == ()
    assert target_of(monkeypatch, NodeConfig(host="inner", jump="none")).jumps == ()
    assert target_of(monkeypatch, NodeConfig(host="inner", jump="")).jumps == ()


@pytest.mark.parametrize(
    ("hop", "host", "port", "user"),
    [
        ("gate", "gate", None, None),
        ("gate:2222", "gate", 2222, None),
        ("me@gate", "gate", None, "me"),
        ("me@gate:2222", "gate", 2222, "me"),
        ("me@corp@gate", "gate", None, "me@corp"),
        ("[2001:db8::1]:2222", "2001:db8::1", 2222, None),
        ("me@[2001:db8::1]", "2001:db8::1", None, "me"),
        ("2001:db8::1", "2001:db8::1", None, None),
    ],
)
def test_hops_that_are_understood(hop: str, host: str, port: int | None, user: str | None) -> None:
    found = ssh_executor.parse_hop(hop, "")
    assert (found.host, found.port, found.user) == (host, port, user)


@pytest.mark.parametrize(
    "hop", ["", "me@", ":22", "gate:ssh", "gate:-1", "gate:0", "gate:99999", "gate:²", "[::1", "x" * 300]
)
def test_hops_that_are_not_understood_are_named(hop: str) -> None:
    with pytest.raises(ConfigurationError, match="jump host"):
        ssh_executor.parse_hop(hop, "")


def test_an_ssh_config_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("nonsense\n")
    with pytest.raises(ConfigurationError, match=f"SSH_CONFIG_FILE: {path}"):
        ssh_executor.load_ssh_config(str(path))
    assert ssh_executor.load_ssh_config(str(tmp_path / "missing")) is None
    assert ssh_executor.load_ssh_config("") is None
    path.write_text(SSH_CONFIG)
    assert ssh_executor.load_ssh_config(str(path)) is not None
    for port in ("ssh", "99999"):
        with pytest.raises(ConfigurationError, match=r"gpu-1.*Port"):
            target_of(monkeypatch, NodeConfig(host="gpu-1"), f"Host gpu-1\n  Port {port}\n")


def test_which_nodes_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def hosts(**values: Any) -> list[tuple[str, list[int] | None]]:
        return [(node.host, node.gpus) for node in ssh_executor.nodes_of(defaults(monkeypatch, **values))]

    assert hosts() == []  # all on this machine
    assert hosts(gpu_node_host="gpu-{i}.lab", num_gpu_nodes=3) == [(f"gpu-{i}.lab", None) for i in (1, 2, 3)]
    assert hosts(gpu_node_host="gpu.lab", num_gpu_nodes=2) == [("gpu.lab", [0]), ("gpu.lab", [1])]
    assert hosts(gpu_node_host="ignored", gpu_nodes=[{"host": "a", "gpus": [2, 3]}, {"host": "b"}]) == [
        ("a", [2, 3]),
        ("b", None),
    ]
    assert len(hosts(gpu_node_host="gpu.lab")) == 8


def test_reconnecting_is_spread_out_and_bounded() -> None:
    for attempt in (0, 1, 5, 50, 10_000):
        for _ in range(20):
            assert 0.1 <= ssh_executor.connect_jitter(attempt) <= 30


# -- settings ------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_interface(settings: Settings) -> None:
    project = config.PROJECT_DIR
    promised = {
        "server_host": "0.0.0.0",
        "server_port": 8001,
        "gpu_node_host": "",
        "gpu_node_user": "",
        "num_gpu_nodes": 8,
        "database_url": f"sqlite:///{project / 'database.db'}",
        "jobs_dir": project / "jobs",
        "gpu_nodes": [],
        "ssh_key_file": "",
        "ssh_known_hosts": os.path.expanduser("~/.ssh/known_hosts"),
        "job_command": "{python} -u {code}",
        "submit_default_wait": 0,
        "submit_max_wait": 14400,
        "max_infra_retries": 2,
        "max_active_jobs": 1,
        "submits_per_minute": 5,
        "check_syntax": False,
        "sandbox": "auto",
        "job_network": "none",
    }
    assert {name: getattr(settings, name) for name in promised} == promised
    assert config.TOKEN_MAX_DAYS == 30
    assert settings.results_dir == project / "jobs" / "results"


def test_the_environment_comes_before_the_file_and_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    defaults(monkeypatch)
    file = tmp_path / ".env"
    file.write_text("SERVER_PORT=9001\nnum_gpu_nodes=3\nJOBS_DIR=\nOTHER=1\n")
    monkeypatch.setenv("SERVER_PORT", "9002")
    monkeypatch.setenv("GPU_NODES", '[{"host": "a", "port": 2222}]')
    found = config.load(_env_file=file)
    assert (found.server_port, found.num_gpu_nodes) == (9002, 3)
    assert found.jobs_dir == config.PROJECT_DIR / "jobs"  # an empty value is no value
    assert found.gpu_nodes == [NodeConfig(host="a", port=2222)]


def test_paths_mean_the_same_from_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = defaults(monkeypatch, jobs_dir="data/../files", database_url="sqlite:///x/y.db", token_key_file="~/k")
    assert found.jobs_dir == config.PROJECT_DIR / "files"
    assert found.database_path == config.PROJECT_DIR / "x" / "y.db"
    assert found.token_key_file == Path("~/k").expanduser()
    assert defaults(monkeypatch, database_url="sqlite:////abs/y.db").database_path == Path("/abs/y.db")


def test_settings_cannot_be_changed_after_the_start(settings: Settings) -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.server_port = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVER_PORT", "0"),
        ("SERVER_PORT", "70000"),
        ("SERVER_PORT", "http"),
        ("NUM_GPU_NODES", "0"),
        ("NUM_GPU_NODES", "2.5"),
        ("DATABASE_URL", "postgresql://x"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("GPU_NODES", "not json"),
        ("GPU_NODES", "{}"),
        ("GPU_NODES", '[{"port": 22}]'),
        ("GPU_NODES", '[{"host": "a", "port": 0}]'),
        ("GPU_NODES", '[{"host": "a", "colour": "red"}]'),
        ("SANDBOX", "maybe"),
        ("LOG_LEVEL", "loud"),
        ("JOB_COMMAND", "{python} {solution}"),
        ("JOB_COMMAND", "{python.x}"),
        ("JOB_COMMAND", "{}"),
        ("JOB_COMMAND", "{python!r}"),
        ("JOB_COMMAND", "{python:>9}"),
        ("JOB_COMMAND", "run 'open"),
        ("JOB_COMMAND", "run {"),
        ("JOB_COMMAND", "   "),
        ("NODE_LOST_AFTER", "nan"),
        ("NODE_LOST_AFTER", "inf"),
        ("NODE_LOST_AFTER", "-1"),
        ("NODE_LOST_AFTER", "1"),
        ("NODE_PING_TIMEOUT", "1"),
        ("SUBMIT_DEFAULT_WAIT", "20000"),
        ("SUBMIT_DEFAULT_WAIT", "-1"),
        ("MAX_ACTIVE_JOBS", "0"),
        ("SUBMITS_PER_MINUTE", "0"),
        ("MAX_EXPECTED_TIME", "inf"),
        ("MAX_CODE_BYTES", "10MB"),
        ("CHECK_SYNTAX", "perhaps"),
        ("MIN_FREE_DISK", "-1"),
    ],
)
def test_a_wrong_value_is_a_sentence_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    defaults(monkeypatch)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as raised:
        config.load(_env_file=None)
    text = str(raised.value)
    assert text.startswith("Wrong setting: ")
    assert name in text
    assert text.endswith(".")
    assert "\n" not in text
    assert "pydantic" not in text.lower()


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults(monkeypatch)
    for name in ("SERVER_PORT", "NUM_GPU_NODES", "MAX_CODE_BYTES"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError) as raised:
        config.load(_env_file=None)
    for name in ("SERVER_PORT", "NUM_GPU_NODES", "MAX_CODE_BYTES"):
        assert name in str(raised.value)


def test_commands_that_are_accepted() -> None:
    for command in ("{python} -u {code}", "grade --in={code} '{results}' {{x}}", "sh -c 'echo a; echo b'"):
        assert config.split_job_command(command) == tuple(shlex.split(command))


def test_a_misspelt_name_in_the_file_is_pointed_out(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "# SERVER_PRT=1\nSERVER_PRT=1\nexport GPU_NODE_HOSTS=x\nserver_port=2\nPATH_TO_SOMETHING_ELSE=1\nnonsense\n"
        "export NUM_GPU_NODES=1\n"
    )
    found = config.unknown_names(file)
    assert len(found) == 2
    assert "SERVER_PRT is no setting; did you mean SERVER_PORT?" in found[0]
    assert "GPU_NODE_HOSTS is no setting; did you mean GPU_NODE_HOST?" in found[1]
    assert config.unknown_names(tmp_path / "missing") == []


def test_the_table_holds_every_setting_with_default_and_meaning() -> None:
    rows = [line.split(" | ") for line in config.settings_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{name.upper()}`" for name in Settings.model_fields]
    for row, (name, field) in zip(rows, Settings.model_fields.items(), strict=True):
        assert row[2].removesuffix(" |") == field.description
        assert len(field.description or "") > 15, name
        assert (field.description or "").rstrip(")").endswith("."), name
    by_name = {row[0][3:-1]: row[1] for row in rows}
    assert by_name["SERVER_PORT"] == "`8001`"
    assert by_name["DATABASE_URL"] == "`sqlite:///database.db`"
    assert by_name["GPU_NODES"] == "`(empty list)`"
    assert by_name["GPU_NODE_HOST"] == "`(empty)`"


# -- clock ---------------------------------------------------------------------------------------------------------


def test_instants_are_written_in_utc() -> None:
    assert clock.iso(WHEN) == "2023-11-14T22:13:20.123456Z"
    assert clock.iso(0) == "1970-01-01T00:00:00.000000Z"
    assert clock.iso(None) is None
    assert clock.file_stamp(WHEN) == "20231114_221320"
    assert abs(clock.now_us() / 1e6 - time.time()) < 5


def test_a_strong_token_is_no_option_of_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = iter(["-Xq" + "a" * 40, "--b" + "a" * 40, "good" + "a" * 39])
    monkeypatch.setattr("secrets.token_urlsafe", lambda size: next(offered))
    assert strong_token() == "good" + "a" * 39


def test_a_node_that_may_be_about_to_take_jobs_counts_as_another_one() -> None:
    registry = NodeRegistry()
    this = registry.add(NodeRecord("this", "x", connected=True, reason=None))
    assert not registry.others_may(this.node_id)
    registry.add(NodeRecord("other", "x"))
    states_of_it: list[tuple[dict[str, object], bool]] = [
        ({}, True),  # not tried yet
        ({"drained_by": "admin"}, False),
        ({"drained_by": None, "quarantined": NOT_LOOKED_AT}, True),
        ({"connected": True, "reason": None}, True),  # adopted its job, and was not looked at yet
        ({"drained_by": "admin"}, False),
        ({"drained_by": None, "quarantined": "its disk is full"}, False),
        ({"quarantined": None}, True),
        ({"connected": False, "reason": "no route to host"}, False),
        ({"quarantined": NOT_LOOKED_AT}, False),
    ]
    for number, (values, expected) in enumerate(states_of_it):
        registry.update("other", **values)
        assert registry.others_may(this.node_id) is expected, number
