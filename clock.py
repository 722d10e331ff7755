"""Wall-clock instants as integers (microseconds since 1970 UTC) and as text. May import nothing of the project.

Instants are for people and for ordering rows; durations are always measured with `time.monotonic()`.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from functools import lru_cache

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def now_us() -> int:
    """This instant in microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def to_datetime(instant_us: int) -> datetime:
    """The instant as an aware UTC datetime."""
    return EPOCH + timedelta(microseconds=instant_us)


def iso(instant_us: int | None) -> str | None:
    """ISO 8601 in UTC with `Z` and microseconds, or None."""
    if instant_us is None:
        return None
    seconds, microseconds = divmod(instant_us, 1_000_000)
    return f"{_second(seconds)}.{microseconds:06}Z"


@lru_cache(maxsize=256)  # most answers tell of the same few
def _second(seconds: int) -> str:
    return (EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")


def file_stamp(instant_us: int) -> str:
    """`YYYYMMDD_HHMMSS` in UTC, as used in the names of result files."""
    return to_datetime(instant_us).strftime("%Y%m%d_%H%M%S")
