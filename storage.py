"""The files of jobs: what came in, the output as it grows, and results published whole.

    <JOBS_DIR>/<job_id>/          solution.py config.json stdout stderr turns results.jsonl   (0700)
    <JOBS_DIR>/results/           {user}_{comp}_{time}.jsonl, a hard link to the above
    <JOBS_DIR>/.nodes/            the embedded nodes' own folders (see local_executor)

May import `clock`, `results`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import clock
from results import ResultsFile, describe, records_of_file, records_of_output, write_records

STREAMS = ("stdout", "stderr")
MERGED = "merged"
# How long stdout and stderr were at each change from one to the other; what follows the last is of one stream.
TURNS_NAME = "turns"
TURN = struct.Struct("<QQ")
TURNS_READ = 1 << 16  # bytes of turns that are looked at for one read
TURNS_EXACT = 1 << 17  # turns that a node notes; beyond them the order is that in which output arrived
CODE_NAME = "solution.py"
RESULTS_NAME = "results.jsonl"


@dataclass(frozen=True)
class Published:
    """Where a result stands below `results/`, and when it was published (microseconds)."""

    name: str
    published_at: int


@dataclass(frozen=True)
class OutputPart:
    """Some output: pieces (stream, bytes) that follow one another, of `size` bytes that there are.

    `origin` tells the files of one attempt from those of another; 0 when there are none yet.
    """

    origin: int = 0
    size: int = 0
    pieces: list[tuple[str, bytes]] = field(default_factory=list)
    exact: bool = True  # for merged output: whether the order is wholly that in which it was printed


def read_output(folder: Path, stream: str, offset: int, most: int) -> OutputPart:
    """At most `most` bytes from `offset` of stdout, stderr, or both merged in the order in which they were printed."""
    return _read_merged(folder, offset, most) if stream == MERGED else _read_one(folder, stream, offset, most)


def _read_one(folder: Path, stream: str, offset: int, most: int) -> OutputPart:
    try:
        handle = os.open(folder / stream, os.O_RDONLY)
    except FileNotFoundError:
        return OutputPart()
    try:
        data = os.pread(handle, most, offset)
        status = os.fstat(handle)
        return OutputPart(status.st_ino, status.st_size, [(stream, data)] if data else [])
    finally:
        os.close(handle)


def _read_merged(folder: Path, offset: int, most: int) -> OutputPart:
    while True:
        with contextlib.ExitStack() as stack:
            handles = []
            for name in (*STREAMS, TURNS_NAME):
                try:
                    handles.append(os.open(folder / name, os.O_RDONLY))
                except FileNotFoundError:
                    if name == STREAMS[0]:
                        return OutputPart()
                    handles.append(os.open(os.devnull, os.O_RDONLY))  # from before there were turns
                stack.callback(os.close, handles[-1])
            origin = os.fstat(handles[0]).st_ino
            part = _merge(origin, handles[:2], handles[2], offset, most)
        try:
            if os.stat(folder / STREAMS[0]).st_ino == origin:
                return part
        except FileNotFoundError:
            return OutputPart()


def _merge(origin: int, files: list[int], turns: int, offset: int, most: int) -> OutputPart:
    """The part from `offset`. Between two turns is output of one stream, and after the last one; where an order was
    lost stdout comes first, as `JobOutput` then notes it."""
    sizes = [os.fstat(file).st_size for file in files]  # before the turns, so that they cover all of it
    count = os.fstat(turns).st_size // TURN.size
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if sum(TURN.unpack(os.pread(turns, TURN.size, middle * TURN.size))) <= offset:
            low = middle + 1
        else:
            high = middle
    at = list(TURN.unpack(os.pread(turns, TURN.size, (low - 1) * TURN.size))) if low else [0, 0]
    following = os.pread(turns, min(TURNS_READ, (count - low) * TURN.size), low * TURN.size)
    goals: list[tuple[int, ...]] = list(TURN.iter_unpack(following[: len(following) // TURN.size * TURN.size]))
    if low + len(goals) == count:
        goals.append(tuple(sizes))
    before, room = offset - sum(at), most
    runs: list[tuple[int, int, int]] = []
    for goal in goals:
        for index in range(len(files)):
            length = max(0, min(goal[index], sizes[index]) - at[index])
            passed = min(before, length)
            taken = min(length - passed, room)
            if taken:
                runs.append((index, at[index] + passed, taken))
            before, room = before - passed, room - taken
            at[index] += passed + taken
            if not room or at[index] < goal[index]:
                break
        else:
            continue
        break
    total = sum(sizes)
    return OutputPart(origin, total, _read_runs(files, runs), count < TURNS_EXACT)


def _read_runs(files: list[int], runs: list[tuple[int, int, int]]) -> list[tuple[str, bytes]]:
    """The pieces of runs (file, offset, length) that go through each file from its first to its last one."""
    blocks: list[tuple[int, memoryview]] = []
    for index, file in enumerate(files):
        own = [(begin, length) for number, begin, length in runs if number == index]
        begin = own[0][0] if own else 0
        end = own[-1][0] + own[-1][1] if own else 0
        blocks.append((begin, memoryview(os.pread(file, end - begin, begin))))
    return [
        (STREAMS[index], bytes(blocks[index][1][begin - blocks[index][0] :][:length])) for index, begin, length in runs
    ]


def sync_folder(path: Path) -> None:
    """Make renames and links in the folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Storage:
    """The files below JOBS_DIR."""

    def __init__(self, jobs_dir: Path) -> None:
        self.jobs_dir = jobs_dir
        self.results_dir = jobs_dir / "results"
        self._make_folders()

    def _make_folders(self) -> None:
        """At the start, and again when somebody has removed them since."""
        self.results_dir.mkdir(parents=True, exist_ok=True)
        self.results_dir.chmod(0o700)

    def folder(self, job_id: str) -> Path:
        """The job's folder, which may not exist yet."""
        return self.jobs_dir / job_id

    def free_bytes(self) -> int:
        """Bytes free for this user where the jobs are."""
        try:
            stat = os.statvfs(self.jobs_dir)
        except FileNotFoundError:
            self._make_folders()
            stat = os.statvfs(self.jobs_dir)
        return stat.f_bavail * stat.f_frsize

    def prepare(self, job_id: str, code: bytes, config: dict[str, Any]) -> None:
        """Make the job's folder with its inputs. They are copies of what the database holds, so not synced."""
        folder = self.folder(job_id)
        if not self.results_dir.is_dir():
            self._make_folders()
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / CODE_NAME).write_bytes(code)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def output(self, job_id: str, attempt: int) -> JobOutput:
        """The growing output of this attempt; that of a former attempt is put aside as `stdout.attempt-1` and so on.

        The file `attempt` says whose output is there; without it, it is the first one's.
        """
        folder = self.folder(job_id)
        marker = folder / "attempt"
        try:
            former = marker.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            former = "1"
        if former != str(attempt):
            self.unpublish(job_id)
            for name in (*STREAMS, TURNS_NAME, RESULTS_NAME):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(folder / name, folder / f"{name}.attempt-{former}")
            marker.write_text(f"{attempt}\n", encoding="ascii")
        return JobOutput(folder)

    @contextlib.contextmanager
    def incoming(self, job_id: str) -> Iterator[IO[bytes]]:
        """A temporary file in the job's folder, for results on their way from the node."""
        with tempfile.TemporaryFile(dir=self.folder(job_id), prefix=".incoming-") as handle:
            yield handle

    def seal_results(self, job_id: str, source: IO[bytes] | None, max_bytes: int, max_line_bytes: int) -> ResultsFile:
        """Validate the results and write them whole to the job's folder; without `source` they are made of stdout.

        Doing it again after a crash finds what was sealed then, so that its published name stays true.
        Raises results.ResultsInvalid, results.ResultsTooLarge; then nothing is left behind.
        """
        folder = self.folder(job_id)
        with contextlib.suppress(FileNotFoundError), open(folder / RESULTS_NAME, "rb") as sealed:
            return describe(sealed)
        temporary = folder / (RESULTS_NAME + ".tmp")
        try:
            with contextlib.ExitStack() as stack:
                if source is None:
                    lines = records_of_output(stack.enter_context(open(folder / "stdout", "rb")), max_line_bytes)
                else:
                    source.seek(0)
                    lines = records_of_file(source, max_line_bytes)
                target = stack.enter_context(open(temporary, "wb"))
                written = write_records(lines, target, max_bytes)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, folder / RESULTS_NAME)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return written

    def publish(self, job_id: str, user_id: str, competition_id: str, completed_at: int) -> Published:
        """Give the sealed results their final name: it appears whole, and no other file is ever overwritten.

        Doing it again after a crash finds the name it was given before.
        """
        sealed = self.folder(job_id) / RESULTS_NAME
        former = self._published_name(sealed)
        if former is not None:
            return Published(former, completed_at)
        stem = f"{user_id}_{competition_id}_{clock.file_stamp(completed_at)}"
        number = 1
        while True:
            name = f"{stem}.jsonl" if number == 1 else f"{stem}_{number}.jsonl"
            try:
                os.link(sealed, self.results_dir / name)
                break
            except FileExistsError:
                number += 1
            except OSError as error:  # another file system, or one without hard links (some network shares)
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                if self._copy_new(sealed, self.results_dir / name):
                    break
                number += 1
        sync_folder(self.results_dir)
        return Published(name, completed_at)

    def unpublish(self, job_id: str) -> None:
        """Take back a name in `results/` that was given before a crash to a job that did not complete."""
        name = self._published_name(self.folder(job_id) / RESULTS_NAME)
        if name is not None:
            (self.results_dir / name).unlink(missing_ok=True)

    def _published_name(self, sealed: Path) -> str | None:
        try:
            status = sealed.stat()
        except FileNotFoundError:
            return None
        if status.st_nlink < 2:  # nearly always; only after a crash there is something to look for
            return None
        with os.scandir(self.results_dir) as entries:
            return next((entry.name for entry in entries if entry.inode() == status.st_ino), None)

    def _copy_new(self, source: Path, target: Path) -> bool:
        """Copy whole to a name that must not exist yet; False when it does."""
        if target.exists():
            return False
        with tempfile.NamedTemporaryFile(dir=self.results_dir, prefix=".", delete=False) as handle:
            try:
                with open(source, "rb") as reader:
                    shutil.copyfileobj(reader, handle, 1 << 20)
                handle.flush()
                os.fsync(handle.fileno())
                try:
                    os.link(handle.name, target)  # unlike a rename it never overwrites
                except FileExistsError:
                    return False
                except OSError:
                    os.rename(handle.name, target)
            finally:
                Path(handle.name).unlink(missing_ok=True)
        return True

    def remove(self, job_id: str, result_file: str | None) -> None:
        """Delete everything of a job. Doing it again, or when parts are gone, is fine."""
        if result_file is not None:
            (self.results_dir / result_file).unlink(missing_ok=True)
        doomed = self.jobs_dir / f".removing-{job_id}"
        with contextlib.suppress(FileNotFoundError):
            self.folder(job_id).rename(doomed)  # out of the way first: a reader finds all of it or nothing
        shutil.rmtree(doomed, ignore_errors=True)

    def read_output(self, job_id: str, stream: str, offset: int, most: int) -> OutputPart:
        """See `read_output`."""
        return read_output(self.folder(job_id), stream, offset, most)

    def output_path(self, job_id: str, stream: str) -> Path:
        """The file of one output stream; it may not exist yet."""
        return self.folder(job_id) / stream

    def results_path(self, job_id: str) -> Path:
        """The job's sealed results; they may not exist."""
        return self.folder(job_id) / RESULTS_NAME


class JobOutput:
    """stdout and stderr of one attempt, appended in order. `offsets` are the bytes that are here.

    In which order the two grew is kept beside them (`turns`, see `read_output`): a turn is written before the bytes
    that follow it, and never says more than is there.
    """

    def __init__(self, folder: Path) -> None:
        self._turns_path = folder / TURNS_NAME
        self._turns: IO[bytes] | None = self._open_turns() if self._turns_path.exists() else None
        # stdout is last: a reader knows by it whether the files are of the same attempt.
        files = {stream: open(folder / stream, "ab", buffering=0) for stream in reversed(STREAMS)}  # noqa: SIM115
        self._files = {stream: files[stream] for stream in STREAMS}
        self.offsets = {stream: os.fstat(file.fileno()).st_size for stream, file in self._files.items()}
        self._last_turn = self._usable_turns()

    def _open_turns(self) -> IO[bytes]:
        return open(self._turns_path, "a+b", buffering=0)

    def _usable_turns(self) -> dict[str, int]:
        """Drop turns that are cut, or say more than is there, after a loss of power; the last one, (0, 0) for none."""
        last = dict.fromkeys(STREAMS, 0)
        if self._turns is None:
            return last
        handle = self._turns.fileno()
        count = os.fstat(handle).st_size // TURN.size
        while count:
            last = dict(zip(STREAMS, TURN.unpack(os.pread(handle, TURN.size, (count - 1) * TURN.size)), strict=True))
            if all(last[stream] <= self.offsets[stream] for stream in STREAMS):
                break
            count, last = count - 1, dict.fromkeys(STREAMS, 0)
        os.ftruncate(handle, count * TURN.size)
        return last

    def append(self, stream: str, offset: int, data: bytes) -> None:
        """Add bytes that start at `offset` of the stream; what is here already is skipped.

        Raises ValueError when bytes are missing in between.
        """
        have = self.offsets[stream]
        if offset > have:
            raise ValueError(f"{stream} continues at {offset}, but only {have} bytes are here")
        fresh = memoryview(data)[have - offset :]
        if fresh and any(self.offsets[other] > self._last_turn[other] for other in STREAMS if other != stream):
            self._last_turn = dict(self.offsets)
            if self._turns is None:
                self._turns = self._open_turns()
            if self._turns.write(TURN.pack(*self._last_turn.values())) != TURN.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while fresh:
            written = self._files[stream].write(fresh)
            self.offsets[stream] += written
            fresh = fresh[written:]

    def truncate(self) -> None:
        """Forget everything: the stream is fetched again from its beginning."""
        for stream, file in self._files.items():
            os.ftruncate(file.fileno(), 0)
            self.offsets[stream] = 0
        if self._turns is not None:
            os.ftruncate(self._turns.fileno(), 0)
        self._last_turn = dict.fromkeys(STREAMS, 0)

    def sync(self) -> None:
        """Make what was appended durable."""
        for stream, file in self._files.items():
            if self.offsets[stream]:
                os.fdatasync(file.fileno())
        if self._turns is not None and any(self._last_turn.values()):
            os.fdatasync(self._turns.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        if self._turns is not None:
            self._turns.close()
