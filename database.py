"""The engine, its pragmas, the one write path, the locks on the SQLite file, and the schema's upgrade at start.

All writes of a process go through one connection on one thread: a queue is drained into one transaction (group
commit), so the cost of a sync is shared, and SQLite's WAL-reset bug (versions before 3.44.6, 3.50.7 and 3.51.3, when
two connections write or checkpoint at once; https://sqlite.org/wal.html#walresetbug) cannot strike. Other processes
(`token_manager.py`) keep out of that moment through a lock file.

May import `errors`, `metrics`, `models`, `sqlite_files`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, create_engine, delete, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import metrics
import models
import sqlite_files
from errors import DatabaseError, SchemaTooNew

log = logging.getLogger("database")

T = TypeVar("T")
MIGRATIONS = Path(__file__).resolve().parent / "migrations"
GROUP_COMMIT_MOST = 256
FENCE = "fence"  # row of `meta` that a restore leaves: see `backup` and nodes.NodeRegistry.fence


class Transaction:
    """One write inside a group commit: a connection, and what to do once it is durable."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.hints: list[Callable[[], None]] = []

    def after_commit(self, hint: Callable[[], None]) -> None:
        """Run `hint` on the writer's thread after the commit. It must be short and must not raise."""
        self.hints.append(hint)


Write = Callable[[Transaction], T]


class _Request:
    __slots__ = ("future", "loop", "outcome", "result", "write")

    def __init__(self, write: Write[Any], future: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.write = write
        self.future = future
        self.loop = loop
        self.result: Any = None
        self.outcome: BaseException | None = None

    def settle(self) -> None:
        future = self.future
        if future.done():  # the client hung up; the write is durable all the same
            return
        if self.outcome is not None:
            future.set_exception(self.outcome)
        else:
            future.set_result(self.result)


def sqlite_version_warning(version: str = sqlite3.sqlite_version) -> str | None:
    """A sentence when this SQLite has the WAL-reset bug, else None."""
    number = tuple(int(part) for part in version.split(".")[:3])
    if number >= (3, 51, 3) or (3, 50, 7) <= number < (3, 51) or (3, 44, 6) <= number < (3, 45):
        return None
    return (
        f"SQLite {version} has the WAL-reset bug; this server writes through one connection only, which avoids it. "
        "Do not write to the database with other programs while the server runs."
    )


class Database:
    """One SQLite file, opened by this process.

    `server=True` takes the server's lock for the life of the object (DatabaseInUse if another holds it).
    Raises SchemaTooNew when the file comes from a newer version, DatabaseError when it cannot be opened.
    """

    def __init__(self, url: str, *, server: bool = False) -> None:
        self.url = url
        self.path = Path(url.removeprefix("sqlite:///"))
        self._locks = contextlib.ExitStack()
        self._local = threading.local()
        self._readers: list[Connection] = []
        self._readers_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._closing = threading.Lock()  # between `_closed` and the queue: nothing is queued behind the end
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            if not os.access(self.path, os.W_OK, effective_ids=True):  # SQLite would only say so at the first write
                raise PermissionError(errno.EACCES, "it cannot be written to")
            if server:
                self._locks.enter_context(sqlite_files.server_lock(self.path))
            write_lock = self.path.with_name(self.path.name + ".write-lock")
            self._write_lock = os.open(write_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._locks.callback(os.close, self._write_lock)
            self._engine = create_engine(url, poolclass=NullPool, connect_args={"check_same_thread": False})
            event.listen(self._engine, "connect", _set_pragmas)
            event.listen(self._engine, "begin", _begin_immediate)
            self._read_engine = create_engine(
                url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={"check_same_thread": False}
            )
            event.listen(self._read_engine, "connect", _set_read_pragmas)
            self._upgrade(server)
            self.instance_id = self._instance_id()
        except (OSError, DBAPIError) as error:
            self._locks.close()
            raise DatabaseError(f"The database {self.path} cannot be opened: {_reason(error)}.") from error
        except BaseException:
            self._locks.close()
            raise

    # -- locks and schema ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exclusive_writing(self) -> Iterator[None]:
        fcntl.flock(self._write_lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._write_lock, fcntl.LOCK_UN)

    def _revision(self) -> str | None:
        with self._read_engine.connect() as connection:
            known = connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")).first()
            if known is None:
                return None
            return cast("str | None", connection.execute(text("SELECT version_num FROM alembic_version")).scalar())

    def _upgrade(self, server: bool) -> None:
        # A look without Alembic first: importing it costs more than the rest of the start.
        if self._revision() == models.SCHEMA_REVISION:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._exclusive_writing())
            revision = self._revision()
            if revision == models.SCHEMA_REVISION:
                return
            known = {path.name.split("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py")}
            if revision is not None and revision not in known:
                raise SchemaTooNew(
                    f"{self.path} has schema {revision}, which this version ({models.SCHEMA_REVISION}) does not know. "
                    "Start the newer version of the server that wrote it, or restore a backup."
                )
            if revision is not None and not server:
                stack.enter_context(sqlite_files.server_lock(self.path))
            if revision is not None:
                kept = self.path.with_name(f"{self.path.name}.before-{models.SCHEMA_REVISION}")
                sqlite_files.copy(self.path, kept)
                log.info("before the upgrade of the schema the database was copied to %s", kept)
            from alembic import command
            from alembic.config import Config

            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            with self._engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, models.SCHEMA_REVISION)
            log.info("schema of %s is now %s (was %s)", self.path, models.SCHEMA_REVISION, revision or "empty")

    def _instance_id(self) -> str:
        with self.reading() as connection:
            statement = select(models.meta.c.value).where(models.meta.c.name == "instance_id")
            found = connection.execute(statement).scalar()
        if found is None:
            with self._exclusive_writing(), self._engine.begin() as connection:
                found = connection.execute(statement).scalar()
                if found is None:
                    found = uuid.uuid4().hex
                    connection.execute(insert(models.meta).values(name="instance_id", value=found))
        return str(found)

    def fence(self) -> str | None:
        """When the backup was made that this database was restored from, while that still matters."""
        with self.reading() as connection:
            statement = select(models.meta.c.value).where(models.meta.c.name == FENCE)
            found = connection.execute(statement).scalar()
        return str(found) if found is not None else None

    def lift_fence(self) -> None:
        """Every node was asked what it runs, or cannot run anything of the lost time any more."""
        self.write(lambda transaction: _delete_fence(transaction.connection))

    # -- reading ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """This thread's read connection. Every statement is a transaction of its own, so nothing is held open."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._read_engine.connect()
            self._local.connection = connection
            with self._readers_lock:
                self._readers.append(connection)
        yield connection

    # -- writing ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the writer's thread. Without it `write` runs in the caller (for command lines)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_writer, name="database-writer", daemon=True)
            self._thread.start()

    def write(self, write: Write[T]) -> T:
        """Run `write` in a durable transaction and return its result; blocks. It may run twice, so it must be a
        function of the transaction alone."""
        if self._thread is None:
            return self._write_here(write)
        return self.send(write).result()

    def send(self, write: Write[T]) -> Future[T]:
        """Hand `write` to the writer and go on; the future settles after the commit."""
        future: Future[T] = Future()
        self._put(_Request(write, future, None))
        return future

    async def write_async(self, write: Write[T]) -> T:
        """`write` for coroutines: the event loop is never blocked."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Request(write, future, loop))
        return await future

    def _put(self, request: _Request) -> None:
        with self._closing:
            self._refuse_when_closed()
            self._queue.put(request)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DatabaseError("The database is closed: the server is stopping.")

    def _write_here(self, write: Write[T]) -> T:
        self._refuse_when_closed()
        with self._exclusive_writing(), self._engine.connect() as connection, connection.begin():
            transaction = Transaction(connection)
            result = write(transaction)
        for hint in transaction.hints:
            hint()
        return result

    def _run_writer(self) -> None:
        connection: Connection | None = None
        stopping = False
        while not stopping:
            requests = [self._queue.get()]
            while len(requests) < GROUP_COMMIT_MOST:
                try:
                    requests.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = None in requests
            batch = [request for request in requests if request is not None]
            if not batch:
                continue
            try:
                if connection is None:
                    connection = self._engine.connect()
                metrics.WRITES.inc(len(batch))
                with metrics.COMMIT_SECONDS.time():
                    hints = self._commit(connection, batch)
            except Exception as error:  # the file is gone, the disk is full, …: say so to everyone who waits
                log.error("a write to %s failed: %s", self.path, _reason(error))
                metrics.WRITE_FAILURES.inc()
                hints = []
                for request in batch:
                    request.outcome = error
                if connection is not None:
                    connection.close()
                    connection = None
            self._settle(batch, hints)
        if connection is not None:
            connection.close()

    def _commit(self, connection: Connection, batch: list[_Request]) -> list[Callable[[], None]]:
        """One transaction for all; when one of them fails, each in its own, so that only that one fails.

        Raises when the transaction cannot even begin: then no single write is to blame.
        """
        transaction = Transaction(connection)
        with self._exclusive_writing():
            begun = connection.begin()
            try:
                with begun:
                    for request in batch:
                        request.result = request.write(transaction)
                return transaction.hints
            except Exception as error:
                if len(batch) == 1:
                    batch[0].outcome = error
                    return []
        hints: list[Callable[[], None]] = []
        for request in batch:
            try:
                hints += self._commit(connection, [request])
            except Exception as error:  # those before it are durable and must be told so
                request.outcome = error
        return hints

    def _settle(self, batch: list[_Request], hints: list[Callable[[], None]]) -> None:
        for hint in hints:
            try:
                hint()
            except Exception:  # a hint may be lost; the writer may not
                log.exception("a hint after a commit failed")
        loops: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
        for request in batch:
            if request.loop is None:
                request.settle()
            else:
                loops.setdefault(request.loop, []).append(request)
        for loop, waiting in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_settle_all, waiting)

    def close(self) -> None:
        """Finish what is queued, then close everything."""
        with self._closing:
            self._closed = True
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        with self._readers_lock:
            for connection in self._readers:
                connection.close()
            self._readers.clear()
        self._locks.close()


def _delete_fence(connection: Connection) -> None:
    connection.execute(delete(models.meta).where(models.meta.c.name == FENCE))


def _settle_all(requests: list[_Request]) -> None:
    for request in requests:
        request.settle()


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)


def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # BEGIN is ours: pysqlite's own is deferred and comes too late
    for pragma in (
        "busy_timeout = 10000",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "temp_store = MEMORY",
        "journal_size_limit = 67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _set_read_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout = 10000")
    connection.execute("PRAGMA query_only = ON")


def _begin_immediate(connection: Connection) -> None:
    # Deferred BEGIN ends in SQLITE_BUSY_SNAPSHOT, which busy_timeout does not cure.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
