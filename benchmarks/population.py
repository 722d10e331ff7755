"""Many users and many jobs, put into a database before its server starts: what a year of use leaves there.

What is in it is made once in a run and copied for each server.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from auth import TokenDigest
from benchmarks.load import MARK
from benchmarks.servers import UNLIMITED, MeasuredServer, Run
from tests.server import wait_until

DAY_US = 86_400_000_000
NODES = 8
USERS = 500
TOKEN = f"token-of-user-{MARK}"
USER = f"user-{MARK}"

_ENDED = """
INSERT INTO jobs (job_id, user_id, competition_id, project_id, expected_time, time_limit, state, slot, epoch, attempt,
    node_id, created_at, started_at, completed_at, exit_code, failure_reason, message, result_file, result_bytes,
    result_sha256, request_digest, request_id)
WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :end)
SELECT lower(hex(randomblob(16))), printf('past-%05d', n % 10000), printf('comp-%d', n % 20), 'proj', 60, 120,
    CASE WHEN n % 10 THEN 'completed' ELSE 'failed' END, 0, 1, 1, printf('local-%d', 1 + n % 8), :now, :now, :now,
    n % 10 = 0, CASE WHEN n % 10 THEN NULL ELSE 'exit_code' END, 'Completed.', printf('past_%d.jsonl', n), 20,
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855', x'', 'request'
FROM numbers
"""
_PENDING = """
INSERT INTO jobs (job_id, user_id, competition_id, project_id, expected_time, time_limit, state, slot, created_at,
    request_digest, request_id)
WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :end)
SELECT lower(hex(randomblob(16))), printf('waiting-%07d', n), 'comp', 'proj', 60, 120, 'pending', 0, :now, x'',
    'request'
FROM numbers
"""


@contextlib.contextmanager
def filled(
    run: Run,
    *,
    users: int = USERS,
    ended: int = 0,
    pending: int = 0,
    busy: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Iterator[MeasuredServer]:
    """A server of its own with so many users with tokens, and so many jobs; `busy`: what is submitted waits."""
    server = MeasuredServer({**UNLIMITED, "SANDBOX": "off", **(settings or {})})
    with contextlib.ExitStack() as things:
        things.push(server)
        made = run.folder / f"{users}-{ended}"
        if not made.is_dir():
            populate(server, users=users, ended=ended)
            made.mkdir()
            copy(server.folder, made)
        else:
            copy(made, server.folder)
        server.start()
        if busy:
            keep_busy(server)
        if pending:
            assert busy, "a node would take the jobs, which have no code"
            server.terminate()
            add_pending(server, pending)
            server.start()
        yield server


def keep_busy(server: MeasuredServer) -> None:
    """Have every node run a job without end."""
    for number in range(NODES):
        server.submit(f"busy-{number}", "import time\ntime.sleep(100000)\n", expected_time=86400)
    wait_until(lambda: server.get("/api/nodes").json()["running_jobs"] == NODES, 60, "eight running jobs")


def copy(source: Path, target: Path) -> None:
    """The database and the key of its tokens."""
    for name in ("database.db", "token.key"):
        shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def inserting(server: MeasuredServer) -> Iterator[tuple[sqlite3.Connection, int]]:
    """One transaction in the database of a server that does not run, and the time now, in microseconds."""
    with closing(sqlite3.connect(server.folder / "database.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -400000")
        connection.execute("BEGIN IMMEDIATE")
        yield connection, time.time_ns() // 1000
        connection.execute("COMMIT")


def add_pending(server: MeasuredServer, number: int) -> None:
    """Users who wait, with a job each."""
    with inserting(server) as (connection, now):
        connection.execute(_PENDING, {"end": number, "now": now})


def populate(server: MeasuredServer, *, users: int, ended: int) -> None:
    """Make the database, before the server's first start."""
    with server.database():
        digest = TokenDigest.from_file(server.token_key)
    with inserting(server) as (connection, now):
        connection.executemany(
            "INSERT INTO tokens (digest, user_id, is_admin, created_at, expires_at) VALUES (?, ?, 0, ?, ?)",
            (
                (
                    digest.of(TOKEN.replace(MARK, f"{number:07d}")),
                    USER.replace(MARK, f"{number:07d}"),
                    now,
                    now + 30 * DAY_US,
                )
                for number in range(1, users + 1)
            ),
        )
        if ended:
            connection.execute(_ENDED, {"end": ended, "now": now})
