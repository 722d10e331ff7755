"""Who is calling: tokens are looked up by keyed digest, at every request, so that revoking works at once everywhere.

May import `errors`, `clock`, `models`, `database`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import bindparam, select, update

import clock
from database import Database, Transaction
from errors import ConfigurationError, Unauthenticated
from models import tokens

# 1-64 characters, not starting with "." or "-" (api.md); used for user, competition and project ids.
ID_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")
MAX_TOKEN_LENGTH = 256
LAST_USED_RESOLUTION = 60.0  # seconds; one write per token and minute at most


def is_id(text: object) -> bool:
    """Whether this is a legal user, competition or project id."""
    return isinstance(text, str) and _ID.match(text) is not None


@dataclass(frozen=True)
class Caller:
    """Someone whose token is valid now."""

    token_id: int
    user_id: str
    is_admin: bool

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
        self._key = key

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
        return hmac.new(self._key, token.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


_BY_DIGEST = select(tokens.c.id, tokens.c.user_id, tokens.c.is_admin, tokens.c.expires_at, tokens.c.revoked_at).where(
    tokens.c.digest == bindparam("wanted")
)


class Authenticator:
    """Looks tokens up and keeps, coarsely, when each was last used."""

    def __init__(self, database: Database, digest: TokenDigest) -> None:
        self._database = database
        self._digest = digest
        self._last_noted: dict[int, float] = {}

    def caller(self, token: str) -> Caller:
        """The caller with this token. Raises Unauthenticated with the reason: unknown, revoked or expired."""
        if not token or len(token) > MAX_TOKEN_LENGTH:
            raise self.refusal("The token is unknown.")
        with self._database.reading() as connection:
            row = connection.execute(_BY_DIGEST, {"wanted": self._digest.of(token)}).first()
        if row is None:
            raise self.refusal("The token is unknown.")
        if row.revoked_at is not None:
            raise self.refusal("The token was revoked. Ask an administrator for a new one.")
        now = clock.now_us()
        if row.expires_at <= now:
            raise self.refusal(f"The token expired at {clock.iso(row.expires_at)}. Ask an administrator for a new one.")
        self._note_use(row.id, now)
        return Caller(row.id, row.user_id, bool(row.is_admin))

    @staticmethod
    def refusal(detail: str) -> Unauthenticated:
        """A 401 with the challenge RFC 6750 asks for."""
        return Unauthenticated(detail, headers={"WWW-Authenticate": 'Bearer realm="gpu-job-server"'})

    def _note_use(self, token_id: int, now: int) -> None:
        tick = time.monotonic()
        if tick - self._last_noted.get(token_id, -LAST_USED_RESOLUTION) < LAST_USED_RESOLUTION:
            return
        self._last_noted[token_id] = tick  # bounded by the number of tokens that exist

        def write(transaction: Transaction) -> None:
            transaction.connection.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_at=now))

        self._database.send(write)
