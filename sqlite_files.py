"""SQLite files as files: locks beside them, consistent copies, checks. May import `errors`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from errors import DatabaseError, DatabaseInUse


@contextlib.contextmanager
def flock(path: Path, *, blocking: bool) -> Iterator[int]:
    """Hold the lock file exclusively. Raises BlockingIOError when it is held and `blocking` is false."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def server_lock(database: Path) -> Iterator[int]:
    """The lock that keeps a second server off one SQLite file. Raises DatabaseInUse, which names the holder."""
    path = database.with_name(database.name + ".server-lock")
    try:
        with flock(path, blocking=False) as handle:
            os.truncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield handle
    except BlockingIOError:
        holder = path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
        raise DatabaseInUse(
            f"Another server (process {holder}) already works on {database}. Stop it first, or give this one its own "
            "DATABASE_URL."
        ) from None


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _backup_note(database: Path) -> Path:
    return database.with_name(database.name + ".last-backup")


def note_backup(database: Path) -> None:
    """Leave the time of a finished backup beside the database; it is no part of it, so a restore keeps it true."""
    _backup_note(database).touch(mode=0o600)


def last_backup(database: Path) -> float:
    """When the last backup was finished, in seconds since 1970; 0 when none is known."""
    try:
        return _backup_note(database).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def verify(path: Path) -> str:
    """Check every page, index and reference; returns the schema's revision. Raises DatabaseError."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchone()
        if found != ("ok",):
            raise DatabaseError(f"{path} is damaged: {found[0]}.")
        if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise DatabaseError(f"{path} is damaged: rows refer to rows that are not there.")
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def copy(source: Path, target: Path) -> str:
    """A consistent, synced, verified copy while others write; returns the schema's revision.

    Raises DatabaseError; then there is no `target`.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")  # mode 0600
    os.close(handle)
    temporary = Path(name)
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)) as reader,
            closing(sqlite3.connect(temporary)) as writer,
        ):
            reader.backup(writer)  # in one step: one snapshot, no new start whenever somebody writes
            writer.execute("PRAGMA journal_mode = DELETE")
        revision = verify(temporary)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise DatabaseError(f"{source} could not be copied to {target}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return revision
