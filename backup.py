"""Backup and restore of what cannot be made again: the database and the key of the token digests.

A backup is a folder with `database.db`, `token.key` and `manifest.json`. The files below JOBS_DIR are not in it: they
are written once and never changed, so any file copy (rsync) will do.
May import `errors`, `clock`, `models`, `sqlite_files`, `database`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import clock
import models
import sqlite_files
from database import FENCE, MIGRATIONS
from errors import DatabaseError, SchemaTooNew

FORMAT = 1
# Epochs of a restored database start above all that were given out after the backup was made.
EPOCH_STEP = 1_000_000
FILES = ("database.db", "token.key")


class BackupFailed(DatabaseError):
    """The backup could not be made, or is not one that can be restored."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_private(target: Path, content: bytes) -> None:
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


def make(database: Path, key_file: Path, target: Path) -> dict[str, Any]:
    """Make a backup in the new folder `target`, also while a server runs; returns the manifest.

    Raises DatabaseError.
    """
    if not database.is_file():
        raise BackupFailed(f"There is no database at {database}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BackupFailed(f"{target} exists already; a backup is made in a new or empty folder.")
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        revision = sqlite_files.copy(database, target / "database.db")
        if key_file.is_file():
            _write_private(target / "token.key", key_file.read_bytes())
        manifest = {
            "format": FORMAT,
            "made_at": clock.iso(clock.now_us()),
            "schema": revision,
            "files": {name: _digest(target / name) for name in FILES if (target / name).exists()},
        }
        # Written last: a folder without it is no backup.
        _write_private(target / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
        sqlite_files.sync(target)
        sqlite_files.note_backup(database)
    except OSError as error:
        raise BackupFailed(f"The backup in {target} could not be made: {error}.") from error
    return manifest


def check(source: Path) -> dict[str, Any]:
    """The manifest of a backup whose files are whole and whose schema is known. Raises DatabaseError, SchemaTooNew."""
    try:
        manifest: dict[str, Any] = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BackupFailed(f"{source} has format {manifest['format']}, which this version does not know.")
        if "database.db" not in manifest["files"]:
            raise BackupFailed(f"{source / 'manifest.json'} names no database.")
        for name, wanted in manifest["files"].items():
            if name not in FILES or _digest(source / name) != wanted:
                raise BackupFailed(f"{source / name} is not what was backed up: its digest differs.")
        revision = sqlite_files.verify(source / "database.db")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, sqlite3.Error) as error:
        raise BackupFailed(f"{source} is no whole backup: {error}.") from error
    if not list((MIGRATIONS / "versions").glob(f"{revision}_*.py")):
        raise SchemaTooNew(f"The backup has schema {revision}; this version knows up to {models.SCHEMA_REVISION}.")
    return manifest


def restore(source: Path, database: Path, key_file: Path) -> list[Path]:
    """Put a backup in the place of the present database; returns where the present files were put aside.

    Raises DatabaseInUse while a server runs, DatabaseError, SchemaTooNew; then nothing was changed.
    """
    manifest = check(source)
    stamp = clock.file_stamp(clock.now_us())
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with sqlite_files.server_lock(database):
            prepared = _prepare(source, database, manifest["made_at"])
            aside = [
                _put_aside(path, f"{database.name}.before-restore-{stamp}{path.name[len(database.name) :]}")
                for path in (database, *(database.with_name(database.name + end) for end in ("-wal", "-shm")))
                if path.exists()
            ]
            os.replace(prepared, database)
            wanted = manifest["files"].get("token.key")
            if wanted is not None and not (key_file.exists() and _digest(key_file) == wanted):
                if key_file.exists():
                    aside.append(_put_aside(key_file, f"{key_file.name}.before-restore-{stamp}"))
                _write_private(key_file, (source / "token.key").read_bytes())
            sqlite_files.sync(database.parent)
    except OSError as error:
        raise BackupFailed(f"The restore to {database} failed: {error}.") from error
    return aside


def _prepare(source: Path, database: Path, made_at: str) -> Path:
    """A copy beside the present database, changed so that the lost time cannot come back."""
    prepared = database.with_name(f".{database.name}.restoring")
    prepared.unlink(missing_ok=True)
    sqlite_files.copy(source / "database.db", prepared)
    with closing(sqlite3.connect(prepared)) as connection:
        # What a worker of the lost time still holds must never match again; and nothing may be started before the
        # nodes have been asked what they run (see nodes.NodeRegistry.fence).
        connection.execute("UPDATE jobs SET epoch = epoch + ?", (EPOCH_STEP,))
        connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (FENCE, made_at))
        connection.commit()
    sqlite_files.sync(prepared)
    return prepared


def _put_aside(path: Path, name: str) -> Path:
    kept = path.with_name(name)
    os.replace(path, kept)
    return kept
