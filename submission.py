"""A submission's bytes: the multipart body, the config in JSON or YAML, and what its fields must be. Pure but for
reading the request's stream; nothing here knows tokens, limits or the queue.

May import `errors`, `config`, `auth` (for what an id is).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import yaml
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from auth import MAX_TOKEN_LENGTH, is_id
from config import Settings
from errors import FieldError, InvalidRequest, PayloadTooLarge, RequestTimeout, Unprocessable

# It warns of each body that it refuses, which is the client's to know.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

MAX_CONFIG_BYTES = 1 << 16
MAX_YAML_BYTES = 1 << 13  # reading hostile YAML takes up to 10 us a byte, JSON takes nothing
MAX_YAML_BRACKETS = 200  # and the square of these
MAX_PARTS = 64
MAX_PART_HEADER_BYTES = 1 << 13
BODY_OVERHEAD = 1 << 16  # boundaries and part headers
MAX_CONFIG_DEPTH = 20
MAX_CONFIG_NODES = 2_000
PARTS = ("code", "config_file")
_TOO_LATE = "too late"
ID_RULE = "must be 1-64 characters of A-Z a-z 0-9 . _ -, not starting with . or -"


# -- multipart -----------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    name: str
    data: bytearray = field(default_factory=bytearray)


@lru_cache(maxsize=128)  # most clients name their parts alike
def _part_name(disposition: bytes) -> str:
    _, options = parse_options_header(disposition)
    return options.get(b"name", b"").decode("utf-8", "replace")


class _Parts:
    """Collects the parts we know; everything else is passed over. Limits hold while the bytes come in."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.found: dict[str, bytes] = {}
        self.complete = False
        self.config_too_large = False
        self._limits = limits
        self._current: _Part | None = None
        self._count = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._header_size = 0
        self._disposition = b""

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise InvalidRequest(f"The request has more than {MAX_PARTS} parts.")
        self._current = None
        self._disposition = b""
        self._header_size = 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow_header(end - start)
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow_header(end - start)
        self._header_value += data[start:end]

    def _grow_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_PART_HEADER_BYTES:
            raise InvalidRequest("The headers of a part are too long.")

    def on_header_end(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        name = _part_name(self._disposition)
        if name in PARTS:
            if name in self.found:
                raise InvalidRequest(f"The part {name} is there twice.", errors=[FieldError(name, "is there twice")])
            self._current = _Part(name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._current
        if part is None:
            return
        if len(part.data) + end - start > self._limits[part.name]:
            if part.name == "code":
                raise PayloadTooLarge(f"The code is larger than {self._limits[part.name]} bytes.")
            self.config_too_large = True  # told later: too much code or a missing part is the earlier answer
            return
        part.data += data[start:end]

    def on_part_end(self) -> None:
        if self._current is not None:
            self.found[self._current.name] = bytes(self._current.data)

    def on_end(self) -> None:
        self.complete = True


_CALLBACKS = (
    *("on_part_begin", "on_part_data", "on_part_end", "on_header_field", "on_header_value"),
    *("on_header_end", "on_headers_finished", "on_end"),
)


class Upload(NamedTuple):
    """The two parts of a submission, as they came."""

    code: bytes
    config_file: bytes


async def read_upload(receive: Receive, content_type: str, content_length: str | None, settings: Settings) -> Upload:
    """Read the body. Raises PayloadTooLarge, Unprocessable (a part is missing), InvalidRequest, RequestTimeout."""
    most = settings.max_code_bytes + MAX_CONFIG_BYTES + BODY_OVERHEAD
    if content_length is not None and content_length.isdigit() and int(content_length) > most:
        raise PayloadTooLarge(f"The request is larger than {most} bytes.")
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise missing(list(PARTS), "The request must be multipart/form-data with the parts code and config_file.")
    body = await _whole(receive, most, settings.request_body_timeout)
    parts = _parse(body, options[b"boundary"], {"code": settings.max_code_bytes, "config_file": MAX_CONFIG_BYTES})
    absent = [name for name in PARTS if name not in parts.found]
    if absent:
        raise missing(absent, f"The request lacks the part {' and the part '.join(absent)}.")
    if parts.config_too_large:
        text = f"is larger than {MAX_CONFIG_BYTES} bytes"
        raise InvalidRequest(f"The config_file {text}.", errors=[FieldError("config_file", text)])
    return Upload(parts.found["code"], parts.found["config_file"])


def missing(names: list[str], detail: str) -> Unprocessable:
    """The 422 that names each missing part."""
    return Unprocessable(detail, errors=[FieldError(name, "is missing") for name in names])


async def _whole(receive: Receive, most: int, seconds: float) -> bytes:
    body = bytearray()
    task = asyncio.current_task()
    assert task is not None
    # Most bodies are there already, and anyio's time limits cost more than to read one.
    alarm = asyncio.get_running_loop().call_later(seconds, task.cancel, _TOO_LATE)
    try:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise InvalidRequest("The client went away before its body was whole; nothing was queued.")
            body += message.get("body", b"")
            if len(body) > most:
                raise PayloadTooLarge(f"The request is larger than {most} bytes.")
            more = message.get("more_body", False)
    except asyncio.CancelledError as cancelled:
        if cancelled.args != (_TOO_LATE,):
            raise
        raise RequestTimeout(f"The request's body did not arrive within {seconds:g} seconds.") from None
    finally:
        alarm.cancel()
    return bytes(body)


def _parse(body: bytes, boundary: bytes, limits: dict[str, int]) -> _Parts:
    """The whole body at once: what the parser makes of a body in pieces depends on how the network cut it."""
    parts = _Parts(limits)
    try:
        parser = MultipartParser(boundary, {name: getattr(parts, name) for name in _CALLBACKS})  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body cannot be read: {error}.") from None
    if not parts.complete:
        raise InvalidRequest("The multipart body ends too early; nothing was queued.")
    return parts


# -- config --------------------------------------------------------------------------------------------------------


class _ConfigLoader(yaml.SafeLoader):
    """YAML as JSON's data model: only null, true/false and numbers are not strings (so `no` and `1:30` stay text)."""


_ConfigLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", list("tf")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
):
    _ConfigLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    text = loader.construct_scalar(node).lower()
    if text.lstrip("+-") in (".inf", ".nan"):
        return math.nan
    if len(text) > 100:
        raise yaml.YAMLError("a number has too many digits")
    return float(text) if any(mark in text for mark in ".e") else int(text, 10)


_ConfigLoader.add_constructor("tag:yaml.org,2002:int", _number)
_ConfigLoader.add_constructor("tag:yaml.org,2002:float", _number)


def _yaml(text: str) -> Any:
    """Safe YAML with bounded depth and size; no anchors, aliases, tags or double keys."""
    if text.count("[") + text.count("{") > MAX_YAML_BRACKETS:
        raise ValueError("it is nested too deep or has too many entries")
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=_ConfigLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise ValueError("tags are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_CONFIG_DEPTH or nodes > MAX_CONFIG_NODES:
            raise ValueError("it is nested too deep or has too many entries")
    loader = _ConfigLoader(text)
    try:
        root = loader.get_single_node()
        _refuse_double_keys(root)
        return loader.construct_document(root) if root is not None else None
    finally:
        loader.dispose()


def _refuse_double_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("keys must be plain words")
            if key.value in keys:
                raise ValueError(f"the key {key.value[:40]!r} is there twice")
            keys.add(key.value)
            _refuse_double_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_double_keys(item)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DoubleKey(f"the key {key[:40]!r} is there twice")
        found[key] = value
    return found


class DoubleKey(ValueError):
    """A JSON object names a key twice; YAML would not be kinder."""


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def parse_config(data: bytes) -> dict[str, Any]:
    """The config as a mapping, from JSON or YAML. Raises InvalidRequest with a sentence."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise unreadable("it is not UTF-8 text") from None
    if not text.strip():
        raise unreadable("it is empty")
    try:
        value = _JSON.decode(text)
    except DoubleKey as error:
        raise unreadable(str(error)) from None
    except (ValueError, RecursionError) as json_error:
        if len(data) > MAX_YAML_BYTES:
            shown = str(json_error) or "nested too deep"
            raise unreadable(f"it is no JSON ({shown}), and YAML may have {MAX_YAML_BYTES} bytes at most") from None
        try:
            value = _yaml(text)
        except yaml.MarkedYAMLError as error:
            # For what looks like JSON, what the JSON parser says is the better help.
            shown = str(json_error) if text.lstrip().startswith("{") else _yaml_text(error)
            raise unreadable(f"it is neither JSON nor YAML ({shown})") from None
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise unreadable(str(error) or "it is nested too deep") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise unreadable("it must be a mapping of names to values")
    return value


def _yaml_text(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{error.problem or error.context or 'not understood'}{where}"


def unreadable(why: str) -> InvalidRequest:
    """The 400 for a config that cannot be read."""
    return InvalidRequest(f"The config_file cannot be read: {why}.", errors=[FieldError("config_file", why)])


class JobConfig(NamedTuple):
    """A valid config. `expected_time` in seconds; `token` is what the config holds, None when it has none.

    `kept` is the config without the token, as it is stored with the job.
    """

    competition_id: str
    project_id: str
    user_id: str
    expected_time: float
    token: str | None
    kept: dict[str, Any]


def validate_config(
    config: dict[str, Any], settings: Settings, *, token_optional: bool, header_token: str | None = None
) -> JobConfig:
    """Check every field and name all that are wrong at once. Raises InvalidRequest.

    `header_token` is the token of the Authorization header; one in the config must agree with it.
    """
    errors: list[FieldError] = []
    for name in ("competition_id", "project_id", "user_id"):
        if name not in config:
            errors.append(FieldError(name, "is missing"))
        elif not isinstance(config[name], str):
            errors.append(FieldError(name, "must be text (put it in quotes)"))
        elif not is_id(config[name]):
            errors.append(FieldError(name, ID_RULE))
    expected_time = 0.0
    try:
        expected_time = _seconds(config["expected_time"], settings.max_expected_time)
    except KeyError:
        errors.append(FieldError("expected_time", "is missing"))
    except ValueError as error:
        errors.append(FieldError("expected_time", str(error)))
    token = config.get("token")
    if token is None and not token_optional:
        errors.append(FieldError("token", "is missing (or send it as Authorization: Bearer …)"))
    elif token is not None and (not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_LENGTH):
        errors.append(FieldError("token", f"must be text of at most {MAX_TOKEN_LENGTH} characters"))
    elif token is not None and header_token is not None and token != header_token:
        errors.append(FieldError("token", "differs from the token in the Authorization header"))
    if errors:
        text = "; ".join(f"{error.field} {error.message}" for error in errors)
        raise InvalidRequest(f"The config is not valid: {text}.", errors=errors)
    return JobConfig(
        competition_id=config["competition_id"],
        project_id=config["project_id"],
        user_id=config["user_id"],
        expected_time=expected_time,
        token=token,
        kept={
            "competition_id": config["competition_id"],
            "project_id": config["project_id"],
            "user_id": config["user_id"],
            "expected_time": expected_time,
        },
    )


def _seconds(value: object, most: float) -> float:
    """Seconds from a number, or from text that is one. Raises ValueError with a sentence."""
    rule = f"must be a number of seconds from 1 to {most:g}"
    if isinstance(value, str) and len(value) <= 20:
        try:
            value = float(value) if value.isascii() and "_" not in value else None
        except ValueError:
            raise ValueError(rule) from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(rule)
    if not 1 <= value <= most:  # false for NaN as well
        raise ValueError(rule)
    return float(value)
