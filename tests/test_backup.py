"""Backup and restore, retention, and the upgrade of the schema: what is kept, what goes, and what cannot come back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import backup
import database as database_module
import models
import sqlite_files
import states
from database import Database
from errors import DatabaseError, DatabaseInUse, SchemaTooNew
from maintenance import PRUNE_BATCH
from queue_manager import Claim, NewJob, Outcome, QueueManager
from tests.fleet import Fleet, missing_tools
from tests.held_jobs import HOLD, pids_with, release
from tests.ledger import replay
from tests.records import assert_story, database_of, finished, make_users, rows
from tests.server import Server, wait_until

SETTINGS = {"SUBMITS_PER_MINUTE": "10000", "KILL_GRACE": "1"}
FILES = {"database.db", "token.key", "manifest.json"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Fleet]:
    """Two SSH nodes of this file alone."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(2) as fleet:
        yield fleet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A database with one finished and one pending job, and a key."""
    database = Database(f"sqlite:///{tmp_path / 'database.db'}")
    queue = QueueManager(database, owner="the-owner")
    database.write(queue.submit(a_job("alice")))
    claim = queue.claim("node-1", "somewhere")
    assert claim is not None
    assert queue.finish(claim, Outcome(states.COMPLETED, "Completed.", completed_at=1))
    database.write(queue.submit(a_job("bob")))
    database.close()
    (tmp_path / "token.key").write_bytes(os.urandom(32))
    return tmp_path


# -- small things --------------------------------------------------------------------------------------------------


def a_job(user_id: str) -> NewJob:
    return NewJob(
        user_id=user_id,
        competition_id="c",
        project_id="p",
        expected_time=60,
        time_limit=120,
        config={"user_id": user_id},
        code=b"print('hello')\n",
        request_digest=b"x" * 32,
        request_id="request",
    )


def change(path: Path, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(statement, values)
        connection.commit()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def held(server: Server, user_id: str, code: str = HOLD, **fields: Any) -> str:
    """A job of the user that is at its pipe."""
    job_id = server.submit(user_id, code, **fields)
    server.wait_for_output(job_id, user_id, "held\n", timeout=60)
    return job_id


# -- making a backup -----------------------------------------------------------------------------------------------


def test_backup_during_submissions_is_whole_and_holds_all_that_was_answered(tmp_path: Path) -> None:
    over = threading.Event()
    users = ["alice", "bob", "carol"]
    answered: list[str] = []

    def work(server: Server, user_id: str) -> None:
        while not over.is_set():
            answered.append(server.run_job(user_id, "print('x')\n")["job_id"])

    with make_users(Server({**SETTINGS, "NUM_GPU_NODES": "3"}), *users) as server:
        clients = [threading.Thread(target=work, args=(server, user_id)) for user_id in users]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: len(answered) > 20, 60, "jobs to end")
            before = list(answered)
            target = tmp_path / "new" / "backup"
            done = server.run("main.py", "backup", str(target))
            after = len(answered)
        finally:
            over.set()
            for client in clients:
                client.join(60)
        assert after > len(before), "nobody worked meanwhile"
        assert "verified" in done.stdout
        assert str(server.jobs_dir) in done.stdout  # what is not in it

        assert {path.name for path in target.iterdir()} == FILES
        assert mode_of(target) == 0o700
        assert {mode_of(path) for path in target.iterdir()} == {0o600}
        manifest = json.loads((target / "manifest.json").read_text())
        assert manifest["schema"] == models.SCHEMA_REVISION
        assert manifest["files"] == {name: digest_of(target / name) for name in FILES - {"manifest.json"}}
        assert backup.check(target) == manifest
        assert (target / "token.key").read_bytes() == (server.folder / "token.key").read_bytes()

        stored = rows(target / "database.db", "SELECT * FROM jobs")
        assert set(before) <= {row["job_id"] for row in stored if row["state"] == "completed"}
        assert rows(target / "database.db", "PRAGMA integrity_check")[0][0] == "ok"
        for row in stored:
            events = rows(target / "database.db", "SELECT * FROM job_events WHERE job_seq = ? ORDER BY id", row["seq"])
            wrong = replay(events)
            # One moment of every job: its events end where its row stands.
            assert wrong == ([] if row["state"] in states.FINAL else ["0 final events"])
            assert events[-1]["to_state"] == row["state"]
            inputs = rows(target / "database.db", "SELECT code FROM job_inputs WHERE job_seq = ?", row["seq"])
            assert [bytes(found["code"]) for found in inputs] == [b"print('x')\n"]

        again = server.run("main.py", "backup", str(target), code=1)
        assert f"{target} exists already; a backup is made in a new or empty folder." in again.stderr
        assert backup.check(target) == manifest
        with pytest.raises(DatabaseInUse, match="process"):
            backup.restore(target, database_of(server), server.folder / "token.key")


def test_backup_needs_an_empty_place_and_a_database(folder: Path, tmp_path: Path) -> None:
    database, key = folder / "database.db", folder / "token.key"
    target = tmp_path / "backup"
    target.mkdir()
    (target / "mine").write_text("do not touch")
    with pytest.raises(DatabaseError, match="new or empty folder"):
        backup.make(database, key, target)
    assert content_of(target) == {"mine": b"do not touch"}
    with pytest.raises(DatabaseError, match="new or empty folder"):
        backup.make(database, key, target / "mine")
    (target / "mine").unlink()
    assert set(backup.make(database, key, target)["files"]) == {"database.db", "token.key"}
    with pytest.raises(DatabaseError, match=r"There is no database at .*elsewhere\.db"):
        backup.make(tmp_path / "elsewhere.db", key, tmp_path / "another")
    assert not (tmp_path / "another").exists()


# -- a backup that is none -----------------------------------------------------------------------------------------


def write_manifest(target: Path, **changes: Any) -> None:
    path = target / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_a_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def damage_byte(target: Path) -> None:
    flip_a_byte(target / "database.db", 5000)


def damage_key(target: Path) -> None:
    flip_a_byte(target / "token.key", 3)


def damage_length(target: Path) -> None:
    os.truncate(target / "database.db", 8192)


def damage_before_the_digest(target: Path) -> None:
    path = target / "database.db"
    content = path.read_bytes()
    page = content.rindex(b"print('hello')") // 4096 * 4096
    path.write_bytes(content[:page] + b"\x0d" + b"\xff" * 100 + content[page + 101 :])
    files = json.loads((target / "manifest.json").read_text())["files"]
    write_manifest(target, files={**files, "database.db": digest_of(path)})


def damage_manifest(target: Path) -> None:
    os.truncate(target / "manifest.json", 20)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a byte of the database": damage_byte,
    "a byte of the key": damage_key,
    "the database's end": damage_length,
    "the database before the digest was taken": damage_before_the_digest,
    "the manifest's end": damage_manifest,
    "the manifest": lambda target: (target / "manifest.json").unlink(),
    "the key": lambda target: (target / "token.key").unlink(),
    "the database": lambda target: (target / "database.db").unlink(),
    "every digest": lambda target: write_manifest(target, files={}),
    "the format": lambda target: write_manifest(target, format=2),
    "names": lambda target: write_manifest(target, files={"../database.db": "0" * 64}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_backup_is_refused_and_nothing_is_touched(folder: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "backup"
    backup.make(folder / "database.db", folder / "token.key", target)
    DAMAGE[what](target)
    before = content_of(folder)
    with pytest.raises(DatabaseError, match=str(target)):
        backup.restore(target, folder / "database.db", folder / "token.key")
    after = content_of(folder)
    after.pop("database.db.server-lock", None)
    assert after == before


def test_backup_of_a_newer_version_is_refused(folder: Path, tmp_path: Path) -> None:
    change(folder / "database.db", "UPDATE alembic_version SET version_num = '9999'")
    backup.make(folder / "database.db", folder / "token.key", tmp_path / "backup")
    before = (folder / "database.db").read_bytes()
    with pytest.raises(SchemaTooNew, match=f"schema 9999; this version knows up to {models.SCHEMA_REVISION}"):
        backup.restore(tmp_path / "backup", folder / "database.db", folder / "token.key")
    assert (folder / "database.db").read_bytes() == before


# -- restoring -----------------------------------------------------------------------------------------------------


def test_claim_from_before_a_restore_changes_nothing_any_more(folder: Path, tmp_path: Path) -> None:
    path, key = folder / "database.db", folder / "token.key"
    end = Outcome(states.COMPLETED, "Completed.", completed_at=2)

    def lost_time() -> tuple[Claim, Claim]:
        """A claim that the backup knows of, and one that was given out after it."""
        database = Database(f"sqlite:///{path}")
        queue = QueueManager(database, owner="the-owner")
        first = queue.claim("node-1", "somewhere")
        backup.make(path, key, tmp_path / "backup")
        second = queue.adopt("node-1")
        assert first is not None
        assert second is not None
        assert queue.finish(second, end)
        database.close()
        return first, second

    claims = lost_time()
    aside = backup.restore(tmp_path / "backup", path, key)
    assert [row["state"] for row in rows(aside[0], "SELECT state FROM jobs ORDER BY seq")] == ["completed", "completed"]
    database = Database(f"sqlite:///{path}")
    queue = QueueManager(database, owner="the-owner")
    (running,) = rows(path, "SELECT * FROM jobs WHERE user_id = 'bob'")
    assert running["state"] == "running"
    for claim in claims:
        assert not queue.renew(claim).held
        assert not queue.set_node_lease(claim, 5)
        assert queue.requeue(claim, states.NODE_LOST, "stale") is None
        assert not queue.give_back(claim, "stale")
        assert not queue.finish(claim, end)
    assert tuple(rows(path, "SELECT * FROM jobs WHERE user_id = 'bob'")[0]) == tuple(running)
    adopted = queue.adopt("node-1")
    assert adopted is not None
    assert adopted.epoch > max(claim.epoch for claim in claims)
    assert queue.finish(adopted, end)
    events = rows(path, "SELECT * FROM job_events WHERE job_seq = ? ORDER BY id", running["seq"])
    assert replay(events) == []
    database.close()


def test_server_whose_disk_died_comes_back_with_its_jobs_and_tokens(tmp_path: Path) -> None:
    with Server({**SETTINGS, "NUM_GPU_NODES": "1"}) as server:
        known = server.run_job("alice", "print('before')\n")
        server.run("main.py", "backup", str(tmp_path / "backup"))
        refused = server.run("main.py", "restore", str(tmp_path / "backup"), code=1)
        assert server.process is not None
        assert f"Another server (process {server.process.pid}) already works on" in refused.stderr
        lost = server.run_job("alice", "print('lost')\n")
        server.kill()
        for path in server.folder.glob("database.db*"):
            path.unlink()
        (server.folder / "token.key").unlink()

        done = server.run("main.py", "restore", str(tmp_path / "backup"))
        assert "Restored from" in done.stdout
        assert mode_of(database_of(server)) == mode_of(server.folder / "token.key") == 0o600
        server.start()
        assert server.results(known["job_id"], "alice")["stdout"] == "before\n"
        assert server.get(f"/api/status/{lost['job_id']}", "alice").status_code == 404
        assert server.run_job("alice", "print('after')\n")["stdout"] == "after\n"


LOOK = """
import os
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{{pid}}/cmdline", "rb") as file:
            found += [pid] if {marker!r} in file.read() else []
    except OSError:
        pass
print("alone" if not found else f"not alone: {{found}}")
"""


def test_job_that_the_backup_does_not_know_is_ended_before_work_is_given_out(nodes: Fleet, tmp_path: Path) -> None:
    marker = f"marker-{uuid.uuid4()}"
    settings = {"SANDBOX": "off", "NODE_LOST_AFTER": "300", "NODE_PING_INTERVAL": "1", "NODE_PING_TIMEOUT": "8"}
    with make_users(Server({**SETTINGS, **nodes.settings(), **settings}), "alice", "bob") as server:
        server.run("main.py", "backup", str(tmp_path / "backup"))
        child = ["-c", "import time; time.sleep(1000)", marker]
        forgotten = held(
            server, "alice", f"import subprocess, sys\nsubprocess.Popen([sys.executable, *{child}])\n{HOLD}"
        )
        assert pids_with(marker)
        number = int(server.status(forgotten, "alice")["node_id"].removeprefix("node-"))
        server.kill()
        nodes.stop(number)  # where it runs cannot be asked
        try:
            server.run("main.py", "restore", str(tmp_path / "backup"))
            server.wait_for_nodes = False
            server.start()
            wait_until(
                lambda: [n["status"] for n in server.get("/api/nodes").json()["nodes"]].count("online") == 1,
                60,
                "the other node to be online",
            )
            answer = server.post(LOOK.format(marker=marker.encode()), server.config("bob"), wait=3).json()
            assert answer["status"] == "pending"
            assert pids_with(marker)
            asked = time.time_ns() // 1000
        finally:
            nodes.start(number)
        ended = finished(server, answer["job_id"], "bob")
        assert (ended["status"], ended["stdout"], ended["attempt"]) == ("completed", "alone\n", 1)
        assert pids_with(marker) == []
        (claimed,) = rows(server, "SELECT at FROM job_events WHERE event = 'claimed'")
        assert claimed["at"] >= asked
        assert server.get(f"/api/status/{forgotten}", "alice").status_code == 404
        wait_until(lambda: rows(server, "SELECT * FROM meta WHERE name = 'fence'") == [], 30, "the fence to be gone")


@pytest.mark.slow
def test_job_that_ended_in_the_lost_time_runs_again_and_holds_up_no_other(nodes: Fleet, tmp_path: Path) -> None:
    settings = {"NODE_LOST_AFTER": "10", "NODE_PING_TIMEOUT": "8"}
    with make_users(Server({**SETTINGS, **nodes.settings(), **settings}), "alice", "bob") as server:
        # Its node must be left alone for as long as it might still live there, at most its time limit.
        job_id = held(server, "alice", expected_time=12)
        server.run("main.py", "backup", str(tmp_path / "backup"))
        release(server, nodes, job_id)
        lost = finished(server, job_id, "alice")
        assert lost["status"] == "completed"
        assert (server.jobs_dir / "results" / lost["result_file"]).exists()
        assert server.terminate() == 0
        server.run("main.py", "restore", str(tmp_path / "backup"))
        server.wait_for_nodes = False
        server.start()
        assert server.run_job("bob", "print('not held up')\n")["node_id"] != lost["node_id"]
        assert server.status(job_id, "alice")["status"] == "running"
        assert again(server.status(job_id, "alice")) is None
        wait_until(lambda: again(server.status(job_id, "alice")), 90, "the job to run again")
        release(server, nodes, job_id)
        answer = finished(server, job_id, "alice")
        assert (answer["status"], answer["stdout"], answer["attempt"]) == ("completed", "held\n", 2)
        # What the lost time had published was taken back: one job, one result.
        assert {path.name for path in (server.jobs_dir / "results").glob("alice*")} == {answer["result_file"]}
        assert_story(server, job_id)


def again(status: dict[str, Any]) -> dict[str, Any] | None:
    return status if status["attempt"] == 2 and status["started_at"] is not None else None


# -- retention -----------------------------------------------------------------------------------------------------

DAY = 86_400_000_000


def clone_as_old(server: Server, job_id: str, count: int) -> list[tuple[str, str]]:
    """So many more ended jobs like that one, with all their files; (job, result file)."""
    path = database_of(server)
    made = []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(jobs)") if row[1] != "seq"]
        for number in range(count):
            name, result = str(uuid.uuid4()), f"clone_{number}.jsonl"
            values = ", ".join({"job_id": "?", "result_file": "?"}.get(column, column) for column in columns)
            connection.execute(
                f"INSERT INTO jobs ({', '.join(columns)}) SELECT {values} FROM jobs WHERE job_id = ?",
                [
                    {"job_id": name, "result_file": result}[column]
                    for column in columns
                    if column in ("job_id", "result_file")
                ]
                + [job_id],
            )
            connection.execute(
                "INSERT INTO job_inputs SELECT (SELECT max(seq) FROM jobs), config, code FROM job_inputs "
                "WHERE job_seq = (SELECT seq FROM jobs WHERE job_id = ?)",
                [job_id],
            )
            connection.execute(
                "INSERT INTO job_events (job_seq, at, event, actor, attempt, epoch) "
                "SELECT max(seq), 1, 'submitted', 'user:x', 0, 0 FROM jobs"
            )
            shutil.copytree(server.jobs_dir / job_id, server.jobs_dir / name)
            os.link(server.jobs_dir / name / "results.jsonl", server.jobs_dir / "results" / result)
            made.append((name, result))
        connection.commit()
    return made


def test_old_jobs_go_in_batches_and_nothing_else_does() -> None:
    settings = {**SETTINGS, "NUM_GPU_NODES": "2", "RETENTION_DAYS": "3"}
    with make_users(Server(settings), "alice", "bob", "carol", "dave", "erin") as server:
        running = held(server, "carol")
        old = server.run_job("alice", "print('old')\n")
        failed = server.run_job("alice", "raise SystemExit(1)\n")
        kept = server.run_job("bob", "print('kept')\n")
        in_the_way = held(server, "dave")
        waiting = server.submit("erin", "print('at last')\n")
        assert server.terminate() == 0
        clones = clone_as_old(server, old["job_id"], 2 * PRUNE_BATCH)
        change(
            database_of(server),
            "UPDATE jobs SET created_at = created_at - ?, started_at = started_at - ?, completed_at = completed_at - ? "
            "WHERE job_id <> ?",
            *(10 * DAY, 10 * DAY, 10 * DAY),
            kept["job_id"],
        )
        # Just within the time.
        change(
            database_of(server),
            "UPDATE jobs SET completed_at = completed_at - ? WHERE job_id = ?",
            2 * DAY,
            kept["job_id"],
        )
        server.start()

        expected = {running, kept["job_id"], in_the_way, waiting}
        wait_until(
            lambda: {row["job_id"] for row in rows(server, "SELECT job_id FROM jobs")} == expected,
            60,
            "old jobs to go",
        )

        def batches_logged() -> list[int]:
            return [int(number) for number in re.findall(r"forgot (\d+) jobs", server.log())]

        # The line of the last batch is written a moment after its rows are gone.
        wait_until(lambda: sum(batches_logged()) == len(clones) + 2, 20, "every batch to be logged")
        batches = batches_logged()
        assert max(batches) <= PRUNE_BATCH
        for table in ("job_inputs", "job_events"):
            owners = {row["job_seq"] for row in rows(server, f"SELECT job_seq FROM {table}")}
            assert owners == {row["seq"] for row in rows(server, "SELECT seq FROM jobs")}, table
        for name in (old["job_id"], failed["job_id"], *(name for name, _ in clones)):
            assert not (server.jobs_dir / name).exists()
        assert {path.name for path in server.jobs_dir.iterdir()} <= {*expected, "results", ".nodes"}
        assert {path.name for path in (server.jobs_dir / "results").iterdir()} == {kept["result_file"]}
        assert server.get(f"/api/status/{old['job_id']}", "alice").status_code == 404
        assert server.results(kept["job_id"], "bob")["results"] == [{"output": "kept"}]
        assert requests.get(f"{server.url}/readyz", timeout=20).status_code == 200

        # However old they are: what runs, runs on, and what waits gets its turn.
        assert server.status(waiting, "erin")["status"] == "pending"
        release(server, None, running, in_the_way)
        for job_id, user_id, stdout in (
            (running, "carol", "held\n"),
            (in_the_way, "dave", "held\n"),
            (waiting, "erin", "at last\n"),
        ):
            answer = finished(server, job_id, user_id)
            assert (answer["status"], answer["stdout"]) == ("completed", stdout)


# -- the schema's upgrade ------------------------------------------------------------------------------------------

REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9000", {before!r}, None, None


def upgrade() -> None:
    op.create_table("of_the_next_version", sa.Column("id", sa.Integer(), primary_key=True))
    op.execute("UPDATE jobs SET project_id = 'upgraded'")
    {last}
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process the next version of the server, with one more revision; its file, still to be written."""
    migrations = tmp_path / "migrations"
    shutil.copytree(database_module.MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(database_module, "MIGRATIONS", migrations)
    monkeypatch.setattr(backup, "MIGRATIONS", migrations)
    monkeypatch.setattr(models, "SCHEMA_REVISION", "9000")
    return migrations / "versions" / "9000_next.py"


def test_upgrade_keeps_a_copy_of_the_database_as_it_was(folder: Path, next_version: Path) -> None:
    path = folder / "database.db"
    (revision,) = rows(path, "SELECT version_num FROM alembic_version")
    next_version.write_text(REVISION.format(before=revision["version_num"], last="pass"))
    before = [tuple(row) for row in rows(path, "SELECT * FROM jobs ORDER BY seq")]
    Database(f"sqlite:///{path}", server=True).close()
    assert rows(path, "SELECT version_num FROM alembic_version")[0]["version_num"] == "9000"
    assert {row["project_id"] for row in rows(path, "SELECT project_id FROM jobs")} == {"upgraded"}
    kept = folder / "database.db.before-9000"
    assert mode_of(kept) == 0o600
    assert tuple(rows(kept, "SELECT version_num FROM alembic_version")[0]) == tuple(revision)
    assert [tuple(row) for row in rows(kept, "SELECT * FROM jobs ORDER BY seq")] == before
    assert rows(kept, "PRAGMA integrity_check")[0][0] == "ok"
    # Once: the next start finds nothing to do, and the copy stays the one of before.
    change(path, "UPDATE jobs SET project_id = 'later'")
    Database(f"sqlite:///{path}", server=True).close()
    assert [tuple(row) for row in rows(kept, "SELECT * FROM jobs ORDER BY seq")] == before


def test_upgrade_that_fails_changes_nothing(folder: Path, next_version: Path) -> None:
    path = folder / "database.db"
    (revision,) = rows(path, "SELECT version_num FROM alembic_version")
    next_version.write_text(REVISION.format(before=revision["version_num"], last="op.execute('no statement')"))
    before = [tuple(row) for row in rows(path, "SELECT * FROM jobs ORDER BY seq")]
    with pytest.raises(DatabaseError, match="cannot be opened"):
        Database(f"sqlite:///{path}", server=True)
    assert tuple(rows(path, "SELECT version_num FROM alembic_version")[0]) == tuple(revision)
    assert [tuple(row) for row in rows(path, "SELECT * FROM jobs ORDER BY seq")] == before
    assert rows(path, "SELECT * FROM sqlite_master WHERE name = 'of_the_next_version'") == []
    next_version.write_text(REVISION.format(before=revision["version_num"], last="pass"))
    shutil.rmtree(next_version.parent / "__pycache__", ignore_errors=True)
    Database(f"sqlite:///{path}", server=True).close()
    assert rows(path, "SELECT version_num FROM alembic_version")[0]["version_num"] == "9000"


def test_upgrade_waits_for_no_server_it_would_pull_the_tables_from_under(folder: Path, next_version: Path) -> None:
    path = folder / "database.db"
    (revision,) = rows(path, "SELECT version_num FROM alembic_version")
    next_version.write_text(REVISION.format(before=revision["version_num"], last="pass"))
    with sqlite_files.server_lock(path), pytest.raises(DatabaseInUse, match=f"process {os.getpid()}"):
        Database(f"sqlite:///{path}")  # a command line of the new version beside a server of the old one
    assert tuple(rows(path, "SELECT version_num FROM alembic_version")[0]) == tuple(revision)


def test_backup_of_an_older_version_is_restored_and_upgraded(folder: Path, tmp_path: Path, next_version: Path) -> None:
    path = folder / "database.db"
    (revision,) = rows(path, "SELECT version_num FROM alembic_version")
    backup.make(path, folder / "token.key", tmp_path / "backup")
    next_version.write_text(REVISION.format(before=revision["version_num"], last="pass"))
    Database(f"sqlite:///{path}", server=True).close()
    backup.restore(tmp_path / "backup", path, folder / "token.key")
    assert tuple(rows(path, "SELECT version_num FROM alembic_version")[0]) == tuple(revision)
    Database(f"sqlite:///{path}", server=True).close()
    assert rows(path, "SELECT version_num FROM alembic_version")[0]["version_num"] == "9000"
