#!/usr/bin/env python3
"""Create, list and revoke tokens: the administrator's command line, and the rules behind it.

    python3 token_manager.py create alice alice_token [--admin] [--days N]
    python3 token_manager.py create alice              # makes a strong token and prints it once
    python3 token_manager.py list [--json]
    python3 token_manager.py revoke alice_token        # or: revoke --user alice
    python3 token_manager.py audit [--limit N] [--json]

Works while the server runs; a revoked token is refused from the next request on. Exit code 0 done, 1 refused, 2 usage.
May import `errors`, `clock`, `config`, `models`, `database`, `audit`, `auth`.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select, update

import audit
import clock
import config
from auth import MAX_TOKEN_LENGTH, TokenDigest, is_id
from database import Database, Transaction
from errors import JobServerError
from models import tokens

DAY_US = 86_400_000_000
MIN_TOKEN_LENGTH = 4
SHORT_TOKEN = 16
ID_RULE = "1-64 characters of A-Z a-z 0-9 . _ -, not starting with . or -"


class TokenRefused(JobServerError):
    """The token cannot be created or revoked as asked; the message says why."""


@dataclass(frozen=True)
class NewToken:
    """What `create` did: whether the same string was renewed, and whether another token of the user was revoked."""

    user_id: str
    is_admin: bool
    expires_at: int
    renewed: bool
    replaced: bool


class TokenManager:
    """The rules: 30 days at most, one active token per user, a token string bound to its first user for ever."""

    def __init__(self, database: Database, digest: TokenDigest, *, actor: str | None = None) -> None:
        self._database = database
        self._digest = digest
        self._actor = actor or audit.shell_actor()

    def create(
        self, user_id: str, token: str, *, is_admin: bool = False, days: int = config.TOKEN_MAX_DAYS
    ) -> NewToken:
        """Make `token` the user's one active token. Raises TokenRefused."""
        if not is_id(user_id):
            raise TokenRefused(f"The user id {user_id[:80]!r} is not valid: {ID_RULE}.")
        if not 1 <= days <= config.TOKEN_MAX_DAYS:
            raise TokenRefused(f"A token lives 1 to {config.TOKEN_MAX_DAYS} days; {days} is not possible.")
        self._check_string(token)
        digest = self._digest.of(token)

        def write(transaction: Transaction) -> NewToken:
            connection = transaction.connection
            now = clock.now_us()
            expires = now + days * DAY_US
            known = connection.execute(select(tokens).where(tokens.c.digest == digest)).first()
            if known is not None and known.user_id != user_id:
                raise TokenRefused("This token string belongs, or once belonged, to another user. Choose another one.")
            if known is not None and known.revoked_reason == "revoked":
                raise TokenRefused("This token was revoked and stays so. Choose another one.")
            replaced = connection.execute(
                update(tokens)
                .where(tokens.c.user_id == user_id, tokens.c.revoked_at.is_(None), tokens.c.digest != digest)
                .values(revoked_at=now, revoked_reason="replaced")
            ).rowcount
            values = {"is_admin": is_admin, "created_at": now, "expires_at": expires}
            role = "admin" if is_admin else "user"
            detail = f"{role}, {days} days" + (", replaces a former one" if replaced else "")
            audit.record(transaction, self._actor, audit.TOKEN_CREATED, user_id, detail=detail)
            if known is None:
                connection.execute(insert(tokens).values(digest=digest, user_id=user_id, **values))
            else:
                connection.execute(
                    update(tokens).where(tokens.c.id == known.id).values(revoked_at=None, revoked_reason=None, **values)
                )
            return NewToken(user_id, is_admin, expires, known is not None, bool(replaced))

        return self._database.write(write)

    @staticmethod
    def _check_string(token: str) -> None:
        if not MIN_TOKEN_LENGTH <= len(token) <= MAX_TOKEN_LENGTH:
            raise TokenRefused(f"A token has {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} characters.")
        if not all("!" <= character <= "~" for character in token):
            raise TokenRefused("A token has printable ASCII characters only, and no spaces.")

    def rows(self) -> list[Row[Any]]:
        """Every token ever made, newest first; none holds the token itself."""
        with self._database.reading() as connection:
            return list(connection.execute(select(tokens).order_by(tokens.c.id.desc())))

    def revoke(self, *, token: str | None = None, user_id: str | None = None) -> str:
        """Revoke by the token or by its user; returns the user id. Raises TokenRefused when there is none."""

        def write(transaction: Transaction) -> str:
            match = tokens.c.digest == self._digest.of(token) if token is not None else tokens.c.user_id == user_id
            if token is not None:
                # A replaced token is marked as well, so that it cannot be made active again.
                match = match & ((tokens.c.revoked_reason.is_(None)) | (tokens.c.revoked_reason == "replaced"))
            else:
                match = match & tokens.c.revoked_at.is_(None)
            row = transaction.connection.execute(
                update(tokens)
                .where(match)
                .values(revoked_at=clock.now_us(), revoked_reason="revoked")
                .returning(tokens.c.user_id)
            ).first()
            if row is None:
                raise TokenRefused("There is no such token, or it was revoked already.")
            audit.record(transaction, self._actor, audit.TOKEN_REVOKED, row.user_id)
            return str(row.user_id)

        return self._database.write(write)


def strong_token() -> str:
    """A token that nobody guesses and that no command line takes for an option."""
    while (token := secrets.token_urlsafe(32)).startswith("-"):
        pass
    return token


def state_of(row: Row[Any], now: int) -> str:
    """`active`, `expired`, `revoked` or `replaced`."""
    if row.revoked_reason is not None:
        return str(row.revoked_reason)
    return "expired" if row.expires_at <= now else "active"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token_manager.py", description="Tokens of the GPU job server.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a user's token; a former one of the user is revoked")
    create.add_argument("user_id", help=ID_RULE)
    create.add_argument("token", nargs="?", help="the token; without it a strong one is made and printed once")
    create.add_argument("--admin", action="store_true", help="the user sees and cancels all jobs")
    create.add_argument("--days", type=int, default=config.TOKEN_MAX_DAYS, help="life in days, 1 to 30 (default 30)")
    listing = commands.add_parser("list", help="all tokens: user, role, created, expires, state, last used")
    listing.add_argument("--json", action="store_true", help="one JSON object per line")
    revoke = commands.add_parser("revoke", help="make a token invalid at once and for ever")
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("token", nargs="?", help="the token itself")
    which.add_argument("--user", help="the user whose active token is meant")
    trail = commands.add_parser("audit", help="who made and revoked tokens, drained nodes, cancelled others' jobs, …")
    trail.add_argument("--limit", type=int, default=50, help="how many entries, newest first (default 50)")
    trail.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def _print_list(rows: list[Row[Any]], as_json: bool) -> None:
    now = clock.now_us()
    entries = [
        {
            "user_id": row.user_id,
            "role": "admin" if row.is_admin else "user",
            "created_at": clock.iso(row.created_at),
            "expires_at": clock.iso(row.expires_at),
            "state": state_of(row, now),
            "last_used_at": clock.iso(row.last_used_at),
        }
        for row in rows
    ]
    if as_json:
        for entry in entries:
            print(json.dumps(entry))
        return
    if not entries:
        print("No tokens yet. Make one with: python3 token_manager.py create USER")
        return
    table = [["USER", "ROLE", "CREATED", "EXPIRES", "STATE", "LAST USED"]]
    for entry in entries:
        short = {key: (value or "never")[:19].replace("T", " ") for key, value in entry.items()}
        table.append([entry["user_id"] or "", *[short[key] for key in list(entry)[1:]]])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_audit(database: Database, limit: int, as_json: bool) -> None:
    entries = [audit.entry(row) for row in audit.page(database, before_id=None, limit=max(1, limit))]
    if as_json:
        for entry in entries:
            print(json.dumps(entry))
        return
    if not entries:
        print("Nothing yet.")
    for entry in entries:
        extra = " ".join(entry[name] for name in ("detail", "address") if entry[name])
        print(
            f"{entry['time'][:19].replace('T', ' ')}  {entry['actor']}  {entry['action']}  {entry['subject']}  {extra}"
        )


def _run(arguments: argparse.Namespace, database: Database, manager: TokenManager) -> None:
    if arguments.command == "audit":
        _print_audit(database, arguments.limit, arguments.json)
    elif arguments.command == "create":
        token = arguments.token if arguments.token is not None else strong_token()
        made = manager.create(arguments.user_id, token, is_admin=arguments.admin, days=arguments.days)
        role = "admin" if made.is_admin else "user"
        verb = "renewed" if made.renewed else "created"
        print(f"Token for {made.user_id} ({role}) {verb}; it expires at {clock.iso(made.expires_at)}.")
        if made.replaced:
            print("The user's former token is revoked.")
        if arguments.token is None:
            print(f"Token, shown only now: {token}")
        elif len(token) < SHORT_TOKEN:
            print(
                f"Note: a token of {len(token)} characters can be guessed; leave it out to get a strong one.",
                file=sys.stderr,
            )
    elif arguments.command == "list":
        _print_list(manager.rows(), arguments.json)
    else:
        user_id = manager.revoke(token=arguments.token, user_id=arguments.user)
        print(f"The token of {user_id} is revoked.")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        settings = config.settings()
        digest = TokenDigest.from_file(settings.token_key_file)
        database = Database(settings.database_url)
        try:
            _run(arguments, database, TokenManager(database, digest))
        finally:
            database.close()
    except JobServerError as error:
        print(f"token_manager.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
