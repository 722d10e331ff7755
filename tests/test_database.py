"""The database: its schema, the one write path, readers, locks between processes, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import bindparam, create_engine, event, insert, select, text, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import IntegrityError, OperationalError

import models
import sqlite_files
from database import (
    CHANGES_IN_WAL,
    GROUP_COMMIT_MOST,
    MIGRATIONS,
    Database,
    Prepared,
    Together,
    Transaction,
    sqlite_version_warning,
)
from errors import DatabaseError, DatabaseInUse, SchemaTooNew
from tests.server import PROJECT, Server, wait_until

T = TypeVar("T")
WITHIN = 60.0  # seconds that nothing here may take


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    """A server's database, its writer running."""
    opened = Database(url_of(path), server=True)
    opened.start()
    yield opened
    opened.close()


def put(name: str, value: str = "") -> Callable[[Transaction], str]:
    """A write that adds a row to `meta` and gives its name back."""

    def write(transaction: Transaction) -> str:
        transaction.connection.execute(insert(models.meta).values(name=name, value=value))
        return name

    return write


def stored(path: Path, prefix: str = "") -> list[str]:
    """The names in `meta` in the order of their insertion, as another process sees them."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name FROM meta WHERE name LIKE ? ORDER BY rowid", (prefix + "%",))
        return [row[0] for row in rows if row[0] != "instance_id"]


class Held:
    """A write that stays inside its transaction until it is let go."""

    def __init__(self, database: Database, write: Callable[[Transaction], Any] | None = None) -> None:
        self._inside = threading.Event()
        self._go = threading.Event()

        def held(transaction: Transaction) -> None:
            if write is not None:
                write(transaction)
            self._inside.set()
            assert self._go.wait(WITHIN)

        self.future = database.send(held)
        assert self._inside.wait(WITHIN)

    def let_go(self) -> None:
        self._go.set()
        self.future.result(WITHIN)


# -- schema --------------------------------------------------------------------------------------------------------


def checks_of(sql: str) -> dict[str, str]:
    """The CHECKs of a CREATE TABLE by name, blanks made one."""
    found = {}
    for match in re.finditer(r"CONSTRAINT (\S+) CHECK \(", sql):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        found[match.group(1)] = " ".join(sql[match.end() : end - 1].split())
    return found


def schema_of(path: Path) -> dict[str, Any]:
    """Everything SQLite knows of the schema, in a form that does not depend on how it was written down."""
    schema: dict[str, Any] = {}
    with closing(sqlite3.connect(path)) as connection:
        objects = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
        for kind, name, _, sql in objects:
            if kind != "table" or name == "alembic_version":
                continue
            schema[name] = {
                "columns": connection.execute(f"PRAGMA table_xinfo({name})").fetchall(),
                "foreign keys": connection.execute(f"PRAGMA foreign_key_list({name})").fetchall(),
                "checks": checks_of(sql),
                "named": sorted(re.findall(r"CONSTRAINT (\S+)", sql)),
                "indexes": {},
            }
            assert len(re.findall(r"\bCHECK\b", sql)) == len(schema[name]["checks"]), f"{name}: a CHECK has no name"
        for kind, name, table, sql in objects:
            if kind == "index" and sql is not None:
                where = re.search(r"\bWHERE\b(.*)", sql, re.DOTALL)
                schema[table]["indexes"][name] = {
                    "unique": sql.startswith("CREATE UNIQUE"),
                    "columns": [row[1:4] for row in connection.execute(f"PRAGMA index_xinfo({name})")],
                    "where": " ".join(where.group(1).split()) if where else None,
                }
            assert kind in ("table", "index", "trigger"), f"{kind} {name}: the comparison does not know these"
    return schema


def triggers_of(path: Path) -> dict[str, str]:
    """The triggers by name; the models do not know them, only migrations make them."""
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))


def alembic(path: Path, run: Callable[[Config], None]) -> None:
    """Run an Alembic command the way `Database` does."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(url_of(path))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        run(config)
    engine.dispose()


def of_models(path: Path) -> Path:
    engine = create_engine(url_of(path))
    models.metadata.create_all(engine)
    engine.dispose()
    return path


def test_the_migrations_build_what_the_models_say(path: Path, tmp_path: Path) -> None:
    Database(url_of(path)).close()
    built, wanted = schema_of(path), schema_of(of_models(tmp_path / "models.db"))
    assert set(built) == set(models.metadata.tables) >= {"meta", "tokens", "jobs", "job_inputs", "job_events", "nodes"}
    for table in wanted:
        for part in wanted[table]:
            assert built[table][part] == wanted[table][part], f"{part} of {table}"
    # What holds the invariants is there at all.
    assert len(built["jobs"]["checks"]) == 7
    assert built["jobs"]["indexes"]["uq_jobs_user_slot"] == {
        "unique": True,
        "columns": [(2, "user_id", 0), (8, "slot", 0), (-1, None, 0)],
        "where": "state IN ('pending', 'running')",
    }
    assert built["jobs"]["indexes"]["uq_jobs_node_running"]["unique"]
    assert built["jobs"]["indexes"]["uq_jobs_node_running"]["where"] == "state = 'running'"


def test_the_comparison_of_schemas_sees_each_kind_of_difference(tmp_path: Path) -> None:
    whole = schema_of(of_models(tmp_path / "whole.db"))
    create = "SELECT sql FROM sqlite_master WHERE name = 'jobs'"
    for number, (old, new) in enumerate(
        (
            ("(state = 'running') = (lease_expires_at IS NOT NULL)", "1"),
            ("'gpu_fault'", "'gpu_fauld'"),
            ("slot INTEGER NOT NULL", "slot INTEGER"),
            ("epoch INTEGER DEFAULT 0", "epoch INTEGER DEFAULT 1"),
            ("CONSTRAINT pk_jobs ", ""),
        )
    ):
        path = Path(shutil.copy(tmp_path / "whole.db", tmp_path / f"changed{number}.db"))
        with closing(sqlite3.connect(path)) as connection:
            sql = connection.execute(create).fetchone()[0]
            assert old in sql
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'jobs'", (sql.replace(old, new),))
            connection.commit()
        assert schema_of(path) != whole, old
    for number, statement in enumerate(
        (
            "DROP INDEX ix_jobs_pending",
            "DROP INDEX uq_jobs_user_slot; CREATE UNIQUE INDEX uq_jobs_user_slot ON jobs (user_id, slot)",
            "DROP INDEX uq_jobs_job_id; CREATE INDEX uq_jobs_job_id ON jobs (job_id)",
            "DROP INDEX ix_jobs_user; CREATE INDEX ix_jobs_user ON jobs (user_id, seq DESC)",
        )
    ):
        path = Path(shutil.copy(tmp_path / "whole.db", tmp_path / f"index{number}.db"))
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(statement)
        assert schema_of(path) != whole, statement


def test_alembic_finds_nothing_to_migrate(path: Path) -> None:
    Database(url_of(path)).close()
    engine = create_engine(url_of(path))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, models.metadata) == []
    engine.dispose()


def test_the_newest_revision_is_the_one_the_code_knows() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [models.SCHEMA_REVISION]


REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]


def test_downgrade_to_nothing_and_up_again(path: Path) -> None:
    Database(url_of(path)).close()
    first = schema_of(path)
    triggers = triggers_of(path)
    alembic(path, lambda config: command.downgrade(config, "base"))
    assert schema_of(path) == triggers_of(path) == {}
    alembic(path, lambda config: command.upgrade(config, "head"))
    assert schema_of(path) == first
    assert triggers_of(path) == triggers
    alembic(path, lambda config: command.downgrade(config, "base"))
    database = Database(url_of(path))  # opening upgrades as well
    assert database.write(put("one")) == "one"
    database.close()
    assert schema_of(path) == first


def test_each_downgrade_undoes_its_upgrade(path: Path) -> None:
    seen: list[Any] = []
    for revision in REVISIONS:
        alembic(path, lambda config, revision=revision: command.upgrade(config, revision))  # type: ignore[misc]
        seen.append((schema_of(path), triggers_of(path)))
    for revision, then in zip(REVISIONS[-2::-1], seen[-2::-1], strict=True):
        alembic(path, lambda config, revision=revision: command.downgrade(config, revision))  # type: ignore[misc]
        assert (schema_of(path), triggers_of(path)) == then, revision


# What an old server may have left; the first schema is never changed again, so these fit for ever.
OLD_ROWS = """
INSERT INTO meta VALUES ('instance_id', 'the instance');
INSERT INTO tokens VALUES (7, x'00ff', 'alice', 1, 1, 2, NULL, NULL, NULL);
INSERT INTO nodes (node_id, jobs_completed) VALUES ('node-1', 5);
INSERT INTO jobs (seq, job_id, user_id, competition_id, project_id, expected_time, time_limit, state, slot, epoch,
    attempt, node_id, owner, lease_expires_at, created_at, request_digest, request_id)
    VALUES (41, 'job', 'alice', 'comp', 'proj', 1.5, 3.0, 'running', 0, 3, 2, 'node-1', 'owner', 9, 8, x'01', 'req');
INSERT INTO job_inputs VALUES (41, '{}', x'7072696e7428290a');
INSERT INTO job_events (id, job_seq, at, event, actor, attempt, epoch) VALUES (99, 41, 1, 'submitted', 'é', 0, 0);
"""
OLD_TABLES = ("meta", "tokens", "nodes", "jobs", "job_inputs", "job_events")


def rows_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of the first schema's tables by the names of its columns."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return {table: [dict(row) for row in connection.execute(f"SELECT * FROM {table}")] for table in OLD_TABLES}


def at_revision(path: Path, revision: str) -> dict[str, list[dict[str, Any]]]:
    """Make the database of an older version with some rows in it."""
    alembic(path, lambda config: command.upgrade(config, revision))
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD_ROWS)
        connection.execute("PRAGMA journal_mode = WAL")
    return rows_of(path)


@pytest.mark.parametrize("server", [True, False], ids=["server", "command line"])
@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_an_older_database_is_upgraded_with_all_it_holds(
    path: Path, tmp_path: Path, revision: str, server: bool
) -> None:
    before = at_revision(path, revision)
    database = Database(url_of(path), server=server)
    assert database.instance_id == "the instance"
    database.close()
    assert schema_of(path) == schema_of(of_models(tmp_path / "models.db"))
    after = rows_of(path)
    for table, rows in before.items():
        kept = [{name: value for name, value in row.items() if name in rows[0]} for row in after[table]]
        assert kept == rows, table
    # The state before is kept beside it.
    assert rows_of(path.with_name(f"{path.name}.before-{models.SCHEMA_REVISION}")) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISIONS[-1],)]


def test_a_command_line_does_not_upgrade_under_a_running_server(path: Path) -> None:
    before = at_revision(path, REVISIONS[0])
    if len(REVISIONS) == 1:
        pytest.skip("there is nothing to upgrade from")
    with sqlite_files.server_lock(path), pytest.raises(DatabaseInUse, match=str(path)):
        Database(url_of(path))
    assert rows_of(path) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISIONS[0],)]


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(path: Path) -> None:
    at_revision(path, REVISIONS[0])
    added = sorted(set(models.metadata.tables) - set(OLD_TABLES))
    if not added:
        pytest.skip("no revision adds a table that could be in the way")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {added[-1]} (in_the_way)")
    before = (schema_of(path), rows_of(path))
    assert "already exists" in refusal(path)
    assert (schema_of(path), rows_of(path)) == before
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP TABLE {added[-1]}")
    Database(url_of(path), server=True).close()


def test_upgrading_twice_changes_nothing(path: Path) -> None:
    database = Database(url_of(path))
    database.write(put("kept"))
    instance = database.instance_id
    database.close()
    first = schema_of(path)
    alembic(path, lambda config: command.upgrade(config, "head"))
    for server in (False, True):
        database = Database(url_of(path), server=server)
        assert database.instance_id == instance
        database.close()
    assert schema_of(path) == first
    assert stored(path) == ["kept"]


def test_the_checks_refuse_rows_that_must_not_be(database: Database) -> None:
    good: dict[str, Any] = {
        **dict.fromkeys(("job_id", "user_id", "competition_id", "project_id", "request_id"), "x"),
        **{"expected_time": 1.0, "time_limit": 2.0, "slot": 0, "created_at": 1, "request_digest": b"x"},
        "state": "pending",
    }
    running: dict[str, Any] = {
        "state": "running",
        "node_id": "n",
        "owner": "o",
        "lease_expires_at": 1,
        "epoch": 1,
        "attempt": 1,
    }
    failed: dict[str, Any] = {"state": "failed", "completed_at": 1, "failure_reason": "timeout"}
    ended: dict[str, Any] = {"state": "completed", "completed_at": 1}

    def add(values: dict[str, Any]) -> None:
        def write(transaction: Transaction) -> None:
            transaction.connection.execute(insert(models.jobs).values(**{**good, **values}))
            transaction.connection.execute(text("DELETE FROM jobs"))

        database.write(write)

    for values in ({}, running, failed, ended, {**ended, "state": "cancelled"}):
        add(values)
    for name, values in (
        ("state", {"state": "weird"}),
        ("ended_has_completed_at", {"completed_at": 1}),
        ("ended_has_completed_at", {"state": "completed"}),
        ("ended_has_completed_at", {**running, "completed_at": 1}),
        ("running_has_lease", {**running, "lease_expires_at": None}),
        ("running_has_lease", {"lease_expires_at": 1}),
        ("running_has_node", {**running, "node_id": None}),
        ("running_has_node", {**running, "owner": None}),
        ("failed_has_reason", {**failed, "failure_reason": None}),
        ("failed_has_reason", {**ended, "failure_reason": "timeout"}),
        ("failure_reason", {**failed, "failure_reason": "bad luck"}),
        ("counters", {"attempt": 1}),
        ("counters", {"attempt": -1}),
        ("counters", {"slot": -1}),
    ):
        with pytest.raises(IntegrityError, match=f"CHECK constraint failed: ck_jobs_{name}"):
            add(values)


# -- two at once, and the wrong file -------------------------------------------------------------------------------


def test_many_openers_of_an_empty_folder_build_one_schema(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            path = tmp_path / str(number) / "deep" / "database.db"
            start = threading.Barrier(8)

            def open_it(who: int, path: Path = path, start: threading.Barrier = start) -> str:
                start.wait(WITHIN)
                database = Database(url_of(path), server=who == 0)
                database.write(put(str(who)))
                database.close()
                return database.instance_id

            assert len(set(pool.map(open_it, range(8)))) == 1
            assert sorted(stored(path)) == [str(who) for who in range(8)]


def test_server_and_token_manager_start_at_once_on_an_empty_folder() -> None:
    server = Server(wait_for_nodes=False)
    words = [sys.executable, str(PROJECT / "token_manager.py"), "create"]
    try:
        users = ("ann", "bob", "eve")
        commands = [
            subprocess.Popen(
                [*words, user, f"token_of_{user}_long_enough"],
                env=server.environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for user in users
        ]
        server.start()
        for running in commands:
            output, _ = running.communicate(timeout=WITHIN)
            assert running.returncode == 0, output.decode()
        for user in users:
            answer = server.get("/api/jobs", headers={"Authorization": f"Bearer token_of_{user}_long_enough"})
            assert answer.status_code == 200, answer.text
        unknown = server.get("/api/jobs", headers={"Authorization": "Bearer token_of_nobody"})
        assert unknown.status_code == 401
    finally:
        server.close()


def test_a_schema_newer_than_the_code_is_left_alone(path: Path) -> None:
    Database(url_of(path)).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = schema_of(path)
    for server in (True, False):
        with pytest.raises(SchemaTooNew, match=rf"{path} has schema 9999.*\({models.SCHEMA_REVISION}\)") as raised:
            Database(url_of(path), server=server)
        assert "newer version" in str(raised.value)
        assert "backup" in str(raised.value)
    assert schema_of(path) == before


def hold_open(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the database as a server."""
    code = """
import sys
from database import Database
held = Database(sys.argv[1], server=True)
print("open", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, url_of(path)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(WITHIN)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def test_a_second_server_is_told_who_is_first(path: Path) -> None:
    process = hold_open(path)
    try:
        with pytest.raises(DatabaseInUse, match=rf"process {process.pid}\) already works on {path}.*DATABASE_URL"):
            Database(url_of(path), server=True)
        # Command lines go on beside the server.
        database = Database(url_of(path))
        database.write(put("beside"))
        database.close()
    finally:
        ended(process)
    # A server that was killed leaves no lock behind.
    database = Database(url_of(path), server=True)
    assert stored(path) == ["beside"]
    with pytest.raises(DatabaseInUse, match=rf"process {os.getpid()}\)"):
        Database(url_of(path), server=True)
    database.close()
    Database(url_of(path), server=True).close()


def unprivileged(function: Callable[[], T]) -> T:
    """What `function` gives in a thread without root's power over file modes."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Half(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))

    libc = ctypes.CDLL(None, use_errno=True)
    header = Header(0x20080522, 0)

    def run() -> T:
        halves = (Half * 2)()
        assert libc.capget(ctypes.byref(header), halves) == 0
        halves[0].effective &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        assert libc.capset(ctypes.byref(header), halves) == 0  # of this thread alone, which ends
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(WITHIN)


def refusal(path: Path, *, server: bool = True) -> str:
    """The sentence with which opening is refused."""
    with pytest.raises(DatabaseError) as raised:
        Database(url_of(path), server=server)
    assert type(raised.value) is DatabaseError
    text = str(raised.value)
    assert str(path) in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "database.db"
    Database(url_of(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "Not a directory" in refusal(tmp_path / "file" / "sub" / "database.db")
    assert "exists" in refusal(tmp_path / "file" / "database.db").lower()


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o500)
    assert "Permission denied" in unprivileged(lambda: refusal(folder / "database.db"))
    folder.chmod(0o700)
    Database(url_of(folder / "database.db")).close()
    folder.chmod(0o500)
    # The database is there, but its write-ahead log cannot be.
    unprivileged(lambda: refusal(folder / "database.db"))
    folder.chmod(0o700)
    Database(url_of(folder / "database.db"), server=True).close()


def test_a_read_only_file_is_named_at_the_start_and_not_at_the_first_write(path: Path) -> None:
    Database(url_of(path)).close()
    path.chmod(0o400)
    for server in (True, False):
        unprivileged(lambda server=server: refusal(path, server=server))  # type: ignore[misc]
    path.chmod(0o600)


def test_a_file_that_is_no_database_is_named_and_left_alone(path: Path) -> None:
    content = b"these are my notes, not a database\n" * 100
    path.write_bytes(content)
    for server in (True, False):
        assert "not a database" in refusal(path, server=server)
    assert path.read_bytes() == content
    path.unlink()
    Database(url_of(path), server=True).close()  # the refusals left no lock behind


def test_a_folder_in_place_of_the_file_is_named(path: Path) -> None:
    path.mkdir()
    refusal(path)


def test_the_warning_names_only_versions_with_the_bug() -> None:
    for version in ("3.44.6", "3.44.9", "3.50.7", "3.51.3", "3.52.0", "4.0.0"):
        assert sqlite_version_warning(version) is None, version
    for version in ("3.40.1", "3.44.5", "3.45.0", "3.50.6", "3.51.0", "3.51.2"):
        assert version in (sqlite_version_warning(version) or ""), version


# -- writing -------------------------------------------------------------------------------------------------------


def counted(database: Database) -> list[int]:
    """A list whose only element counts the commits from now on."""
    commits = [0]

    def count(_connection: Any) -> None:
        commits[0] += 1

    event.listen(database._engine, "commit", count)
    return commits


def test_the_writer_is_as_durable_as_promised(database: Database, path: Path) -> None:
    def pragmas(transaction: Transaction) -> list[Any]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [transaction.connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert database.write(pragmas) == ["wal", 2, 1]  # 2 is FULL: a commit is on the disk when it is done
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_a_command_line_writes_as_durably(path: Path) -> None:
    database = Database(url_of(path))
    found = database.write(lambda transaction: transaction.connection.exec_driver_sql("PRAGMA synchronous").scalar())
    database.close()
    assert found == 2


def test_waiting_writes_share_one_transaction(database: Database, path: Path) -> None:
    held = Held(database)
    commits = counted(database)
    futures = [database.send(put(f"{number:03}")) for number in range(200)]
    held.let_go()
    assert [future.result(WITHIN) for future in futures] == [f"{number:03}" for number in range(200)]
    assert commits[0] == 2  # the one that was held, and one for all others
    assert stored(path) == [f"{number:03}" for number in range(200)]


def test_concurrent_writers_share_transactions(database: Database, path: Path) -> None:
    commits = counted(database)
    start = threading.Barrier(32)

    def work(who: int) -> None:
        start.wait(WITHIN)
        for number in range(10):
            assert database.write(put(f"{who}-{number}")) == f"{who}-{number}"

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert len(stored(path)) == 320
    assert commits[0] < 160, "one transaction for each or every second write"


def test_a_failing_write_fails_alone(database: Database, path: Path) -> None:
    ran: list[str] = []

    def hinted(name: str) -> Callable[[Transaction], str]:
        def write(transaction: Transaction) -> str:
            transaction.after_commit(lambda: ran.append(name))
            return put(name)(transaction)

        return write

    def broken(transaction: Transaction) -> None:
        put("half")(transaction)
        transaction.after_commit(lambda: ran.append("broken"))
        raise ValueError("no")

    held = Held(database)
    futures: list[Future[Any]] = []
    for number in range(20):
        futures.append(database.send(hinted(f"{number:02}")))
        if number == 5:
            wrong = database.send(broken)
        if number == 12:
            double = database.send(hinted("03"))  # violates the primary key
    held.let_go()
    assert [future.result(WITHIN) for future in futures] == [f"{number:02}" for number in range(20)]
    with pytest.raises(ValueError, match="no"):
        wrong.result(WITHIN)
    with pytest.raises(IntegrityError):
        double.result(WITHIN)
    names = [f"{number:02}" for number in range(20)]
    assert stored(path) == names
    assert ran == names  # each hint once, although the writes ran twice, and none of those that failed


def test_hints_run_after_the_commit_and_before_the_answer(database: Database, path: Path) -> None:
    seen: list[list[str]] = []

    def write(transaction: Transaction) -> None:
        put("there")(transaction)
        transaction.after_commit(lambda: seen.append(stored(path)))

    database.write(write)
    assert seen == [["there"]]


def test_writes_happen_in_the_order_of_their_sending(database: Database, path: Path) -> None:
    names = [f"{number:04}" for number in range(700)]  # more than one transaction takes
    order: list[str] = []
    held = Held(database)
    for name in names:
        database.send(put(name)).add_done_callback(lambda future: order.append(future.result()))
    held.let_go()
    database.write(lambda transaction: None)
    assert stored(path) == names
    assert order == names


def test_the_order_holds_when_one_of_them_fails(database: Database, path: Path) -> None:
    held = Held(database)
    futures = [database.send(put(name)) for name in ("a", "b", "a", "c", "b", "d")]
    held.let_go()
    wait_until(lambda: all(future.done() for future in futures), WITHIN)
    assert [future.exception() is None for future in futures] == [True, True, False, True, False, True]
    assert stored(path) == ["a", "b", "c", "d"]


def test_what_was_confirmed_survives_kill_9(path: Path) -> None:
    code = """
import itertools, sys
from database import Database
from sqlalchemy import insert
import models
database = Database(sys.argv[1], server=True)
database.start()
for number in itertools.count():
    database.write(lambda transaction: transaction.connection.execute(
        insert(models.meta).values(name=f"{number:06}", value="")).rowcount)
    print(f"{number:06}", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, url_of(path)], cwd=PROJECT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        confirmed = [process.stdout.readline().decode().strip() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        confirmed += process.stdout.read().decode().split()
    finally:
        ended(process)
    database = Database(url_of(path), server=True)
    database.close()
    found = stored(path)
    assert found[: len(confirmed)] == confirmed
    assert len(found) <= len(confirmed) + 1  # the one whose answer was under way


def test_a_coroutine_writes_without_blocking_its_loop(database: Database, path: Path) -> None:
    async def scenario() -> None:
        held = Held(database)
        writes = [asyncio.ensure_future(database.write_async(put(f"{number:02}"))) for number in range(50)]
        await asyncio.sleep(0)
        assert not any(write.done() for write in writes)  # and we are here: the loop goes on meanwhile
        gone = asyncio.ensure_future(database.write_async(put("hung up")))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        wrong = asyncio.ensure_future(database.write_async(put("00")))
        await asyncio.get_running_loop().run_in_executor(None, held.let_go)
        assert await asyncio.wait_for(asyncio.gather(*writes), WITHIN) == [f"{number:02}" for number in range(50)]
        with pytest.raises(IntegrityError):
            await asyncio.wait_for(wrong, WITHIN)

    asyncio.run(scenario())
    assert stored(path) == [*(f"{number:02}" for number in range(50)), "hung up"]


def put_all(names: list[str]) -> Callable[[Transaction], list[str | Exception]]:
    """Write the names; one that says so is refused, one that says so makes the write fail."""

    def write(transaction: Transaction) -> list[str | Exception]:
        taken = [name for name in names if not name.startswith("refused")]
        for name in taken:
            put(name)(transaction)
            if name.startswith("broken"):
                raise ValueError(name)
        return [name if name in taken else PermissionError(name) for name in names]

    return write


def test_items_that_come_together_are_written_together(database: Database, path: Path) -> None:
    groups: list[int] = []

    def write_all(names: list[str]) -> Callable[[Transaction], list[str | Exception]]:
        groups.append(len(names))
        return put_all(names)

    async def scenario() -> None:
        together = Together(database, write_all)
        held = Held(database)
        names = [f"{number:03}" for number in range(GROUP_COMMIT_MOST + 50)]
        first = asyncio.ensure_future(together.write("first"))
        while not groups:
            await asyncio.sleep(0)
        writes = [asyncio.ensure_future(together.write(name)) for name in names]
        for _ in range(10):  # turns of the loop
            await asyncio.sleep(0)
        assert groups == [1]  # what comes while a write is under way waits for its end
        await asyncio.get_running_loop().run_in_executor(None, held.let_go)
        assert await asyncio.wait_for(asyncio.gather(first, *writes), WITHIN) == ["first", *names]
        assert groups == [1, GROUP_COMMIT_MOST, 50]
        assert await together.write("last") == "last"

    asyncio.run(scenario())
    assert len(stored(path)) == GROUP_COMMIT_MOST + 52


def test_of_items_that_come_together_each_has_its_own_end(database: Database, path: Path) -> None:
    async def scenario() -> None:
        together = Together(database, put_all)
        names = ["a", "refused", "b", "broken", "c", "hung up"]
        writes = [asyncio.ensure_future(together.write(name)) for name in names]
        await asyncio.sleep(0)
        writes[-1].cancel()
        ends = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), WITHIN)
        kinds = [end if isinstance(end, str) else type(end) for end in ends]
        assert kinds == ["a", PermissionError, "b", ValueError, "c", asyncio.CancelledError]
        assert await together.write("next") == "next"

    asyncio.run(scenario())
    assert stored(path) == ["a", "b", "c", "hung up", "next"]


def test_many_rows_go_in_by_few_statements(database: Database, path: Path) -> None:
    insert_names = Prepared(sqlite_insert(models.meta).on_conflict_do_nothing(), ["name", "value"])

    def rows(first: int, end: int) -> list[dict[str, str]]:
        return [{"value": "", "name": f"{number:03}"} for number in range(first, end)]

    def write(transaction: Transaction) -> list[tuple[int, int]]:
        few = [insert_names.run_rows(transaction.connection, rows(start, end)) for start, end in ((0, 200), (150, 207))]
        return [*few, insert_names.run_rows(transaction.connection, [])]

    (all_in, last), (some_in, _), nothing = database.write(write)
    assert (all_in, some_in, nothing) == (200, 7, (0, 0))
    assert stored(path) == [f"{number:03}" for number in range(207)]
    with closing(sqlite3.connect(path)) as connection:
        assert last == connection.execute("SELECT rowid FROM meta WHERE name = ?", ("199",)).fetchone()[0]


def test_a_prepared_statement_keeps_its_literals_and_gives_what_it_returns(database: Database, path: Path) -> None:
    table = models.meta.c
    rename = Prepared(
        update(models.meta)
        .where(table.name == bindparam("wanted"), table.value == "free")
        .values(value="taken", name=table.name + bindparam("suffix"))
        .returning(models.meta)
    )

    def write(transaction: Transaction) -> list[Any]:
        for name, value in (("a", "free"), ("b", "taken")):
            transaction.connection.execute(insert(models.meta), {"name": name, "value": value})
        found = [rename.first(transaction.connection, {"wanted": name, "suffix": "!"}) for name in ("a", "b", "a")]
        return [*found, rename.run(transaction.connection, {"wanted": "a!", "suffix": ""}).rowcount]

    assert database.write(write) == [("a!", "taken"), None, None, 0]
    assert stored(path) == ["a!", "b"]
    with pytest.raises(KeyError):
        database.write(lambda transaction: rename.first(transaction.connection, {"wanted": "a!"}))


def test_what_is_in_the_wal_is_moved_after_the_answers(database: Database, path: Path) -> None:
    names = [f"{number:04}" for number in range(CHANGES_IN_WAL)]
    for start in range(0, len(names), 100):
        database.write(put_all(names[start : start + 100]))

    def without_the_wal() -> list[str]:
        alone = shutil.copy(path, path.with_name("alone.db"))
        with contextlib.suppress(sqlite3.DatabaseError):  # while it is being moved
            return stored(Path(alone))
        return []

    wait_until(lambda: without_the_wal() == names, WITHIN, "the rows in the file itself")


def test_a_loop_that_ended_does_not_stop_the_writer(database: Database, path: Path) -> None:
    held = Held(database)

    async def leave() -> None:
        task = asyncio.ensure_future(database.write_async(put("left")))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    held.let_go()
    assert database.write(put("next")) == "next"
    assert stored(path) == ["left", "next"]


def test_close_finishes_what_is_queued(path: Path) -> None:
    database = Database(url_of(path), server=True)
    database.start()
    held = Held(database)
    futures = [database.send(put(f"{number:03}")) for number in range(300)]
    closing_it = threading.Thread(target=database.close)
    closing_it.start()
    held.let_go()
    closing_it.join(WITHIN)
    assert not closing_it.is_alive()
    assert all(future.done() for future in futures)
    assert len(stored(path)) == 300


@pytest.mark.parametrize("started", [True, False], ids=["server", "command line"])
def test_a_write_after_close_says_so(path: Path, started: bool) -> None:
    database = Database(url_of(path), server=started)
    if started:
        database.start()
    database.write(put("before"))
    database.close()
    with pytest.raises(DatabaseError, match="closed"):
        database.write(put("after"))
    with pytest.raises(DatabaseError, match="closed"):
        database.send(put("after"))

    async def later() -> None:
        await asyncio.wait_for(database.write_async(put("after")), WITHIN)

    with pytest.raises(DatabaseError, match="closed"):
        asyncio.run(later())
    database.close()  # twice is fine
    assert stored(path) == ["before"]


def test_a_write_during_close_is_done_or_refused_but_never_forgotten(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"{number}.db"
        database = Database(url_of(path), server=True)
        database.start()
        start = threading.Barrier(9)

        def work(
            who: int, database: Database = database, start: threading.Barrier = start
        ) -> list[tuple[str, Future[str]]]:
            sent = []
            start.wait(WITHIN)
            for count in range(10_000):
                try:
                    sent.append((f"{who}-{count}", database.send(put(f"{who}-{count}"))))
                except DatabaseError:
                    break
            return sent

        with ThreadPoolExecutor(8) as pool:
            results = [pool.submit(work, who) for who in range(8)]
            start.wait(WITHIN)
            database.close()
            sent = [entry for result in results for entry in result.result(WITHIN)]
        assert all(future.done() for _, future in sent)
        assert sorted(stored(path)) == sorted(name for name, _ in sent)


def test_a_full_disk_fails_the_writes_and_not_the_writer(database: Database, path: Path) -> None:
    def room(pages: int) -> Callable[[Transaction], Any]:
        # SQLite's own limit on the file gives the very error of a full disk.
        return lambda transaction: transaction.connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar()

    database.write(put("before"))
    size: Any = database.write(lambda transaction: transaction.connection.exec_driver_sql("PRAGMA page_count").scalar())
    database.write(room(size))
    held = Held(database)
    large = [database.send(put(f"large{number}", "x" * 100_000)) for number in range(3)]
    small = database.send(put("small"))
    held.let_go()
    for future in large:
        with pytest.raises(OperationalError, match="full"):
            future.result(WITHIN)
    assert small.result(WITHIN) == "small"
    database.write(room(1 << 30))
    assert database.write(put("large", "x" * 100_000)) == "large"
    assert stored(path) == ["before", "small", "large"]


def test_a_locked_file_fails_the_writes_and_not_the_writer(database: Database, path: Path) -> None:
    database.write(lambda transaction: transaction.connection.exec_driver_sql("PRAGMA busy_timeout = 20"))
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:  # one that does not know our lock file
        stranger.execute("BEGIN IMMEDIATE")
        futures = [database.send(put(name)) for name in ("a", "b")]
        for future in futures:
            with pytest.raises(OperationalError, match="locked"):
                future.result(WITHIN)
        stranger.execute("ROLLBACK")
    assert database.write(put("c")) == "c"
    assert stored(path) == ["c"]


def test_what_was_committed_before_the_file_failed_is_not_told_to_have_failed(database: Database, path: Path) -> None:
    def broken(transaction: Transaction) -> None:
        raise ValueError("no")

    begun = [0]

    def fail(_connection: Any) -> None:
        begun[0] += 1
        if begun[0] == 3:  # 1: all three at once, which fails for `broken`; 2: the first alone; 3: `broken` alone
            raise sqlite3.OperationalError("disk I/O error")

    held = Held(database)
    event.listen(database._engine, "begin", fail)
    futures: list[Future[Any]] = [database.send(write) for write in (put("a"), broken, put("b"))]
    held.let_go()
    wait_until(lambda: all(future.done() for future in futures), WITHIN)
    event.remove(database._engine, "begin", fail)
    assert database.write(put("c")) == "c"
    told = [name for name, future in zip("ab", (futures[0], futures[2]), strict=True) if future.exception() is None]
    assert futures[1].exception() is not None
    assert stored(path) == [*told, "c"]
    assert "a" in told


# -- reading -------------------------------------------------------------------------------------------------------

NAMES = select(models.meta.c.name).where(models.meta.c.name != "instance_id").order_by(models.meta.c.name)


def read(database: Database) -> list[str]:
    with database.reading() as connection:
        return [row.name for row in connection.execute(NAMES)]


def test_a_reader_never_sees_what_is_not_committed(database: Database) -> None:
    database.write(put("a"))
    held = Held(database, put("b"))
    assert read(database) == ["a"]
    with ThreadPoolExecutor(1) as pool:  # nor does one that begins now
        assert pool.submit(read, database).result(WITHIN) == ["a"]
    held.let_go()
    assert read(database) == ["a", "b"]


def test_a_failed_write_is_never_seen(database: Database) -> None:
    def write(transaction: Transaction) -> None:
        put("a")(transaction)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        database.write(write)
    assert read(database) == []


def test_a_reader_cannot_write(database: Database) -> None:
    with database.reading() as connection, pytest.raises(OperationalError, match="readonly"):
        connection.execute(insert(models.meta).values(name="a", value=""))
    assert read(database) == []


def test_no_reader_keeps_the_log_from_being_emptied(database: Database, path: Path) -> None:
    database.write(put("a"))
    done = threading.Event()
    readers = threading.Barrier(5)

    def stay() -> None:
        read(database)
        with (
            database.reading() as connection
        ):  # even inside of `reading`, after a statement that was not read to its end
            connection.execute(select(models.meta)).first()
            readers.wait(WITHIN)
            assert done.wait(WITHIN)

    threads = [threading.Thread(target=stay) for _ in range(4)]
    for thread in threads:
        thread.start()
    readers.wait(WITHIN)
    for number in range(20):
        database.write(put(str(number), "x" * 400_000))
    log = path.with_name(path.name + "-wal")
    # 8 MB went through it; left to itself it is written back every 1000 pages.
    assert log.stat().st_size < 6_000_000
    with closing(sqlite3.connect(path, timeout=WITHIN)) as other:
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, "a reader was in the way"
    assert log.stat().st_size == 0
    done.set()
    for thread in threads:
        thread.join(WITHIN)


def test_a_statement_sees_one_snapshot_while_others_write(database: Database) -> None:
    for number in range(10):
        database.write(put(f"pair-{number}", "0"))
    stop = threading.Event()

    def bump() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            database.write(
                lambda transaction, number=number: transaction.connection.execute(  # type: ignore[misc]
                    text("UPDATE meta SET value = :value WHERE name LIKE 'pair-%'"), {"value": str(number)}
                )
            )

    writer = threading.Thread(target=bump)
    writer.start()
    try:
        seen: set[str] = set()
        deadline = time.monotonic() + WITHIN
        while len(seen) < 20 and time.monotonic() < deadline:
            with database.reading() as connection:
                values = {
                    row.value for row in connection.execute(text("SELECT value FROM meta WHERE name LIKE 'pair-%'"))
                }
            assert len(values) == 1
            seen |= values
        assert len(seen) == 20
    finally:
        stop.set()
        writer.join(WITHIN)


# -- two processes write -------------------------------------------------------------------------------------------


def waits_for_a_lock(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process stands in the queue for a file lock; fails when it has ended."""
    assert process.poll() is None, process.communicate()[0]
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {process.pid} " in line for line in lines)


def test_a_command_line_waits_for_the_busy_writer(tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    database = Database(url_of(path), server=True)
    database.start()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "TOKEN_KEY_FILE")},
        "DATABASE_URL": url_of(path),
        "TOKEN_KEY_FILE": str(tmp_path / "token.key"),
    }
    held = Held(database, put("mine"))
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "token_manager.py"), "create", "ann", "a_long_enough_token"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: waits_for_a_lock(process), WITHIN, "token_manager.py to wait for its turn")
        with database.reading() as connection:
            assert connection.execute(select(models.tokens)).first() is None
        held.let_go()
        output, _ = process.communicate(timeout=WITHIN)
        assert process.returncode == 0, output.decode()
        with database.reading() as connection:
            assert connection.execute(select(models.tokens.c.user_id)).scalar_one() == "ann"
    finally:
        ended(process)
        database.close()
    assert stored(path) == ["mine"]


def test_a_write_is_exclusive_from_its_beginning(database: Database, path: Path) -> None:
    # A transaction that only reads at first would fail when somebody else wrote before its first write.
    held = Held(database, lambda transaction: transaction.connection.execute(select(models.meta)).first())
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as stranger:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            stranger.execute("BEGIN IMMEDIATE")
        held.let_go()
        stranger.execute("BEGIN IMMEDIATE")
        stranger.execute("ROLLBACK")


def test_two_processes_write_at_once_and_lose_nothing(database: Database, path: Path) -> None:
    code = """
import sys
from database import Database
from sqlalchemy import insert
import models
database = Database(sys.argv[1])
print("open", flush=True)
for number in range(80):
    database.write(lambda transaction: transaction.connection.execute(
        insert(models.meta).values(name=f"other-{number:03}", value="x" * 5000)).rowcount)
"""
    process = subprocess.Popen([sys.executable, "-c", code, url_of(path)], cwd=PROJECT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        number = 0
        while process.poll() is None:
            database.write(put(f"mine-{number:05}", "x" * 5000))
            number += 1
        assert process.returncode == 0
    finally:
        ended(process)
    assert number > 0
    assert stored(path, "mine") == [f"mine-{each:05}" for each in range(number)]
    assert stored(path, "other") == [f"other-{each:03}" for each in range(80)]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
