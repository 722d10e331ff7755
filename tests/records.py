"""What a server's database says, read beside it; and users, made without a run of the command line for each."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from auth import TokenDigest
from database import Database
from tests.ledger import replay
from tests.server import Server
from token_manager import TokenManager, strong_token


def database_of(server: Server) -> Path:
    """The server's SQLite file."""
    return Path(server.settings["DATABASE_URL"].removeprefix("sqlite:///"))


def make_users(server: Server, *users: str, admin: str | None = None) -> Server:
    """A token for each, as `token_manager.py create` makes it; before the server's start, or while it runs."""
    database = Database(server.settings["DATABASE_URL"])
    try:
        manager = TokenManager(database, TokenDigest.from_file(Path(server.settings["TOKEN_KEY_FILE"])))
        for user_id in (*users, *([admin] if admin is not None else [])):
            server.tokens[user_id] = strong_token()
            manager.create(user_id, server.tokens[user_id], is_admin=user_id == admin)
    finally:
        database.close()
    return server


def rows(source: Server | Path, query: str, *values: Any) -> list[sqlite3.Row]:
    """What a database says."""
    path = source if isinstance(source, Path) else database_of(source)
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(query, values).fetchall()


def job_row(server: Server, job_id: str) -> sqlite3.Row:
    """The job's row."""
    (row,) = rows(server, "SELECT * FROM jobs WHERE job_id = ?", job_id)
    return row


def events_of(server: Server, job_id: str, name: str = "%") -> list[sqlite3.Row]:
    """The job's events, or those of that name, oldest first."""
    query = (
        "SELECT job_events.* FROM job_events JOIN jobs ON seq = job_seq WHERE job_id = ? AND event LIKE ? ORDER BY id"
    )
    return rows(server, query, job_id, name)


def assert_story(server: Server, job_id: str) -> None:
    """The events of a job that has ended make sense as a whole."""
    assert replay(events_of(server, job_id)) == []


def finished(server: Server, job_id: str, user_id: str) -> dict[str, Any]:
    """The job's results, once it has ended."""
    server.wait_for(job_id, user_id, timeout=60)
    return server.results(job_id, user_id)
