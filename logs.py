"""The server's log: readable lines, or one JSON object a line, with the request, job and node that a line is about.

May import nothing of the project.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)


def about(**fields: str | None) -> None:
    """Add `request_id`, `job_id` or `node` to every further JSON line of this thread or task; None takes it away."""
    now = {**(_about.get() or {}), **fields}
    _about.set({name: value for name, value in now.items() if value is not None})


# Everything that could begin a line of its own or talk to a terminal: C0, DEL, C1, and the two line ends of Unicode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class TextLines(logging.Formatter):
    """A line to read. Control characters of what is told are escaped, so nobody's text can forge a line or a colour;
    only a stack has lines of its own, each of them indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """logging."""
        return _escaped(super().formatMessage(record))

    def formatException(self, exception: Any) -> str:
        """logging."""
        return "\n".join(f"    {_escaped(line)}" for line in super().formatException(exception).split("\n"))


class JsonLines(logging.Formatter):
    """A line as `{"time", "level", "logger", "message", …}`; `time` in UTC, `exception` with its stack where there is
    one."""

    def format(self, record: logging.LogRecord) -> str:
        """logging."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_about.get() or {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(level: str, log_format: str = "text") -> None:
    """Log to stderr from `level` on, as `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
