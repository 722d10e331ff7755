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
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import Connection, Dialect, create_engine, delete, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import metrics
import models
import sqlite_files
from errors import DatabaseError, SchemaTooNew

log = logging.getLogger("database")

T = TypeVar("T")
Item = TypeVar("Item")
MIGRATIONS = Path(__file__).resolve().parent / "migrations"
GROUP_COMMIT_MOST = 256
ROWS_AT_ONCE = 64  # in one INSERT
CHANGES_IN_WAL = 200  # rows, after which the writer moves them into the database; SQLite does it after 1000 pages
# Of the event loop, without a further item for a group. In one turn answers are given, at its end what they bring is
# read, and in the next turn worked on; the rest is for clients to come back.
QUIET_TURNS = 4
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


_row_type: Callable[[str, list[str]], Any] = namedtuple  # as an attribute mypy takes it for a class statement


class Prepared:
    """A statement that is compiled once and then handed to the driver as text: for those that every request runs,
    because what `Connection.execute` does around a look-up costs twice what SQLite does for it.

    Parameters are named (`bindparam`; `columns` name those of an INSERT); literals of the statement keep their values.
    Rows, also of RETURNING, are named tuples, with values as the driver gives them: booleans as 0 and 1. Raises
    DBAPIError as SQLAlchemy does.
    """

    def __init__(self, statement: Any, columns: Iterable[str] | None = None) -> None:
        self._statement = statement
        self._columns = list(columns) if columns is not None else None
        self._names: list[str] = []
        self._literals: dict[str, Any] = {}
        self.text = ""
        names = [column.name for column in statement.exported_columns]
        self.row: Any = _row_type("Row", names)

    def _compile(self, dialect: Dialect) -> None:
        compiled = self._statement.compile(dialect=dialect, column_keys=self._columns)
        assert compiled.positional, "the parameters go to the driver in the order of the text"
        self._names = compiled.positiontup
        literals = {name: compiled.binds[name] for name in self._names if name in compiled.binds}
        self._literals = {name: literal.value for name, literal in literals.items() if not literal.required}
        self.text = str(compiled)

    def run(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Execute; gives the driver's cursor."""
        if not self.text:
            self._compile(connection.dialect)
        known = {**self._literals, **values} if self._literals else values
        return execute_text(connection, self.text, [known[name] for name in self._names])

    def run_rows(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Execute an INSERT of so many rows; gives how many went in and the rowid of the last one.

        In few calls: at each of them other threads get the interpreter, and this one has to win it back. Their sizes
        are powers of two, so that the driver has all their statements at hand.
        """
        if not self.text:
            self._compile(connection.dialect)
        place = f"({', '.join('?' * len(self._names))})"
        inserted, last, start = 0, 0, 0
        while start < len(rows):
            size = min(ROWS_AT_ONCE, 1 << (len(rows) - start).bit_length() - 1)
            statement = self.text.replace(place, ", ".join([place] * size))
            parameters = [values[name] for values in rows[start : start + size] for name in self._names]
            cursor = execute_text(connection, statement, parameters)
            inserted, last, start = inserted + cursor.rowcount, cursor.lastrowid, start + size
        return inserted, last

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row, or None."""
        found = self.run(connection, values).fetchone()
        return self.row._make(found) if found is not None else None

    def all(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        """All rows, as plain tuples."""
        return list(self.run(connection, values))


def execute_text(connection: Connection, statement: str, parameters: list[Any]) -> Any:
    """Run the text of a statement on the driver's connection below SQLAlchemy's; gives the driver's cursor."""
    driver = connection.connection.dbapi_connection
    assert driver is not None
    try:
        return driver.execute(statement, parameters)
    except sqlite3.Error as error:
        raise DBAPIError.instance(statement, None, error, sqlite3.Error, dialect=connection.dialect) from error


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

    def reading(self) -> contextlib.nullcontext[Connection]:
        """This thread's read connection. Every statement is a transaction of its own, so nothing is held open."""
        found: contextlib.nullcontext[Connection] | None = getattr(self._local, "connection", None)
        if found is None:
            connection = self._read_engine.connect()
            found = self._local.connection = contextlib.nullcontext(connection)
            with self._readers_lock:
                self._readers.append(connection)
        return found

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
        moved = 0  # of the connection's changes, how many a checkpoint has met
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
                    moved = 0
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
            if connection is not None and (changed := _changes(connection)) - moved >= CHANGES_IN_WAL:
                moved = changed
                self._checkpoint(connection)
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

    def _checkpoint(self, connection: Connection) -> None:
        """Move what the WAL holds into the database, after the answers: SQLite's own would let a group wait for it."""
        with self._exclusive_writing(), contextlib.suppress(DBAPIError):  # the WAL keeps it; SQLite tries again
            execute_text(connection, "PRAGMA wal_checkpoint(PASSIVE)", []).fetchall()

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


class Together(Generic[Item, T]):
    """Items of one kind that coroutines of one event loop want written. Those that come while a write is under way are
    the next one: a write of many costs the interpreter little more than that of a single item.

    `write_all` makes such a write, which gives for each item what came of it, or the error to raise.
    """

    def __init__(self, database: Database, write_all: Callable[[list[Item]], Write[list[T | Exception]]]) -> None:
        self._database = database
        self._write_all = write_all
        self._waiting: list[tuple[Item, asyncio.Future[T]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(self, item: Item) -> T:
        """What came of the item, once it is durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((item, future))
        if self._writing is None:
            self._writing = loop.create_task(self._write())
        return await future

    async def _write(self) -> None:
        try:
            while self._waiting:
                await self._gathered()
                group = self._waiting[:GROUP_COMMIT_MOST]
                del self._waiting[:GROUP_COMMIT_MOST]
                await self._write_group(group)
        finally:
            self._writing = None

    async def _gathered(self) -> None:
        """Return when some turns of the loop have brought nothing more. The writer would have to wrest the interpreter
        from it, statement by statement, for a group that the next items could have been in."""
        known, quiet = 0, 0
        while quiet < QUIET_TURNS and len(self._waiting) < GROUP_COMMIT_MOST:
            quiet = quiet + 1 if len(self._waiting) == known else 0
            known = len(self._waiting)
            await asyncio.sleep(0)

    async def _write_group(self, group: list[tuple[Item, asyncio.Future[T]]]) -> None:
        results: list[T | Exception]
        try:
            results = await self._database.write_async(self._write_all([item for item, _ in group]))
        except Exception as error:
            if len(group) > 1:  # one of them may be to blame, and only that one fails
                await asyncio.gather(*(self._write_group([one]) for one in group))
                return
            results = [error]
        for (_, future), result in zip(group, results, strict=True):
            if future.done():  # the client hung up; the item is durable all the same
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _delete_fence(connection: Connection) -> None:
    connection.execute(delete(models.meta).where(models.meta.c.name == FENCE))


def _settle_all(requests: list[_Request]) -> None:
    for request in requests:
        request.settle()


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)


def _changes(connection: Connection) -> int:
    """How many rows this connection has changed."""
    driver = connection.connection.dbapi_connection
    assert driver is not None
    return int(driver.total_changes)


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
