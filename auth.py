"""Who is calling: tokens are looked up by keyed digest, at every request, so that revoking works at once everywhere.

May import `errors`, `clock`, `models`, `database`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Integer, Row, Select, bindparam, column, func, select, update

import clock
from database import Database, Prepared, Transaction
from errors import ConfigurationError, DatabaseError, Unauthenticated
from models import tokens

# 1-64 characters, not starting with "." or "-" (api.md); used for user, competition and project ids.
ID_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")
MAX_TOKEN_LENGTH = 256
IDS_AT_ONCE = 500  # in one statement
LAST_USED_RESOLUTION = 60.0  # seconds; one write per token and minute at most
NOTED_AFTER = 0.5  # seconds


def is_id(text: object) -> bool:
    """Whether this is a legal user, competition or project id."""
    return isinstance(text, str) and _ID.match(text) is not None


class Caller(NamedTuple):
    """Someone whose token is valid now."""

    token_id: int
    user_id: str
    is_admin: bool
    expires_at: int  # of the token; microseconds

    @property
    def actor(self) -> str:
        """How the caller is named in events."""
        return f"{'admin' if self.is_admin else 'user'}:{self.user_id}"

    def may_see(self, user_id: str) -> bool:
        """Owners see their own jobs, admins all."""
        return self.is_admin or self.user_id == user_id


class TokenDigest:
    """HMAC-SHA256 under a key that only this file system holds: a stolen database reveals no token."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod=hashlib.sha256)

    @classmethod
    def from_file(cls, path: Path) -> TokenDigest:
        """Read the key, or make it at first use (mode 0600). Raises ConfigurationError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            if not path.exists():
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.write(handle, secrets.token_hex(32).encode() + b"\n")
                    os.fsync(handle)
                finally:
                    os.close(handle)
                try:
                    os.link(temporary, path)  # the first of two processes wins, the other reads its key
                except FileExistsError:
                    pass
                finally:
                    temporary.unlink()
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            key = path.read_bytes().strip()
        except OSError as error:
            raise ConfigurationError(f"TOKEN_KEY_FILE: {path} cannot be used: {error.strerror}.") from None
        if len(key) < 32:
            raise ConfigurationError(
                f"TOKEN_KEY_FILE: {path} holds no key of at least 32 characters. Restore it from a backup; a new key "
                "makes all tokens invalid."
            )
        return cls(key)

    def of(self, token: str) -> bytes:
        """The 32 bytes that stand for the token in the database."""
        digest = self._keyed.copy()
        digest.update(token.encode("utf-8", "surrogatepass"))
        return digest.digest()


_BY_DIGEST = Prepared(
    select(tokens.c.id, tokens.c.user_id, tokens.c.is_admin, tokens.c.expires_at, tokens.c.revoked_at).where(
        tokens.c.digest == bindparam("wanted")
    )
)
_NOTE_USE = (
    update(tokens)
    .where(tokens.c.id.in_(select(column("value", Integer)).select_from(func.json_each(bindparam("token_ids")))))
    .values(last_used_at=bindparam("now"))
)

# Of each user the active token comes last, behind those that were revoked; of these the newest last.
_OF_USERS: Select[Any] = (
    select(
        *(tokens.c.user_id, tokens.c.is_admin, tokens.c.created_at, tokens.c.expires_at),
        *(tokens.c.revoked_at, tokens.c.last_used_at),
    )
    .where(tokens.c.user_id.in_(bindparam("wanted", expanding=True)))
    .order_by(tokens.c.user_id, tokens.c.revoked_at.is_(None), tokens.c.created_at, tokens.c.id)
)


class Authenticator:
    """Looks tokens up and keeps, coarsely, when each was last used."""

    def __init__(self, database: Database, digest: TokenDigest) -> None:
        self._database = database
        self._digest = digest
        self._last_noted: dict[int, float] = {}
        self._to_note: list[int] = []
        self._noting = threading.Lock()

    def caller(self, token: str) -> Caller:
        """The caller with this token. Raises Unauthenticated with the reason: unknown, revoked or expired."""
        if not token or len(token) > MAX_TOKEN_LENGTH:
            raise self.refusal("The token is unknown.")
        with self._database.reading() as connection:
            row = _BY_DIGEST.first(connection, {"wanted": self._digest.of(token)})
        if row is None:
            raise self.refusal("The token is unknown.")
        if row.revoked_at is not None:
            raise self.refusal("The token was revoked. Ask an administrator for a new one.")
        now = clock.now_us()
        if row.expires_at <= now:
            raise self.refusal(f"The token expired at {clock.iso(row.expires_at)}. Ask an administrator for a new one.")
        self._note_use(row.id)
        return Caller(row.id, row.user_id, bool(row.is_admin), row.expires_at)

    def valid(self, token_ids: Collection[int]) -> dict[int, bool]:
        """Those of the tokens that are valid now, and whether each is an admin's."""
        found = {}
        wanted = list(token_ids)
        with self._database.reading() as connection:
            for start in range(0, len(wanted), IDS_AT_ONCE):
                some = wanted[start : start + IDS_AT_ONCE]
                statement = select(tokens.c.id, tokens.c.is_admin).where(
                    tokens.c.id.in_(some), tokens.c.revoked_at.is_(None), tokens.c.expires_at > clock.now_us()
                )
                found.update({row.id: bool(row.is_admin) for row in connection.execute(statement)})
        return found

    def users_page(self, after: str | None, limit: int) -> list[Row[Any]]:
        """The token that counts of each user behind `after`, in the order of their ids: the active one, or the last."""
        users = select(tokens.c.user_id).distinct().order_by(tokens.c.user_id).limit(limit)
        if after is not None:
            users = users.where(tokens.c.user_id > after)
        with self._database.reading() as connection:
            wanted = [row.user_id for row in connection.execute(users)]
            # Of a user's rows the last one stays.
            found: dict[str, Row[Any]] = {row.user_id: row for row in connection.execute(_OF_USERS, {"wanted": wanted})}
        return [found[user_id] for user_id in wanted if user_id in found]

    @staticmethod
    def refusal(detail: str) -> Unauthenticated:
        """A 401 with the challenge RFC 6750 asks for."""
        return Unauthenticated(detail, headers={"WWW-Authenticate": 'Bearer realm="gpu-job-server"'})

    def _note_use(self, token_id: int) -> None:
        tick = time.monotonic()
        if tick - self._last_noted.get(token_id, -LAST_USED_RESOLUTION) < LAST_USED_RESOLUTION:
            return
        self._last_noted[token_id] = tick  # bounded by the number of tokens that exist
        with self._noting:
            self._to_note.append(token_id)
            if len(self._to_note) > 1:
                return
        # One write for all who come within a moment: many users at once must not double the writes.
        timer = threading.Timer(NOTED_AFTER, self._write_notes)
        timer.daemon = True
        timer.start()

    def _write_notes(self) -> None:
        with self._noting:
            noted, self._to_note = self._to_note, []
        parameters = {"token_ids": json.dumps(noted), "now": clock.now_us()}

        def write(transaction: Transaction) -> None:
            transaction.connection.execute(_NOTE_USE, parameters)

        with contextlib.suppress(DatabaseError):  # the server has stopped
            self._database.send(write)
