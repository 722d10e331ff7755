"""Limits in time: submissions per user (slowapi), refused tokens per client address (limits).

Counts live in this process's memory: after a restart the windows are empty. The limit of active jobs per user does
not live here; it is a constraint of the database.

May import `errors`.
"""

from __future__ import annotations

import inspect
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import lru_cache
from itertools import islice
from typing import Any

from fastapi import Request
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.storage.memory import Entry
from limits.strategies import SlidingWindowCounterRateLimiter
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded

from errors import TooManyRequests

KNOWN_CALLERS_MOST = 10_000
REFUSALS_COUNT = 120.0  # seconds: a sliding window of a minute looks at this one and the one before


class MovingWindows(MemoryStorage):
    """Storage in memory for moving windows, used by one thread.

    That of `limits` starts a thread at a hit, which walks through all keys. Here each hit forgets up to two keys whose
    window is over, so there are hardly more than were used within one.
    """

    STORAGE_SCHEME = ("moving-windows",)  # type: ignore[assignment]

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Whether `amount` more hits fit into the last `expiry` seconds; if so they are counted."""
        over = time.time() - expiry
        entries = self.events.pop(key, [])  # newest first; the key used last is the last one
        admitted = amount <= limit and (len(entries) <= limit - amount or entries[limit - amount].atime < over)
        if admitted:
            entries[:0] = [Entry(expiry)] * amount
            del entries[limit:]
        if entries:
            self.events[key] = entries
        for known in list(islice(self.events, 2)):
            if self.events[known][0].atime < over:
                del self.events[known]
        return admitted


class SubmitLimiter:
    """At most N submissions of one user in any 60 seconds (a moving window has no edges to exploit).

    Who has made none for a minute is forgotten, so memory is bounded by the users of a minute.
    """

    def __init__(self, per_minute: int) -> None:
        self._limiter = Limiter(
            key_func=_user_of, strategy="moving-window", storage_uri=f"{MovingWindows.STORAGE_SCHEME[0]}://"
        )
        self._item: RateLimitItem = RateLimitItemPerMinute(per_minute)
        self._admit: Callable[..., Awaitable[None]] = self._limiter.limit(f"{per_minute}/minute")(_admitted)

    async def admit(self, request: Request) -> dict[str, str]:
        """Count one submission of `request.state.user_id`; returns the `X-RateLimit-*` headers.

        Raises TooManyRequests with Retry-After and those headers.
        """
        try:
            await self._admit(request=request)
        except RateLimitExceeded:
            headers, wait = self._headers(request)
            raise TooManyRequests(
                f"Rate limit exceeded: {self._item.amount} submissions per minute. Try again in {wait} seconds.",
                limit="submit_rate",
                retry_after=wait,
                headers=headers,
            ) from None
        return self._headers(request)[0]

    def _headers(self, request: Request) -> tuple[dict[str, str], int]:
        item, keys = request.state.view_rate_limit
        reset_at, remaining = self._limiter.limiter.get_window_stats(item, *keys)
        wait = max(1, math.ceil(reset_at - time.time()))
        headers = {
            "X-RateLimit-Limit": str(item.amount),
            "X-RateLimit-Remaining": str(max(0, remaining)),
            "X-RateLimit-Reset": str(math.ceil(reset_at)),
        }
        return headers, wait


def _user_of(request: Request) -> str:
    return str(request.state.user_id)


# slowapi looks at it at every request.
_user_of.__signature__ = inspect.signature(_user_of)  # type: ignore[attr-defined]


async def _admitted(request: Request) -> None:
    """What slowapi guards; the limit itself is the point."""


@lru_cache(maxsize=KNOWN_CALLERS_MOST)
def address_key(host: str) -> str:
    """The address that refusals are counted for: IPv6 clients own a /64, so that counts as one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class LoginLimiter:
    """Slows the guessing of tokens: after N refusals in a minute an address gets 429 for every token that did not
    already work from there, so users behind the same address go on."""

    def __init__(self, per_minute: int) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())  # its keys expire by themselves
        self._item = RateLimitItemPerMinute(per_minute)
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._refused_at = -math.inf  # the last one; monotonic
        self.refused = 0

    def failed(self, host: str) -> bool:
        """Count a refused token; True when it is worth a line in the audit log: the first of an address within a
        minute, and the one that uses up its limit. Ten thousand guesses must not make ten thousand rows."""
        self.refused += 1
        self._refused_at = time.monotonic()
        key = address_key(host)
        within = self._limiter.hit(self._item, key)
        left = self._limiter.get_window_stats(self._item, key).remaining
        return within and left in (0, self._item.amount - 1)

    def check(self, host: str, token_id: int | None) -> None:
        """Raise TooManyRequests when the address is over its limit and the token is not known to work there.

        `token_id` is that of a valid token, None for a refused one.
        """
        key = address_key(host)
        if token_id is not None and (key, token_id) in self._known:
            self._known.move_to_end((key, token_id))
            return
        quiet = time.monotonic() - self._refused_at > REFUSALS_COUNT
        if not quiet and not self._limiter.test(self._item, key):
            reset_at = self._limiter.get_window_stats(self._item, key).reset_time
            wait = max(1, math.ceil(reset_at - time.time()))
            raise TooManyRequests(
                f"Too many refused tokens from your address. Try again in {wait} seconds.",
                limit="login",
                retry_after=wait,
            )
        if token_id is not None:
            self._known[key, token_id] = None
            if len(self._known) > KNOWN_CALLERS_MOST:
                self._known.popitem(last=False)

    def stats(self) -> dict[str, Any]:
        """Refusals so far, and how many callers are known."""
        return {"refused": self.refused, "known": len(self._known)}
