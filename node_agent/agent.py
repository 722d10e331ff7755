"""The node agent: starts jobs on a GPU node, keeps their limits, and lets the server follow them.

One agent serves one server connection over stdin and stdout. It keeps no state of its own: an attempt (one launch of a
job) is a directory, and a detached supervisor process per attempt runs the job with or without an agent connected.

    <root>/agent.lock               held (flock) by the one serving agent
           agent.log
           tmp/<random>/            attempts being prepared
           trash/                   what is being removed
           gate/sitecustomize.py    where an interpreter waits that was started before its job (see GATE)
           survivors.<job>.<n>      processes of an ended attempt that not even SIGKILL ended, until they are gone
           attempts/<job>.<n>/      spec.json supervisor.json lock control stdout stderr turns exit.json work/

Framing, both ways: one JSON object per line; if it has "size": n, exactly n raw bytes follow. Every request
`{"op", "id"}` gets one reply `{"re", "ok", "clock"}`; "output" and "exit" are pushed. All times in messages are seconds
of this node's own CLOCK_BOOTTIME: the wall clock is never used, and clocks of two machines are never compared.

Nothing a job does, prints or writes is trusted. Standard library only, Python 3.8 or newer, one file (it is copied to
nodes), no import of other project modules. The supervisor is a fork of the agent, so all it needs is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import pwd
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
import traceback
from collections import deque
from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, NoReturn, Optional, Tuple

PROTOCOL = 1
FORMAT = 1  # of the attempt's directory and of exit records

MAX_LINE = 4 << 20
MAX_PAYLOAD = 256 << 20
MAX_FETCH = 1 << 20
CHUNK = 256 << 10  # largest output frame, and largest results sent along with an exit
HIGH_WATER = 1 << 20  # bytes queued for the server at which output is no longer read from disk
PIPE_READ = 64 << 10
LOG_LIMIT = 1 << 20
MAX_SURVIVORS = 64  # that are remembered by number; the rest by their group
SURVIVORS = "survivors."  # how the names of their notes begin
MAX_CLIENTS = 8  # agents connected to one supervisor; only the newest matters

SPARE_DELAY = 0.05  # seconds after the start at which the first supervisor is forked
PRESTART_DELAY = 0.02  # seconds without a launch, in which what follows a job's end has the processor for itself
EXPECT_DELAY = 1.0  # seconds after the server has told what to expect: when it has just come up there is much to do
GATE_LIMIT = 2.0  # seconds that a launch waits for an interpreter that is being prestarted
PRESTART_AGE = 300.0  # seconds after which an interpreter that waits is started anew, with what the node has by then
SYNC_DELAY = 0.1  # seconds for the server to commit an exit before the disk here is made to hold its record for good
HOLD = 0.03  # seconds that the word of a launch waits for output or the exit, to go out with it
LAZY = 0.05  # seconds that an answer waits which nobody is in a hurry for
CLEAN_DELAY = 1.0  # seconds for further attempts to be forgotten before what they left is removed
COALESCE = 0.005  # seconds between two output frames of a flood; a first line never waits
# From stdout to stderr or back is a turn; each is noted as how long both then are. What comes after the last one that
# is noted goes out at a slower pace, since each frame may then be a turn to the server.
TURN = struct.Struct("<QQ")
MAX_TURNS = 1 << 17
COALESCE_UNNOTED = 0.25
TURNS_READ = 1 << 16
PROBE_LIMIT = 20.0
KILL_LIMIT = 5.0  # seconds of repeated SIGKILL before what is left is called a survivor
LOOKS = 5  # more at a lost supervisor's job once it was seen to fork all the time: one alone may miss it
WALK_EVERY = 8  # rounds of these: one looks at all processes, not only at our children
DRAIN_LIMIT = 1.0  # seconds for the rest of the output once everything is dead
# Seconds after which a sandbox that was not seen to fail counts as having started the command. Where the kernel tells
# a process's children the start is seen, however slow the node; elsewhere this is a guess about quick ones.
CONFIRM_LIMIT, CONFIRM_GUESS = 4.0, 0.25
OVERDUE = 60.0  # seconds past its last deadline at which a silent supervisor is taken for stopped

STREAMS = ("stdout", "stderr")
TOOL_PATH = "/usr/bin:/usr/local/bin:/bin:/usr/sbin"
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
START_ENVIRONMENT = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8"}  # of every job
JOB_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
ATTEMPT_DIRECTORY = re.compile(r"([A-Za-z0-9_-]{1,64})\.([1-9][0-9]{0,8})\Z")
IDENTITY = "supervisor.json"
KILL_REASONS = ("cancelled", "superseded")
LAUNCH, PRESTART = b"L", b"P"  # what is sent to a supervisor standing by, with a file in memory

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
AT_FDCWD, RENAME_NOREPLACE = -100, 1
LIBC = ctypes.CDLL(None, use_errno=True)
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

Json = Dict[str, Any]


class Refused(Exception):
    """A request that is answered `ok: false` with a code and a sentence."""

    def __init__(self, code: str, message: str, size: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.size = size  # of the file in question, where that is known


# --------------------------------------------------------------------------------------------------- small things


def clock() -> float:
    """Seconds of this node's clock; it goes on while the machine sleeps and nobody can set it."""
    return time.clock_gettime(CLOCK)


def log(message: str) -> None:
    """One line in agent.log (stderr)."""
    with contextlib.suppress(OSError):  # a full disk must not stop jobs
        os.write(2, f"{clock():.3f} [{os.getpid()}] {message}\n".encode("utf-8", "replace"))


def compact(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def read_at(directory: int, name: str, limit: int = MAX_LINE) -> bytes | None:
    """A small regular file below an open directory, or None."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None
    try:
        return os.read(fd, limit) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def read_json_at(directory: int, name: str) -> Json | None:
    try:
        value = json.loads(read_at(directory, name) or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_identity(directory: int) -> Json:
    """What an attempt's supervisor says of itself and of the job's first process; empty when it says nothing."""
    # It is written in place: a look in the middle of that is repeated.
    return read_json_at(directory, IDENTITY) or read_json_at(directory, IDENTITY) or {}


def write_at(directory: int, name: str, data: bytes) -> None:
    """Write a new file, or replace a whole one (rename), below an open directory."""
    fd = os.open(name + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
    os.rename(name + ".new", name, src_dir_fd=directory, dst_dir_fd=directory)


def make_file(directory: int, name: str) -> int:
    """A new file below an open directory, to append to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def open_directory(path: str, directory: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def take_lock(directory: int, create: bool = False) -> int | None:
    """The lock of an attempt, taken: a descriptor to keep open. None: someone holds it. FileNotFoundError: no lock."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    fd = os.open("lock", flags, 0o600, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def is_locked(directory: int) -> bool:
    """Whether the attempt's supervisor lives. The flock is the truth: it needs no pid and cannot be stale."""
    try:
        fd = take_lock(directory)
    except OSError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False


def rename_new(source: str, target: str) -> bool:
    """Rename a directory unless the target exists, then False; plain rename would replace an empty directory."""
    try:
        result = LIBC.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
        code = ctypes.get_errno() if result else 0
    except AttributeError:  # a C library older than the call
        code = errno.ENOSYS
    if code in (errno.ENOSYS, errno.EINVAL):  # kernel or file system without the flag
        try:
            os.rename(source, target)
            return True
        except OSError as error:
            code = error.errno or errno.EIO
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    if code:
        raise OSError(code, os.strerror(code), target)
    return True


def random_name() -> str:
    return os.urandom(8).hex()


def find_tool(name: str) -> str | None:
    for folder in (os.environ.get("PATH", "") + ":" + TOOL_PATH).split(":"):
        path = os.path.join(folder, name)
        if folder.startswith("/") and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


class Process(NamedTuple):
    """What /proc/<pid>/stat says. `start` is in clock ticks since boot: with the pid it names one process for ever."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    start: int


def read_process(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            raw = file.read()
    except OSError:
        return None
    if b")" not in raw:
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()  # the name before it may hold anything
    state = fields[0].decode()
    if state == "Z" and int(fields[17]) > 1:
        state = "S"  # only its first thread has ended
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), state, int(fields[19]))


def newest_processes() -> Iterator[Process]:
    """All processes, mostly the newest first, each read when it is asked for: what forks all the time is soon gone."""
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
        process = read_process(pid)
        if process is not None:
            yield process


def all_processes() -> dict[int, Process]:
    return {process.pid: process for process in newest_processes()}


def descendants(table: dict[int, Process], roots: Iterable[int]) -> list[Process]:
    """Every process below the roots, without the roots and without zombies."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.ppid, []).append(process.pid)
    todo, seen = list(roots), set(roots)
    result = []
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in seen:
                seen.add(pid)
                todo.append(pid)
                if table[pid].state not in "ZX":
                    result.append(table[pid])
    return result


def children_of(pid: int) -> list[int] | None:
    """Children of a single-threaded process, without a walk through /proc; None where the kernel doesn't tell."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return None


def send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):  # already gone, or another user's
        os.kill(pid, number)


def kill_for_good(process: Process) -> None:
    """SIGKILL to a process of a job and to its group, which is of the same job: no one joins from another session.

    A process that forks all the time and ends is gone before a signal to it comes. The kernel signals a whole group in
    one step with regard to fork: who forks meanwhile starts over and dies.
    """
    send_signal(process.pid, signal.SIGKILL)
    if process.pgid > 1 and process.pgid != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(process.pgid, signal.SIGKILL)


def is_running(identity: Json, boot: str) -> bool:
    """Whether the process recorded as {pid, start_time, boot_id} still is that process."""
    pid = identity.get("pid")
    process = read_process(pid) if type(pid) is int and identity.get("boot_id") == boot else None
    return process is not None and process.start == identity.get("start_time") and process.state not in "ZX"


# --------------------------------------------------------------------------------------------------- files of a job


def open_results(attempt: int, name: str, limit: int) -> tuple[int, int]:
    """Open the results file for reading: (descriptor, size). FileNotFoundError: the job left none.

    The job may have made anything under that name. So each step is opened relative to the last and never through a
    link, nothing is waited for (FIFO), and only an own, regular, singly linked file of bounded size is accepted.
    """
    invalid = f"The results file {name} is not a plain file of the job: "
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        work = open_directory("work", attempt)
        try:
            fd = os.open(name, flags, dir_fd=work)
        finally:
            os.close(work)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "it is or lies behind a symbolic link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise Refused("results_invalid", f"{invalid}{what}.") from None
    info = os.fstat(fd)
    message = ""
    if not stat.S_ISREG(info.st_mode):
        message = f"{invalid}it is a directory, pipe, socket or device."
    elif info.st_uid != os.getuid():
        message = f"{invalid}it belongs to another user."
    elif info.st_nlink != 1:
        message = f"{invalid}it has {info.st_nlink} hard links."
    if message or info.st_size > limit:
        os.close(fd)
        if message:
            raise Refused("results_invalid", message)
        message = f"The results file has {info.st_size} bytes; at most {limit} are taken."
        raise Refused("results_too_large", message, info.st_size)
    return fd, info.st_size


def describe_results(attempt: int, name: str, limit: int) -> Json:
    """State, size and digest of the results as they are now; read only if they are acceptable."""
    try:
        fd, size = open_results(attempt, name, limit)
    except FileNotFoundError:
        return {"state": "absent"}
    except Refused as refused:
        answer: Json = {"state": refused.code[len("results_") :], "message": str(refused)}
        return answer if refused.size is None else {**answer, "bytes": refused.size}
    try:
        digest, left = hashlib.sha256(), size
        while left:
            data = os.read(fd, min(CHUNK, left))
            if not data:
                return {"state": "invalid", "message": "The results file changed while it was read."}
            digest.update(data)
            left -= len(data)
    except OSError as error:
        return {"state": "invalid", "message": f"The results file could not be read: {error.strerror}."}
    finally:
        os.close(fd)
    return {"state": "inline" if size <= CHUNK else "large", "bytes": size, "sha256": digest.hexdigest()}


def empty_trash(root: str) -> None:
    """Remove everything in trash/, whatever a job left there: unreadable folders, a million files, any depth.

    A subfolder is first moved up into trash/ itself, so that no path grows long and no descriptor is kept per level.
    """
    trash = open_directory(os.path.join(root, "trash"))
    deadline = clock() + KILL_LIMIT
    while True:
        skipped = progress = False
        for name in os.listdir(trash):
            try:
                if _remove_one(trash, name):
                    progress = True
                else:
                    skipped = True
            except FileNotFoundError:
                progress = True  # another remover was faster
            except OSError as error:
                log(f"cannot remove trash/{name}: {error}")
        if progress:
            continue
        if not skipped or clock() > deadline:
            break
        time.sleep(0.05)  # a supervisor is writing its last words
    os.close(trash)


def _remove_one(trash: int, name: str) -> bool:
    """Remove one entry, its subfolders moved up. False: a supervisor still holds its lock."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=trash, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=trash)
        return True
    os.chmod(name, 0o700, dir_fd=trash)
    folder = open_directory(name, trash)
    lock = None
    try:
        try:
            lock = take_lock(folder)
            if lock is None:
                return False
        except OSError:
            pass  # no lock, or the job's own thing under that name
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.name, 0o700, dir_fd=folder)  # moving a folder needs write permission on itself
                    os.rename(entry.name, random_name(), src_dir_fd=folder, dst_dir_fd=trash)
                else:
                    os.unlink(entry.name, dir_fd=folder)
        try:
            os.rmdir(name, dir_fd=trash)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # entries that came or were skipped during the scan: next round
                raise
    finally:
        os.close(folder)
        if lock is not None:
            os.close(lock)
    return True


def clear_leftovers(root: str) -> None:
    """Remove what a dead agent left: attempts never finished preparing (their lock is free), and trash."""
    tmp = os.path.join(root, "tmp")
    for name in os.listdir(tmp):
        path = os.path.join(tmp, name)
        try:
            folder = open_directory(path)
        except OSError:
            if not os.path.exists(path):
                with contextlib.suppress(OSError):
                    os.unlink(path)  # the way to an attempt that is gone
            continue
        lock = None
        try:
            try:
                lock = take_lock(folder)
                free = lock is not None
            except OSError:
                free = time.time() - os.fstat(folder).st_mtime > 60  # else a supervisor may be about to lock it
            if free:
                os.rename(path, os.path.join(root, "trash", random_name()))
        except OSError as error:
            log(f"cannot clear tmp/{name}: {error}")
        finally:
            os.close(folder)
            if lock is not None:
                os.close(lock)
    clear_groups()
    empty_trash(root)


# --------------------------------------------------------------------------------------------------- the sandbox

ETC_FILES: tuple[str, ...] = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "alternatives",
    "localtime",
    "ssl",
    "ca-certificates",
    "pki",
)
ETC_FILES += ("nsswitch.conf", "protocols", "services")
ETC_NETWORK = ("resolv.conf", "hosts")
GPU_DEVICES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
GPU_SYSTEM = ("/sys/devices", "/sys/bus/pci", "/sys/module/nvidia", "/sys/module/nvidia_uvm")
NEVER_BOUND = ("/proc", "/sys", "/dev", "/job")


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def visible_paths(root: str, prefixes: Iterable[str], binds: Iterable[str]) -> list[str]:
    """The node's paths a job may read besides the system. Whole homes are refused as Python prefixes."""
    refused = {"/", "/home", "/root", "/etc", "/var", "/tmp", os.path.normpath(os.path.expanduser("~"))}  # noqa: S108  # refused as a bind
    result = []
    for path, is_prefix in [(p, True) for p in prefixes] + [(b, False) for b in binds]:
        path = os.path.normpath(path)
        if not path.startswith("/") or path in ("/", "//") or any(_below(path, never) for never in NEVER_BOUND):
            continue
        if _below(path, "/usr") or _below(path, root):
            continue  # there anyway, or an attempt of somebody
        if is_prefix and (path in refused or _below(root, path)):
            continue
        if path not in result and os.path.exists(path):
            result.append(path)
    return sorted(result)  # outer paths first, so that they do not cover inner ones


# What no job needs and holes were found in: the calls that the published default lists of Docker
# (moby/profiles, seccomp/default.json) and Flatpak (common/flatpak-run.c) both refuse, and Docker's further ones.
# ptrace stays, as in Docker's: a sandbox has its own process table, and debuggers and profilers need it. The calls for
# NUMA (mbind, move_pages, set_mempolicy) stay as well: numerical libraries use them.
REFUSED_CALLS = (
    *("mount", "umount", "umount2", "pivot_root", "chroot", "setns", "unshare"),
    *("kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd"),
    *("init_module", "finit_module", "delete_module", "create_module", "get_kernel_syms", "query_module"),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("add_key", "request_key", "keyctl", "open_by_handle_at", "fanotify_init", "lookup_dcookie", "syslog"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "stime", "iopl", "ioperm", "modify_ldt"),
    *("nfsservctl", "vhangup", "uselib", "ustat", "sysfs", "_sysctl", "vm86", "vm86old", "kcmp"),
)
# "Not there", so that the libraries take the older call: the flags of clone3 are out of a filter's sight.
ABSENT_CALLS = ("clone3", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr")
SCMP_ALLOW, SCMP_ERRNO, SCMP_ACT_BADARCH, SCMP_MASKED_EQ = 0x7FFF0000, 0x00050000, 2, 7
CLONE_NEWUSER, TIOCSTI, TIOCLINUX = 0x10000000, 0x5412, 0x541C


class Comparison(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp: (argument & mask) == value."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("mask", ctypes.c_uint64), ("value", ctypes.c_uint64)]


@functools.lru_cache(maxsize=1)
def seccomp_filter() -> tuple[bytes, str]:
    """(the filter for jobs as bubblewrap takes it, "") or (nothing, why there is none)."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return b"", "libseccomp is not installed."
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(SCMP_ALLOW)))
    program = os.memfd_create("seccomp", os.MFD_CLOEXEC)

    def refuse(call: str, error: int, *comparisons: Comparison) -> None:
        number = lib.seccomp_syscall_resolve_name(call.encode())
        array = (Comparison * len(comparisons))(*comparisons)
        action = ctypes.c_uint32(SCMP_ERRNO | error)
        # Calls that this machine does not have get numbers below zero.
        if number >= 0 and lib.seccomp_rule_add_array(context, action, number, len(comparisons), array) != 0:
            raise OSError(f"libseccomp takes no rule for {call}")

    try:
        lib.seccomp_attr_set(context, SCMP_ACT_BADARCH, ctypes.c_uint32(SCMP_ERRNO | errno.EPERM))
        for call in REFUSED_CALLS:
            refuse(call, errno.EPERM)
        for call in ABSENT_CALLS:
            refuse(call, errno.ENOSYS)
        refuse("clone", errno.EPERM, Comparison(0, SCMP_MASKED_EQ, CLONE_NEWUSER, CLONE_NEWUSER))
        for command in (TIOCSTI, TIOCLINUX):
            refuse("ioctl", errno.EPERM, Comparison(1, SCMP_MASKED_EQ, 0xFFFFFFFF, command))
        if lib.seccomp_export_bpf(context, program) != 0:
            raise OSError("libseccomp could not write the filter")
        return os.pread(program, 1 << 20, 0), ""
    except OSError as error:
        return b"", f"{error}."
    finally:
        os.close(program)
        lib.seccomp_release(context)


def bwrap_argv(
    bwrap: str,
    root: str,
    work: str,
    sandbox: Json,
    status: int,
    files: dict[str, int],
    seccomp: int | None,
    gate: str | None,
    command: list[str],
) -> list[str]:
    """The command line that runs `command` in its sandbox with `work` as /job, the only writable folder of the node.

    `status` is the descriptor for --json-status-fd, `files` maps paths inside to descriptors with their content,
    `seccomp` is one with the filter, `gate` the folder with what a prestarted interpreter begins with.
    The environment is not set here: bwrap is executed with exactly the job's, so /proc/1/environ holds no other.
    Capabilities are dropped because an agent run by root would otherwise hand them to the job, which could remount.
    bwrap reports a death by signal n as exit code 128+n; `outcome` translates it back.
    """
    network = sandbox["network"] == "host"
    argv = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    argv += ([] if network else ["--unshare-net"]) + ["--die-with-parent", "--new-session", "--hostname", "job"]
    argv += ["--cap-drop", "ALL", "--json-status-fd", str(status), "--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            argv += ["--ro-bind", path, path]
    for name in ETC_FILES + (ETC_NETWORK if network else ()):
        if os.path.exists("/etc/" + name):
            argv += ["--ro-bind-try", "/etc/" + name, "/etc/" + name]
    for path, fd in files.items():
        argv += ["--file", str(fd), path]
    argv += [] if gate is None else ["--ro-bind", gate, GATE_FOLDER]
    argv += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm", "--tmpfs", "/tmp"]  # noqa: S108  # in the sandbox's own memory
    if os.path.isdir("/var"):
        argv += ["--tmpfs", "/var/tmp"]  # noqa: S108  # in the sandbox's own memory
    gpus = sandbox["gpus"]
    nodes = glob.glob("/dev/nvidia[0-9]*") if gpus is None else [f"/dev/nvidia{index}" for index in gpus]
    if nodes:
        for path in [f"/dev/{name}" for name in GPU_DEVICES] + sorted(nodes):
            argv += ["--dev-bind-try", path, path]
        for path in GPU_SYSTEM:
            argv += ["--ro-bind-try", path, path]
    for path in visible_paths(root, sandbox["python_prefixes"], sandbox["binds"]):
        argv += ["--ro-bind-try", path, path]
        if _below(root, path):
            argv += ["--tmpfs", root, "--remount-ro", root]  # other attempts stay out of sight
    if seccomp is not None:
        argv += ["--seccomp", str(seccomp)]
    argv += ["--bind", work, "/job", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/job", "--"]
    return argv + command


# An interpreter is started before its job comes and waits here: Python imports sitecustomize at the very end of its own
# start and only then opens the script. The system's sitecustomize, which this one hides, is imported as it would have
# been (see execsitecustomize in Lib/site.py). The job's environment comes through the gate; nothing else is told.
GATE_FOLDER = "/run/gate"  # in a sandbox
GATE_FD = 99  # above what a start has open
GATE = f"""import os, sys

def wait(gate):
    folder = __file__.rpartition("/")[0]
    sys.path.remove(folder)
    sys.path_importer_cache.pop(folder, None)
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize
    except ImportError as error:
        if error.name != "sitecustomize":
            told(error)
    except Exception as error:
        told(error)
    sys.modules.setdefault("sitecustomize", ours)
    os.write(gate, b".")
    words = b""
    while True:
        piece = os.read(gate, 65536)
        if not piece:
            break
        words += piece
    os.close(gate)
    if not words:
        os._exit(0)  # the supervisor has ended, or has another use for its time
    os.environ.clear()
    for word in words.split(b"\\0")[:-1]:
        name, _, value = word.partition(b"=")
        os.environb[name] = value

def told(error):
    text = "Error in sitecustomize; set PYTHONVERBOSE for traceback:\\n%s: %s\\n"
    sys.stderr.write(text % (error.__class__.__name__, error))

wait({GATE_FD})
""".encode()


def keep_gate(root: str) -> str:
    """The folder with GATE, which stands by for all jobs of this root: Python keeps what it has compiled of it."""
    path = os.path.join(root, "gate")
    os.makedirs(path, mode=0o700, exist_ok=True)  # a job without a sandbox can have taken it away
    gate = open_directory(path)
    try:
        if read_at(gate, "sitecustomize.py") != GATE:
            write_at(gate, "sitecustomize.py", GATE)
    finally:
        os.close(gate)
    return path


def sandbox_files() -> dict[str, int]:
    """Descriptors with the content of a passwd and a group file that know one user, `job`."""
    uid, gid = os.getuid(), os.getgid()
    content = {"/etc/passwd": f"job:x:{uid}:{gid}:job:/job:/bin/sh\n", "/etc/group": f"job:x:{gid}:\n"}
    return {path: readable(text.encode()) for path, text in content.items()}


def readable(data: bytes) -> int:
    """A descriptor from which just this can be read; at most what a pipe takes (64 KiB)."""
    reader, writer = os.pipe()
    write_all(writer, data)
    os.close(writer)
    return reader


# Signals whose default is not to end a process: an exit code of 128 plus one of these is the job's own.
HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
HARMLESS |= {signal.SIGURG, signal.SIGWINCH}


def outcome(status: int, sandboxed: bool) -> tuple[int | None, int | None]:
    """(exit code, signal) of a wait status. In a sandbox 128+n counts as signal n, which a job could also return."""
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    code = os.WEXITSTATUS(status)
    if sandboxed and 1 <= code - 128 <= 31 and code - 128 not in HARMLESS:
        return None, code - 128
    return code, None


# --------------------------------------------------------------------------------------------------- control groups

GROUP_NAME = "gpu-job-server-"
CONTROLLERS = ("memory", "pids")
CPU_WEIGHT = 50  # of a job, where version 2 gives that controller; everything else on the node has 100
NICE_STEP = 1.25  # by which one step of niceness divides a weight, as the kernel does it for processes


def group_places() -> dict[str, tuple[str, str]]:
    """Per controller (the folder this process is in, the folder in which a job's group can be made).

    Version 1: each controller has a tree of its own, and groups are made below our own one, so that what holds us
    holds jobs. Version 2: the nearest folder from our own one upwards that we may write to and that hands both
    controllers down; a folder that holds processes cannot. Empty where nothing is given to us.
    """
    mounts: dict[str, tuple[str, str]] = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            if kind in ("cgroup", "cgroup2"):
                for name in options.split(",") if kind == "cgroup" else ("",):
                    mounts.setdefault(name, (before.split()[3], before.split()[4]))
    own: dict[str, str] = {}
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            for name in names.split(","):
                if name in mounts:
                    top, point = mounts[name]
                    inside = os.path.relpath(path, top)
                    own[name] = os.path.normpath(os.path.join(point, "" if inside.startswith("..") else inside))
    places = {name: (own[name], own[name]) for name in CONTROLLERS if name in own and _may_hold_groups(own[name])}
    if "" in own and not places:
        folder, point = own[""], mounts[""][1]
        while _below(folder, point):
            if _may_hold_groups(folder) and _hands_down(folder, enable=folder in (own[""], os.path.dirname(own[""]))):
                return {name: (own[""], folder) for name in CONTROLLERS}
            folder = os.path.dirname(folder)
    return places


def _may_hold_groups(folder: str) -> bool:
    return os.access(folder, os.W_OK) and os.access(os.path.join(folder, "cgroup.procs"), os.W_OK)


def _hands_down(folder: str, enable: bool) -> bool:
    """Whether groups in this folder of version 2 have the controllers, also after asking for them."""
    path = os.path.join(folder, "cgroup.subtree_control")
    try:
        if enable:
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write("+memory +pids")
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write("+cpu")
        with open(path) as file:
            return set(CONTROLLERS) <= set(file.read().split())
    except OSError:
        return False


def write_group(group: str, name: str, value: int) -> None:
    with open(os.path.join(group, name), "w") as file:
        file.write(str(value))


def forbid_forks(groups: Iterable[str]) -> None:
    """What is being killed shall not get away by forking, where there are groups."""
    for group in groups:
        with contextlib.suppress(OSError):  # gone, or a group for something else
            if os.path.exists(os.path.join(group, "pids.max")):
                write_group(group, "pids.max", 0)


def pids_in(group: str) -> list[int]:
    try:
        with open(os.path.join(group, "cgroup.procs")) as file:
            return [int(line) for line in file]
    except OSError:
        return []


class Group:
    """The control group of one attempt, or two of them, one for each controller (version 1).

    To enter one takes the kernel 10 ms, so the supervisor does that before there is a job, which is then born in it.
    When the job runs, a helper forked beforehand takes the supervisor out again: a job that is out of memory must not
    cost its supervisor's life.
    """

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # by controller
        self.homes: dict[str, str] = {}  # by group: where this process came from
        self.reason = ""  # why a controller is missing
        self.helper = -1

    def enter(self) -> None:
        """Make the groups and put this process into them, as far as there are any."""
        made: dict[str, str] = {}
        places = group_places()
        if places:
            self._make_helper({home for home, _ in places.values()})
        for name, (home, top) in places.items():
            try:
                if top not in made:
                    made[top] = self._enter(top)
                self.folders[name], self.homes[made[top]] = made[top], home
            except OSError as error:
                self.reason = f"No control group for {name}: {error}."
        absent = [name for name in CONTROLLERS if name not in places]
        if absent and not self.reason:
            self.reason = f"No control group for {' and '.join(absent)} is given to this login."

    def _make_helper(self, homes: set[str]) -> None:
        pid = os.getpid()
        reader, self.helper = os.pipe()

        def body() -> None:
            if os.read(reader, 1):  # else that process has ended
                for home in homes:
                    write_group(home, "cgroup.procs", pid)

        os.waitpid(fork_detached(body, (reader,), twice=True), 0)
        os.close(reader)

    def _enter(self, top: str) -> str:
        for tries_left in (2, 1, 0):
            group = os.path.join(top, GROUP_NAME + random_name())
            try:
                os.mkdir(group, 0o755)
                write_group(group, "cgroup.procs", 0)
                return group
            except FileNotFoundError:  # somebody cleared it away before it was used
                if not tries_left:
                    raise
            except OSError:
                with contextlib.suppress(OSError):
                    os.rmdir(group)
                raise
        raise AssertionError("not reached")

    def limit(self, limits: Json) -> None:
        """Set what the job may use; raises OSError."""
        memory, pids = self.folders.get("memory"), self.folders.get("pids")
        if pids:
            write_group(pids, "pids.max", limits["processes"] + 1)  # and the supervisor
        if memory and limits["job_memory"]:
            # Memory first: with swap it may never be less. Without swap's files there is no swap to count.
            for name, value in (
                ("memory.max", limits["job_memory"]),
                ("memory.swap.max", 0),
                ("memory.oom.group", 1),
                ("memory.limit_in_bytes", limits["job_memory"]),
                ("memory.memsw.limit_in_bytes", limits["job_memory"]),
            ):
                if os.path.exists(os.path.join(memory, name)):
                    write_group(memory, name, value)
        if memory and os.path.exists(os.path.join(memory, "cpu.weight")):
            write_group(memory, "cpu.weight", max(1, round(CPU_WEIGHT / NICE_STEP ** max(0, niceness()))))

    def watch_memory(self) -> int:
        """A descriptor that is readable once a group of version 1 is out of memory; -1 where there is none.

        Version 2 ends all processes of the group by itself (memory.oom.group).
        """
        memory = self.folders.get("memory", "")
        if not os.path.exists(os.path.join(memory, "cgroup.event_control")):
            return -1
        event: int = LIBC.eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
        control = os.open(os.path.join(memory, "memory.oom_control"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with open(os.path.join(memory, "cgroup.event_control"), "w") as file:
                file.write(f"{event} {control}")
            return event
        except OSError as error:
            log(f"no word of memory running out: {error}")
            os.close(event)
            return -1
        finally:
            os.close(control)

    def out_of_memory(self) -> bool:
        """Whether the kernel ended something because this group had reached its own limit."""
        memory = self.folders.get("memory")
        counts: dict[str, int] = {}
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError), open(os.path.join(memory or "", name)) as file:
                counts = {key: int(value) for key, value in (line.split() for line in file)}
        with contextlib.suppress(OSError), open(os.path.join(memory or "", "memory.failcnt")) as file:
            counts["oom"] = int(file.read())
        return counts.get("oom_kill", 0) > 0 and counts.get("oom", 0) > 0

    def others(self) -> list[int]:
        """Processes in the groups besides this one."""
        return sorted({pid for group in self.homes for pid in pids_in(group)} - {os.getpid()})

    def move_out(self) -> None:
        """Let the helper take this process out; nobody waits for that."""
        if self.helper >= 0:
            with contextlib.suppress(OSError):  # it was killed: this process stays in
                os.write(self.helper, b"x")
            os.close(self.helper)
            self.helper = -1

    def leave(self) -> None:
        """Remove the groups. One that a survivor holds is removed with a later trash."""
        for group, home in self.homes.items():
            with contextlib.suppress(OSError):
                if os.getpid() in pids_in(group):
                    write_group(home, "cgroup.procs", 0)
                os.rmdir(group)


def clear_groups() -> None:
    """Remove the groups of supervisors that were killed: only empty ones can be."""
    for top in {top for _, top in group_places().values()}:
        for group in glob.glob(os.path.join(top, GROUP_NAME + "*")):
            with contextlib.suppress(OSError):
                os.rmdir(group)


def probe_group() -> Json:
    """Really make, enter and limit a job's groups: whether memory and processes are limited, and why not."""
    group = Group()
    group.enter()
    try:
        group.limit({"job_memory": 1 << 30, "processes": 1024})
        problem = group.reason
    except OSError as error:
        problem = f"The control group takes no limits: {error}."
    finally:
        group.leave()
    return {"memory": "memory" in group.folders and not problem, "reason": problem or None}


# --------------------------------------------------------------------------------------------------- the supervisor


class Launch(NamedTuple):
    """A validated launch request."""

    job: str
    attempt: int
    not_after: float
    lease_until: float | None
    spec: Json


class LaunchFailed(Exception):
    """The job's command or its sandbox could not be started."""


class Stream:
    """One output stream on its way to disk: what fits under the cap is kept, the rest read and thrown away.

    Its file is made when there is something to keep: to make one costs a quick job more than what it prints.
    """

    def __init__(self, directory: int, name: str) -> None:
        self.directory = directory
        self.file = -1
        self.name = name
        self.limit = 0
        self.kept = 0
        self.produced = 0
        self.truncated = False
        self.error: str | None = None
        self.digest = hashlib.sha256()

    def add(self, data: bytes) -> bool:
        """Keep what fits; whether anything was kept."""
        self.produced += len(data)
        before = self.kept
        part = data[: self.limit - self.kept]
        self.truncated = self.truncated or len(part) < len(data)
        while part:
            try:
                if self.file < 0:
                    self.file = make_file(self.directory, self.name)
                count = os.write(self.file, part)
            except OSError as error:  # a full disk: the job goes on, its output is cut here
                self.error = error.strerror
                self.truncated = True
                self.limit = self.kept
                break
            self.digest.update(part[:count])
            self.kept += count
            part = part[count:]
        return self.kept > before


def needed_to_start(spec: Json) -> Json:
    """The part of a spec that a prestarted interpreter was started with."""
    limits = ("processes", "open_files", "file_bytes", "job_memory")
    return {
        "argv": spec["argv"],
        "sandbox": spec["sandbox"],
        "limits": {name: spec["limits"][name] for name in limits},
    }


class Supervisor:
    """Runs one attempt from its directory to its exit record. Lives in a process of its own, detached from any agent.

    It is there before there is a launch (`stand_by`), with everything prepared that does not depend on it, up to an
    interpreter that waits in its sandbox for the script (`_prestart`). The agent that made it is connected from the
    beginning through `report`; later agents connect to the socket `control` in the attempt's directory. Both speak
    JSON lines: in come {"kill", "grace"}, {"lease"} and {"ack"}; out go {"event": "launched" | "failed" | "exists" |
    "grown" | "exit"}. After "grown" the next one waits for an "ack", so a stuck agent costs nothing and a flood is one
    notice at a time. "exit" with "again" says that the same process stands by for the next launch (see `supervise`).
    """

    def __init__(self, root: str, report: int, version: str) -> None:
        self.root = root
        self.report = report
        self.version = version
        self.boot = boot_id()
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.clients: dict[int, bytearray] = {}
        self.armed: set[int] = set()
        self.untold: set[int] = set()
        self.outputs: dict[int, Stream] = {}
        self.turn: Stream | None = None  # the stream that printed last
        self.within_line = -1  # its descriptor, if its line is not finished
        self.turns = 0  # noted
        self.bwrap_status = bytearray()
        self.bwrap_reader = -1
        self.pid = 0
        self.status: int | None = None
        self.reason: str | None = None
        self.message: str | None = None
        self.kill_at: float | None = None
        self.confirm_at: float | None = None
        self.launched = False
        self.started = self.ended = 0.0
        self.preparing = ""
        self.lock: int | None = None
        self.group = Group()
        self.again = False
        self.prestarted: Json | None = None  # what the process that waits at the gate was started with
        self.gate = self.memory_event = -1
        self.linked = False
        self.user_seconds = self.system_seconds = 0.0
        self.max_rss = 0

    def stand_by(self, former: Supervisor | None) -> bool:
        """Get ready, wait for a launch, run it; whether this process can do that again. Ends without a trace when the
        agent ends before one comes. `former` is the one that this process was before."""
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self.group.enter()  # before this becomes a subreaper: the group's helper is no child of ours
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            self._prepare()
            ready = True
        except OSError:  # tried again, and told, when a launch comes
            ready = False
        os.set_blocking(self.report, True)
        poll = select.poll()
        poll.register(self.report, select.POLLIN)
        sync_at = clock() + SYNC_DELAY
        with socket.socket(fileno=os.dup(self.report)) as channel:
            while True:
                if former is not None and not poll.poll(max(0.0, sync_at - clock()) * 1000):
                    former.make_durable()
                    former = None
                data, ancillary, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(4))
                if not ancillary and data:
                    continue  # meant for the former attempt
                parcel = -1
                if ancillary:
                    parcel = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
                    os.set_inheritable(parcel, False)
                if data[-1:] != PRESTART:  # before it may stand what was meant for the former attempt
                    break
                if ready:
                    self._prestart(json.loads(os.pread(parcel, MAX_LINE, 0)))
                os.close(parcel)
        if former is not None:
            former.make_durable()
        if parcel < 0:
            self._end_prestarted()
            self.group.leave()
            self._discard()
            if self.lock is not None:
                os.close(self.lock)
            empty_trash(self.root)
            return False
        size = int.from_bytes(os.pread(parcel, 8, 0), "big")
        request = json.loads(os.pread(parcel, size, 8))
        self.launch = Launch(*request)
        self._take_spec(self.launch.spec)
        self.path = os.path.join(self.root, "attempts", f"{self.launch.job}.{self.launch.attempt}")
        self.lease = self.launch.lease_until
        os.set_blocking(self.report, False)
        self._add_client(self.report)
        self.wake, writer = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # the wake-up descriptor tells; handlers only enable it
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._watch(self.wake, self._on_signal)
        self._run(parcel, 8 + size, ready)
        self.group.leave()
        return self.again

    def _take_spec(self, spec: Json) -> None:
        self.spec = spec
        self.limits: Json = spec["limits"]
        self.sandbox: Json = spec["sandbox"]
        self.sandboxed: bool = self.sandbox["mode"] == "bwrap"

    def retire(self) -> None:
        """Let go of everything but the agent that made this process, and of what `make_durable` needs."""
        signal.set_wakeup_fd(-1)
        self.handlers.clear()  # they refer to this object, and there is no garbage collector
        self.control.detach()
        close_inherited((self.report, self.exit_file, self.directory))

    def make_durable(self) -> None:
        """Have the exit record outlast a power cut, unless the server has committed it: mostly it has by now."""
        try:
            if os.path.lexists(self.path):
                os.fsync(self.exit_file)
                os.fsync(self.directory)
        except OSError as error:
            log(f"{self.path}: cannot sync the exit record: {error}")
        os.close(self.exit_file)
        os.close(self.directory)

    def _run(self, parcel: int, offset: int, ready: bool) -> None:
        """From the launch to the exit record."""
        try:
            if not ready:
                self._prepare_again()
            self._unpack(parcel, offset)
            os.close(parcel)
            self._choose()
            if clock() > self.launch.not_after:  # after all that may take long: another node may have the job by then
                raise Refused("expired", "The launch came after its time; nothing was started.")
            # The one moment that makes the attempt exist: of all who ever try, one succeeds.
            if not rename_new(self.preparing, self.path):
                self._end_prestarted()
                self._discard()
                return self._tell(event="exists")
        except (OSError, Refused) as error:
            message = str(error) if isinstance(error, Refused) else f"The attempt could not be prepared: {error}."
            # Told only once it is in the trash: what did not fit must not stand in the way of the next job.
            self._end_prestarted()
            self._discard()
            return self._tell(event="failed", error=error_code(error, "launch_failed"), message=message)
        self._watch(self.control.fileno(), self._on_connect)
        try:
            self._start()
        except (LaunchFailed, OSError) as error:
            self.reason, self.message = "launch_failed", str(error)[:2000]
        else:
            if not self.sandboxed:
                self._confirm()
            self._loop()
        self._finish()

    # Preparing and starting

    def _prepare(self) -> None:
        """The attempt's directory in tmp/, locked, with all that does not depend on the launch."""
        self.preparing = os.path.join(self.root, "tmp", random_name())
        os.mkdir(self.preparing, 0o700)
        self.directory = open_directory(self.preparing)
        self.lock = take_lock(self.directory, create=True)  # held until the attempt has ended
        # A cleaner that came between the lock's creation and its taking may have moved it away, and be gone again.
        if self.lock is None or not os.path.exists(os.path.join(self.preparing, "lock")):
            for fd in (self.directory, self.lock):
                if fd is not None:
                    os.close(fd)
            self.lock = None
            raise OSError(errno.EBUSY, "it was cleared away meanwhile")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.identity_file = os.open(IDENTITY, flags, 0o600, dir_fd=self.directory)
        self._write_identity(None)
        os.mkdir("work", 0o700, dir_fd=self.directory)
        self.streams = [Stream(self.directory, name) for name in STREAMS]
        self.turns_file = -1
        # Room for the record is taken now: a job that fills the disk must not lose its own end.
        self.exit_file = os.open("exit.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.directory)
        try:
            os.posix_fallocate(self.exit_file, 0, 16 << 10)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            write_all(self.exit_file, bytes(16 << 10))
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Socket addresses are limited to 108 bytes; through the descriptor the path is always short.
        self.control.bind(f"/proc/self/fd/{self.directory}/control")
        self.control.listen(MAX_CLIENTS)
        self.control.setblocking(False)

    def _prepare_again(self) -> None:
        """Once more after a failure, and again as long as a cleaner is in the way."""
        for tries_left in (2, 1, 0):
            self._discard()
            try:
                return self._prepare()
            except OSError as error:
                if error.errno != errno.EBUSY or not tries_left:
                    raise

    def _unpack(self, parcel: int, offset: int) -> None:
        """The launch's own files: the code, which follows at `offset` in the parcel, and the spec."""
        launch = self.launch
        spec = {"format": FORMAT, "job": launch.job, "attempt": launch.attempt, **launch.spec}
        write_at(self.directory, "spec.json", compact(spec))
        work = open_directory("work", self.directory)
        code = os.open("solution.py", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=work)
        try:
            while True:
                data = os.pread(parcel, 1 << 20, offset)
                if not data:
                    break
                write_all(code, data)
                offset += len(data)
        except OSError:
            os.ftruncate(code, 0)  # the next job may need the room before the cleaner has come by
            raise
        finally:
            os.close(code)
            os.close(work)
        if not self.sandboxed:  # else /tmp is the sandbox's own
            os.mkdir("tmp", 0o700, dir_fd=self.directory)
        for stream in self.streams:
            stream.limit = self.limits["output_bytes"]

    def _write_identity(self, job: Process | None) -> None:
        own = read_process(os.getpid())
        identity: Json = {"format": FORMAT, "pid": os.getpid(), "start_time": own.start if own else 0}
        identity.update(boot_id=self.boot, agent_version=self.version, clock=clock(), groups=list(self.group.homes))
        identity["prepared"] = os.path.basename(self.preparing)
        if job is not None:
            last = self.started + self.limits["wall_seconds"] + self.limits["grace_seconds"]
            identity.update(job_pid=job.pid, job_start_time=job.start, started_clock=self.started, last_clock=last)
        os.pwrite(self.identity_file, compact(identity), 0)  # the second time it is longer, and covers the first

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # not made yet, or the next start of an agent clears it
            os.rename(self.preparing, os.path.join(self.root, "trash", random_name()))

    def _environment(self) -> dict[bytes, bytes]:
        home = "/job" if self.sandboxed else os.path.join(self.path, "work")
        env = {**START_ENVIRONMENT, **self.spec["env"]}
        env.update(HOME=home, PWD=home, RESULTS_FILE=f"{home}/{self.spec['results_name']}")
        env["TMPDIR"] = "/tmp" if self.sandboxed else os.path.join(self.path, "tmp")  # noqa: S108  # the sandbox's own
        return {name.encode(): value.encode() for name, value in env.items()}

    def _prestart(self, spec: Json) -> None:
        """Start what probably comes next, up to where it would open its script; a launch of something else ends it.

        What the job would see of that: where there is no sandbox, its script's folder under another name in
        `__file__`; and in /proc/self/environ what its process began with.
        """
        self._take_spec(spec)
        self._end_prestarted()
        if not spec["prestart"]:
            return
        ours, theirs = socket.socketpair()
        self.gate, waiting = ours.detach(), theirs.detach()
        try:
            gate, home = keep_gate(self.root), os.path.join(self.preparing, "work")
            if self.sandboxed:
                gate, home = GATE_FOLDER, "/job"
            env = {**START_ENVIRONMENT, "HOME": home, "PWD": home, "PYTHONPATH": gate}
            self._fork({name.encode(): value.encode() for name, value in env.items()}, self.preparing, waiting)
            self.prestarted = needed_to_start(spec)
        except (LaunchFailed, OSError) as error:  # tried again, and told, when a launch comes
            log(f"nothing could be started before its job: {error}")
            os.close(self.gate)
        finally:
            os.close(waiting)

    def _end_prestarted(self) -> None:
        if self.prestarted is None:
            return
        self.prestarted = None
        os.close(self.gate)
        self._abandon()

    def _choose(self) -> None:
        """Keep the prestarted process if it is one for this launch and waits at the gate, else end it."""
        if self.prestarted is None:
            return
        usable = False
        if self.prestarted == needed_to_start(self.spec):
            # It finds what it is made of by this folder's present name; a start from here would not be quicker.
            poll = select.poll()
            poll.register(self.gate, select.POLLIN)
            with contextlib.suppress(OSError):
                usable = bool(poll.poll(GATE_LIMIT * 1000)) and os.read(self.gate, 1) == b"."
        if not usable:
            self._end_prestarted()

    def _let_prestarted_go(self) -> bool:
        """Whether the process that waits has what it needs for this launch."""
        if self.prestarted is None:
            return False
        words = b"".join(b"%s=%s\0" % pair for pair in self._environment().items())
        try:
            if not self.sandboxed:
                # Python has made the script's path an absolute one already, by this folder's former name.
                os.symlink(self.path, self.preparing)
                self.linked = True
            self.started = clock()
            write_all(self.gate, words)
        except OSError:  # it has ended meanwhile
            self._end_prestarted()
            return False
        os.close(self.gate)
        self.prestarted = None
        return True

    def _start(self) -> None:
        """Have the job's process run; LaunchFailed says which step went wrong."""
        prestarted = self._let_prestarted_go()
        if not prestarted:
            self._fork(self._environment(), self.path)
        for fd, stream in zip(self.readers, self.streams):
            self.outputs[fd] = stream
            self._watch(fd, self._on_output)
        if self.memory_event >= 0:
            self._watch(self.memory_event, self._on_memory)
        if self.sandboxed:
            os.set_blocking(self.bwrap_reader, False)
            self._watch(self.bwrap_reader, self._on_bwrap)
            self.confirm_at = self.started + 0.002
        self._write_identity(read_process(self.pid))
        if prestarted:
            self._confirm()

    def _fork(self, env: dict[bytes, bytes], folder: str, gate: int = -1) -> None:
        """Fork and execute the command of `spec` in `folder`; LaunchFailed says which step went wrong.

        `gate` is what the job's process gets as GATE_FD.
        """
        self.group.limit(self.limits)
        argv, work = list(self.spec["argv"]), os.path.join(folder, "work")
        inherited: list[int] = []
        if self.sandboxed:
            bwrap = find_tool("bwrap")
            if bwrap is None:
                raise LaunchFailed("bubblewrap (bwrap) is not installed on the node.")
            self.bwrap_reader, status_writer = os.pipe()
            files = sandbox_files()
            inherited = [status_writer, *files.values()]
            seccomp = readable(seccomp_filter()[0]) if self.sandbox["seccomp"] else None
            if seccomp is not None:
                inherited.append(seccomp)
            begin = os.path.join(self.root, "gate") if gate >= 0 else None
            argv = bwrap_argv(bwrap, self.root, work, self.sandbox, status_writer, files, seccomp, begin, argv)
        self.readers, writers = zip(*(os.pipe() for _ in STREAMS))
        failure, failure_writer = os.pipe()
        parent = os.getpid()
        self.memory_event = self.group.watch_memory() if self.limits["job_memory"] else -1
        self.started = clock()
        self.pid = os.fork()
        if self.pid == 0:
            self._become_job(argv, env, work, parent, [*writers], inherited, gate, failure_writer)
        for fd in (*writers, *inherited, failure_writer):
            os.close(fd)
        problem = os.read(failure, 4096)  # ends empty when exec closes the pipe
        os.close(failure)
        if problem:
            self._abandon()
            raise LaunchFailed(f"The command {argv[0]!r} could not be started: {problem.decode('utf-8', 'replace')}.")

    def _abandon(self) -> None:
        """The process that `_fork` made is none for this attempt: end it.

        Its children come to us. One of bwrap that has not heard from its parent yet would wait for that for ever.
        """
        deadline = clock() + KILL_LIMIT
        with contextlib.suppress(ChildProcessError):  # nothing is left
            while clock() < deadline:
                below = children_of(os.getpid())
                if below is None:
                    below = [process.pid for process in descendants(all_processes(), [os.getpid()])]
                for pid in below:
                    send_signal(pid, signal.SIGKILL)
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.001)
        for fd in (self.bwrap_reader, self.memory_event, *self.readers):
            if fd >= 0:
                os.close(fd)
        self.bwrap_reader = self.memory_event = -1

    def _become_job(
        self,
        argv: list[str],
        env: dict[bytes, bytes],
        work: str,
        parent: int,
        writers: list[int],
        inherited: list[int],
        gate: int,
        failure: int,
    ) -> NoReturn:
        """In the child: everything between fork and exec. What goes wrong is written to `failure`."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (
                signal.SIGPIPE,
                signal.SIGXFSZ,
                signal.SIGHUP,
                signal.SIGINT,
                signal.SIGTERM,
                signal.SIGCHLD,
            ):
                signal.signal(number, signal.SIG_DFL)
            new_session()
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(127)
            if not self.sandboxed:
                # No way to another user id (sudo, crontab, at): what runs as us can be killed by us.
                # Not for bwrap, which is set-uid on some systems and sets this itself.
                LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            null = os.open("/dev/null", os.O_RDONLY)
            for target, fd in enumerate([null, *writers]):
                os.dup2(fd, target)
            for fd in inherited:
                os.set_inheritable(fd, True)
            if gate >= 0:
                os.dup2(gate, GATE_FD)
            os.chdir("/" if self.sandboxed else work)
            os.umask(0o077)
            # Never RLIMIT_AS: CUDA reserves tens of gigabytes of addresses.
            wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: self.limits["open_files"]}
            wanted[resource.RLIMIT_NPROC] = self.limits["processes"]
            wanted[resource.RLIMIT_FSIZE] = self.limits["file_bytes"]
            for kind, value in wanted.items():
                hard = resource.getrlimit(kind)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (value, value))
            words = [word.encode() for word in argv]
            os.execvpe(words[0], words, env)  # noqa: S606  # argv words, by design without a shell
        except OSError as error:
            os.write(failure, (error.strerror or "unknown error").encode())
        except BaseException as error:
            os.write(failure, repr(error).encode()[:1000])
        finally:
            os._exit(127)

    def _confirm(self) -> None:
        """Tell, once, that the command runs. Output is announced only after that."""
        if not self.launched:
            self.launched = True
            self.confirm_at = None
            self.group.move_out()
            self._tell(event="launched", pid=self.pid, started_clock=self.started)
            if any(stream.kept for stream in self.streams):
                self._announce_growth()
            if self.sandboxed and niceness() > 0:  # it has a session of its own in there
                for pid in self._commands():
                    share_as_nice(pid)

    def _commands(self) -> list[int]:
        """The children of the sandbox's init: the command, once it is executed."""
        return [pid for init in children_of(self.pid) or () for pid in children_of(init) or ()]

    def _command_runs(self) -> bool:
        """Whether the sandbox has executed the command: the child of its init is not bwrap any more.

        bwrap has no notice for this. Output on stdout proves it too, so only silent jobs are looked at, a few times.
        """
        for pid in self._commands():
            try:
                with open(f"/proc/{pid}/comm", "rb") as file:
                    if file.read().strip() != b"bwrap":
                        return True
            except OSError:
                pass  # ended
        return False

    # Events

    def _watch(self, fd: int, handler: Callable[[int], None]) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)
            os.close(fd)

    def _loop(self) -> None:
        """Until the job's first process has ended, or is to be killed for good."""
        while self.status is None:
            now = clock()
            if self.kill_at is not None:
                if now >= self.kill_at:
                    return
            elif now >= self.started + self.limits["wall_seconds"]:
                self._begin_kill("timeout", self.limits["grace_seconds"])
            elif self.lease is not None and now >= self.lease:
                self._begin_kill("lease_expired", self.limits["grace_seconds"])
            if self.confirm_at is not None and now >= self.confirm_at:
                limit = CONFIRM_GUESS if children_of(self.pid) is None else CONFIRM_LIMIT
                if now >= self.started + limit or self._command_runs():
                    self._confirm()
                else:
                    self.confirm_at = self.started + 2 * (now - self.started)
            if self.status is None:
                self._wait(self.poll, self._next_timer())

    def _next_timer(self) -> float:
        times = [self.kill_at or self.started + self.limits["wall_seconds"]]
        if self.kill_at is None and self.lease is not None:
            times.append(self.lease)
        if self.confirm_at is not None:
            times.append(self.confirm_at)
        return min(times)

    def _wait(self, poll: Any, until: float) -> None:
        timeout = max(0.0, min(until - clock(), 3600.0))
        ready = [fd for fd, _ in poll.poll(math.ceil(timeout * 1000))]
        # An unbuffered print writes a line and its end one by one: the end came before what the other stream has.
        ready.sort(key=lambda fd: fd != self.within_line)
        for fd in ready:
            handler = self.handlers.get(fd)
            if handler is not None:
                handler(fd)

    def _on_signal(self, fd: int) -> None:
        try:
            numbers = os.read(fd, 4096)
        except BlockingIOError:
            return
        if signal.SIGCHLD in numbers:
            self._reap()
        if signal.SIGTERM in numbers:
            self._begin_kill("supervisor_terminated", self.limits["grace_seconds"])

    def _reap(self) -> bool:
        """Collect what has ended. True: nothing that the job started is left at all, since orphans come to us."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            self.user_seconds += usage.ru_utime
            self.system_seconds += usage.ru_stime
            self.max_rss = max(self.max_rss, usage.ru_maxrss)
            if pid == self.pid:
                self.status, self.ended = status, clock()

    def _on_memory(self, fd: int) -> None:
        """The group is out of memory. What the kernel left of the job would mostly wait for what it ended."""
        self._unwatch(fd)
        self._begin_kill("memory_exceeded", 0)

    def _on_output(self, fd: int) -> None:
        data = os.read(fd, PIPE_READ)
        if not data:
            self.outputs.pop(fd)
            self._unwatch(fd)
            return
        stream = self.outputs[fd]
        if stream is not self.turn and stream.kept < stream.limit:
            self._note_turn(stream)
        self.within_line = -1 if data.endswith(b"\n") else fd
        kept = stream.add(data)
        if self.launched:
            if kept:
                self._announce_growth()
        elif stream.name == "stdout":  # on stderr it might be bwrap itself that speaks
            self._confirm()

    def _note_turn(self, stream: Stream) -> None:
        """Before the first byte that `stream` prints after the other one."""
        if self.turn is not None and self.turns < MAX_TURNS:
            self.turns += 1
            try:
                if self.turns_file < 0:
                    self.turns_file = make_file(self.directory, "turns")
                whole = os.write(self.turns_file, TURN.pack(*(each.kept for each in self.streams))) == TURN.size
            except OSError:
                whole = False
            if not whole:  # a full disk: what follows has no order
                self.turns = MAX_TURNS
        self.turn = stream

    def _announce_growth(self) -> None:
        for client in list(self.clients):
            if client in self.armed:
                self.armed.discard(client)
                self._send(client, {"event": "grown"})
            else:
                self.untold.add(client)

    def _on_bwrap(self, fd: int) -> None:
        try:
            data = os.read(fd, PIPE_READ)
        except BlockingIOError:
            return
        self.bwrap_status += data
        if not data:
            self._unwatch(fd)

    def _add_client(self, fd: int) -> None:
        self.clients[fd] = bytearray()
        self.armed.add(fd)
        self._watch(fd, self._on_client)
        if len(self.clients) > MAX_CLIENTS:
            self._drop_client(next(iter(self.clients)))

    def _drop_client(self, fd: int) -> None:
        self.clients.pop(fd, None)
        self.armed.discard(fd)
        self.untold.discard(fd)
        self._unwatch(fd)

    def _on_connect(self, fd: int) -> None:
        try:
            connection, _ = self.control.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._add_client(connection.detach())

    def _on_client(self, fd: int) -> None:
        try:
            data = os.read(fd, PIPE_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        buffer = self.clients[fd]
        buffer += data
        if not data or len(buffer) > PIPE_READ * 2:
            return self._drop_client(fd)
        *lines, rest = bytes(buffer).split(b"\n")
        buffer[:] = rest
        for line in lines:
            try:
                self._on_command(fd, json.loads(line))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                log(f"unusable command {line[:200]!r}: {error}")

    def _on_command(self, fd: int, command: Json) -> None:
        if "ack" in command:
            # What came since the last notice may have come after the agent has looked: told again, or it would lie
            # there until more comes.
            if fd in self.untold:
                self.untold.discard(fd)
                self._send(fd, {"event": "grown"})
            else:
                self.armed.add(fd)
        if "lease" in command:
            lease = command["lease"]
            self.lease = None if lease is None else float(lease)
        if "kill" in command:
            self._begin_kill(str(command["kill"]), float(command["grace"]))

    def _send(self, fd: int, message: Json) -> bool:
        data = compact(message) + b"\n"
        try:
            if os.write(fd, data) == len(data):
                return True
            self._drop_client(fd)
        except BlockingIOError:
            pass  # a stuck agent: it finds everything on disk
        except OSError:
            self._drop_client(fd)
        return False

    def _tell(self, **message: Any) -> None:
        for fd in list(self.clients):
            self._send(fd, message)

    # The end

    def _is_over(self) -> bool:
        return self.status is not None

    def _begin_kill(self, reason: str, grace: float) -> None:
        """SIGTERM to everything in the job, SIGKILL when the grace is over. The first reason stays."""
        if self._is_over():
            return
        deadline = clock() + max(0.0, grace)
        if self.kill_at is not None:
            self.kill_at = min(self.kill_at, deadline)
            return
        self._reap()
        if self._is_over():
            return  # it ended by itself: that is the true outcome
        self.reason, self.kill_at = reason, deadline
        if grace > 0:
            for process in descendants(all_processes(), [os.getpid()]):
                # bwrap and its init would take the whole sandbox down without a grace.
                if not (self.sandboxed and self.pid in (process.pid, process.ppid)):
                    send_signal(process.pid, signal.SIGTERM)

    def _kill_rest(self, deadline: float) -> list[Process]:
        """SIGKILL everything the job started, again until nothing is left; what could not be killed by `deadline`."""
        pause, longest = 0.002, 1.0 if deadline == math.inf else 0.05
        wake = select.poll()
        wake.register(self.wake, select.POLLIN)
        seen: set[int] = set()
        rounds = 0
        while not self._reap() or self.group.others():
            late = clock() > deadline
            # Who loses its parent becomes our child, so looking at these is mostly enough: often it is just the
            # sandbox's init, with which its whole namespace goes. A walk through /proc takes long when many processes
            # come and go; it finds also those whose parent does not die.
            left = self._children() if rounds % WALK_EVERY != WALK_EVERY - 1 and not late else []
            if not left:
                table = all_processes()
                left = descendants(table, [os.getpid()])
                left += [table[pid] for pid in self.group.others() if pid in table and table[pid] not in left]
            if late and (left or clock() > deadline + KILL_LIMIT):  # nothing in sight may be a race, but not for long
                return left or self._children()
            for process in left:
                kill_for_good(process)
            if not seen.issuperset(process.pid for process in left):
                pause = 0.002  # they go on forking
            if rounds == 1:
                forbid_forks(self.group.homes)
            seen.update(process.pid for process in left)
            self._wait(wake, clock() + pause)
            pause = min(pause * 2, longest)
            rounds += 1
        return []

    @staticmethod
    def _children() -> list[Process]:
        """Our children, also one that has just ended: it still tells its group. None where the kernel tells of none."""
        found = map(read_process, children_of(os.getpid()) or ())
        return [process for process in found if process and process.ppid == os.getpid()]

    def _drain(self) -> None:
        """The rest of the output, up to its end or for a moment: a pipe passed to a stranger delays nobody."""
        deadline = clock() + DRAIN_LIMIT
        while clock() < deadline:
            poll = select.poll()
            left = [fd for fd in (*self.outputs, self.bwrap_reader) if fd in self.handlers]
            if not left:
                break
            for fd in left:
                poll.register(fd, select.POLLIN)
            self._wait(poll, deadline)

    def _sandbox_failed(self) -> str | None:
        """bwrap's own words if it failed before it could execute the command: then it reports no exit code."""
        if not self.sandboxed or self.status is None or not os.WIFEXITED(self.status):
            return None
        if os.WEXITSTATUS(self.status) == 0 or b'"exit-code"' in self.bwrap_status:
            return None
        words = (read_at(self.directory, "stderr", 1000) or b"").decode("utf-8", "replace").strip()
        return f"The sandbox could not be started: {words or 'bwrap ended without a message'}"

    def _finish(self) -> None:
        survivors = self._kill_rest(clock() + KILL_LIMIT)
        if survivors:
            job, attempt = self.launch.job, self.launch.attempt
            note_survivors(self.root, job, attempt, survivors, list(self.group.homes), keeper=os.getpid())
        self.ended = self.ended or clock()
        if self.linked:
            with contextlib.suppress(OSError):  # a job without a sandbox took it away
                os.unlink(self.preparing)
        self._drain()
        limited = self.limits["job_memory"] and self.status not in (None, 0)
        if self.reason is None and limited and self.group.out_of_memory():
            self.reason = "memory_exceeded"
        if self.reason is None:
            self.message = self._sandbox_failed()
            self.reason = "launch_failed" if self.message else None
        record = self._record(len(survivors))
        if self.reason == "launch_failed" and not self.launched:
            self._keep(record, sync=True)
            if self.lock is not None:  # whoever hears of the failure finds the attempt ended, not ending
                os.close(self.lock)
            self._tell(event="failed", error="launch_failed", message=self.message)
            return
        self._confirm()
        # The record goes out before the disk has it: whoever commits it no longer needs the node's copy.
        exit_event = {"event": "exit", "record": record, "again": not survivors}
        told = {fd: self._send(fd, exit_event) for fd in list(self.clients)}
        self.again = not survivors and told.get(self.report, False)
        self._keep(record, sync=not self.again)
        if survivors:
            self._guard()

    def _guard(self) -> None:
        """The attempt has ended, but not all of its processes: go on ending them.

        They are found as long as they come to us; nobody else knows those that fork all the time. Until this process
        ends too, the note that names it keeps the node from being taken for clean.
        """
        for fd in list(self.clients):
            self._drop_client(fd)
        self._unwatch(self.control.detach())
        if self.lock is not None:
            os.close(self.lock)
        self._kill_rest(math.inf)

    def _record(self, survivors: int) -> Json:
        code, number = (None, None) if self.status is None else outcome(self.status, self.sandboxed)
        if self.reason == "launch_failed":
            code = number = None
        record: Json = {"format": FORMAT, "job": self.launch.job, "attempt": self.launch.attempt}
        record.update(exit_code=code, signal=number, reason=self.reason, message=self.message)
        for stream in self.streams:
            record[f"{stream.name}_bytes"] = stream.kept
            record[f"{stream.name}_produced"] = stream.produced
            record[f"{stream.name}_truncated"] = stream.truncated
            record[f"{stream.name}_sha256"] = stream.digest.hexdigest()
        record["output_error"] = next((stream.error for stream in self.streams if stream.error), None)
        record.update(started_clock=self.started, ended_clock=self.ended, boot_id=self.boot, survivors=survivors)
        record.update(wall_seconds=round(max(0.0, self.ended - self.started), 6), max_rss_kib=self.max_rss)
        record.update(user_seconds=self.user_seconds, system_seconds=self.system_seconds)
        name, limit = self.spec["results_name"], self.limits["result_bytes"]
        record["results"] = describe_results(self.directory, name, limit)
        return record

    def _keep(self, record: Json, sync: bool) -> None:
        """exit.json, whole or not at all; without `sync` only `make_durable` has it outlast a power cut."""
        data = compact(record)
        try:
            os.pwrite(self.exit_file, data, 0)
            os.ftruncate(self.exit_file, len(data))
            if sync:
                os.fsync(self.exit_file)
            try:
                os.rename("exit.new", "exit.json", src_dir_fd=self.directory, dst_dir_fd=self.directory)
            except FileNotFoundError:  # a job without a sandbox took it away
                write_at(self.directory, "exit.json", data)
            if sync:
                os.fsync(self.directory)
        except OSError as error:
            log(f"{self.path}: cannot keep the exit record: {error}")


def send_parcel(supervisor: int, kind: bytes, *parts: bytes | bytearray) -> None:
    """Send this to a supervisor standing by, as a file in memory of which only the descriptor travels: that never
    blocks, and never arrives in parts."""
    parcel = os.memfd_create("parcel", os.MFD_CLOEXEC)
    try:
        for part in parts:
            write_all(parcel, part)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, parcel.to_bytes(4, sys.byteorder))]
        with socket.socket(fileno=os.dup(supervisor)) as channel:
            channel.sendmsg([kind], rights)
    finally:
        os.close(parcel)


def supervise(root: str, report: int, version: str) -> None:
    """One supervisor after another in this process, each for one attempt, while the agent that made it lives and
    nothing of an attempt was left: a process for each would cost more than what it does."""
    former = None
    while True:
        supervisor = Supervisor(root, report, version)
        if not supervisor.stand_by(former):
            return
        supervisor.retire()
        former = supervisor


def error_code(error: BaseException, default: str) -> str:
    if isinstance(error, Refused):
        return error.code
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk_full" if full else default


def close_inherited(keep: Iterable[int]) -> None:
    """In a fresh child: drop every descriptor of the agent (its lock above all) but the log and those given."""
    kept = {2, *keep}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in kept:
            with contextlib.suppress(OSError):  # the one of the listing itself
                os.close(fd)
    for fd in (0, 1):
        if fd not in kept:
            # The two lowest free descriptors are 0 and 1: nothing later may get these numbers by accident.
            os.open("/dev/null", os.O_RDWR)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def share_as_nice(process: str | int = "self") -> None:
    """Have the session of a process count as little as we do, where the kernel shares processors out by session.

    With autogroup each session begins as one that is not nice. From logins that are not root the kernel takes ten such
    changes a second; a session that comes too soon stays as it is.
    """
    if niceness() > 0:
        with contextlib.suppress(OSError), open(f"/proc/{process}/autogroup", "w") as file:
            file.write(str(niceness()))


def new_session() -> None:
    os.setsid()
    share_as_nice()


def fork_detached(body: Callable[[], None], keep: Iterable[int], twice: bool) -> int:
    """Run `body` in a child, in its own session; `twice`: in a grandchild that nobody has to wait for."""
    pid = os.fork()
    if pid:
        return pid
    try:
        gc.disable()  # destructors of the agent's objects must not run here
        new_session()
        if twice and os.fork():
            os._exit(0)
        signal.set_wakeup_fd(-1)
        close_inherited(keep)
        os.chdir("/")
        body()
    except BaseException:
        log(traceback.format_exc())
    finally:
        os._exit(0)


# --------------------------------------------------------------------------------------------------- probing the node

PYTHON_QUESTION = (
    "import json, sys; print(json.dumps({'executable': sys.executable, 'version': '%d.%d.%d' % sys.version_info[:3],"
    " 'prefix': sys.prefix, 'base_prefix': sys.base_prefix}))"
)
GPU_FIELDS = ("index", "uuid", "name", "memory_total_mib", "memory_used_mib", "utilization", "temperature")
GPU_QUERY = "index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu"
PROCESS_FIELDS = ("pid", "gpu_uuid", "name", "memory_mib")


def our_processes(root: str) -> set[int]:
    """Pids of everything that the attempts of this agent's folder have running."""
    boot, supervisors = boot_id(), []
    for path in glob.glob(os.path.join(glob.escape(root), "attempts", "*")):
        with contextlib.suppress(OSError):  # removed meanwhile
            directory = open_directory(path)
            identity = read_identity(directory)
            os.close(directory)
            if is_running(identity, boot):
                supervisors.append(identity["pid"])
    return {process.pid for process in descendants(all_processes(), supervisors)}


def folder_id(folder: str) -> tuple[int, int] | None:
    """(device, inode) of what has this name now, None for nothing."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def free_bytes(root: str) -> int:
    """What an ordinary user can still write to the disk of this folder."""
    disk = os.statvfs(root)
    return disk.f_bavail * disk.f_frsize


def probe(root: str, request: Json) -> Json:
    """What this node has; with "only": "clean" just what the last job may have left. Runs in a child of the agent,
    since any part of it may hang."""
    import subprocess  # only here: supervisors, forked from the agent, should not carry it

    def run(argv: list[str], **more: Any) -> tuple[str | None, str]:
        """(stdout, "") or (None, what went wrong)."""
        try:
            # The tools of find_tool, and the interpreter of the settings.
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_LIMIT, **more)  # noqa: S603
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return None, f"{argv[0]} could not be run: {error}"
        if done.returncode:
            words = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
            return None, f"{argv[0]} ended with {done.returncode}: {words or 'no message'}"
        return done.stdout.decode("utf-8", "replace"), ""

    answer: Json = {"survivors": surviving(root)}
    answer.update(gpus=[], gpu_processes=[])
    tool = find_tool("nvidia-smi")
    if tool is not None:
        # Before and after: a job may begin or end while the tool looks.
        ours = our_processes(root)
        form = "--format=csv,noheader,nounits"
        text, problem = run([tool, f"--query-gpu={GPU_QUERY}", form])
        answer["gpus"] = parse_csv(text or "", GPU_FIELDS)
        # A process on a GPU uses some of its memory: a look after a job asks for them only where more is in use.
        used, idle = max((gpu["memory_used_mib"] or 0 for gpu in answer["gpus"]), default=0), request["idle_mib"]
        if request["only"] == "clean" and 0 < idle >= used:
            answer["gpu_processes"] = None
        elif text is not None:
            text, problem = run([tool, "--query-compute-apps=pid,gpu_uuid,process_name,used_memory", form])
            answer["gpu_processes"] = parse_csv(text or "", PROCESS_FIELDS)
        if problem:
            answer["gpu_error"] = problem
        if answer["gpu_processes"]:
            ours |= our_processes(root)
        for entry in answer["gpu_processes"] or ():
            entry["ours"] = entry["pid"] in ours
    disk = os.statvfs(root)
    answer["disk"] = {"free_bytes": free_bytes(root), "total_bytes": disk.f_blocks * disk.f_frsize}
    answer["disk"]["free_inodes"] = disk.f_favail
    if request["only"] == "clean":
        return answer
    text, problem = run([request["python"], "-I", "-c", PYTHON_QUESTION])
    try:
        answer["python"] = json.loads(text) if text is not None else None
    except ValueError:
        answer["python"], problem = None, f"{request['python']} is not a Python: it printed {text!r:.200}"
    if answer["python"] is None:
        answer["python_error"] = problem
    with open("/proc/meminfo") as file:
        memory: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", file.read(), re.MULTILINE))
    answer["memory_total_bytes"] = int(memory["MemTotal"]) * 1024
    answer["memory_free_bytes"] = int(memory.get("MemAvailable") or memory["MemFree"]) * 1024
    answer["load"] = list(os.getloadavg())
    answer["cpus"] = len(os.sched_getaffinity(0))
    answer["kill_user_processes"] = kills_user_processes()
    answer["group"] = probe_group()
    answer["sandbox"] = probe_sandbox(root, request, answer["python"], run)
    return answer


def parse_csv(text: str, fields: tuple[str, ...]) -> list[Json]:
    """Rows of nvidia-smi. The name, the one text that may hold a comma, stands third from the left in GPU rows."""
    result = []
    for line in text.splitlines():
        cells: list[Any] = [cell.strip() for cell in line.split(",")]
        while len(cells) > len(fields):
            cells[2:4] = [f"{cells[2]}, {cells[3]}"]
        if len(cells) != len(fields):
            continue
        row = dict(zip(fields, cells))
        for field, cell in row.items():
            if field not in ("uuid", "name", "gpu_uuid"):
                try:
                    row[field] = float(cell) if "." in cell else int(cell)
                except ValueError:  # "[N/A]", "[Not Supported]"
                    row[field] = None
        result.append(row)
    return result


def kills_user_processes() -> bool:
    """Whether logind ends a user's detached processes at logout. Best effort: the last setting found counts."""
    answer = False
    for path in ["/etc/systemd/logind.conf", *sorted(glob.glob("/etc/systemd/logind.conf.d/*.conf"))]:
        try:
            with open(path, errors="replace") as file:
                found = re.findall(r"^\s*KillUserProcesses\s*=\s*(\w+)", file.read(), re.MULTILINE)
        except OSError:
            continue
        if found:
            answer = found[-1].lower() in ("yes", "true", "1", "on")
    return answer


def probe_sandbox(root: str, request: Json, python: Json | None, run: Callable[..., tuple[str | None, str]]) -> Json:
    """Really run a no-op in the sandbox that jobs get, and time it: with the filter of calls, else without."""
    bwrap = find_tool("bwrap")
    answer: Json = {"bubblewrap": bwrap, "works": False, "reason": None, "start_ms": None, "bare_start_ms": None}
    answer.update(seccomp=False, seccomp_reason=None)
    if request["sandbox"] == "off":
        answer["reason"] = "The sandbox is switched off."
        return answer
    if bwrap is None:
        answer["reason"] = "bubblewrap (bwrap) is not installed."
        return answer
    python = python or {"executable": sys.executable, "prefix": sys.prefix, "base_prefix": sys.base_prefix}
    sandbox = {key: request[key] for key in ("network", "binds", "gpus")}
    sandbox["python_prefixes"] = [python["prefix"], python["base_prefix"]]
    program, problem = seccomp_filter()
    command = [python["executable"], "-I", "-S", "-c", "pass"]
    begin = clock()
    run(command, env={"PATH": DEFAULT_PATH})
    answer["bare_start_ms"] = round((clock() - begin) * 1000, 3)
    for filtered in (True, False) if program else (False,):
        folder = os.path.join(root, "tmp", random_name())
        os.mkdir(folder, 0o700)
        files = sandbox_files()
        _, status_writer = os.pipe()
        passed = [status_writer, *files.values()]
        seccomp = readable(program) if filtered else None
        if seccomp is not None:
            passed.append(seccomp)
        argv = bwrap_argv(bwrap, root, folder, sandbox, status_writer, files, seccomp, None, command)
        begin = clock()
        text, failure = run(argv, pass_fds=passed, env={"PATH": DEFAULT_PATH})
        took = round((clock() - begin) * 1000, 3)
        os.rmdir(folder)
        for fd in passed:
            os.close(fd)
        works = text is not None
        answer.update(works=works, reason=failure or None, start_ms=took)
        if works:
            answer.update(seccomp=filtered, seccomp_reason=None if filtered else problem)
            break
        problem = failure
    return answer


# --------------------------------------------------------------------------------------------------- framing


class FrameReader:
    """Takes bytes as they come, gives back (object or None, payload) per request; None: the line made no sense."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.scanned = 0
        self.header: Json | None = None
        self.payload = bytearray()
        self.missing = 0
        self.skipping = False  # the rest of a line that is too long

    def feed(self, data: bytes) -> Iterator[tuple[Json | None, bytearray]]:
        self.buffer += data
        while True:
            if self.header is not None:
                part = self.buffer[: self.missing]
                del self.buffer[: len(part)]
                self.payload += part
                self.missing -= len(part)
                if self.missing:
                    return
                header, payload = self.header, self.payload
                self.header, self.payload = None, bytearray()
                yield header, payload
                continue
            end = self.buffer.find(b"\n", self.scanned)
            if end < 0:
                self.scanned = len(self.buffer)
                if len(self.buffer) > MAX_LINE:
                    if not self.skipping:
                        yield None, bytearray()
                    self.skipping = True
                    self.buffer.clear()
                    self.scanned = 0
                return
            line = bytes(self.buffer[:end])
            del self.buffer[: end + 1]
            self.scanned = 0
            if self.skipping:
                self.skipping = False
                continue
            try:
                found: Any = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            size = found.get("size", 0) if isinstance(found, dict) else -1
            if type(size) is not int or not 0 <= size <= MAX_PAYLOAD:
                yield None, bytearray()
            elif size:
                self.header, self.missing = found, size
            else:
                yield found, bytearray()


# Taking fields out of requests: each function raises Refused("bad_request") with the field's name.


def bad(name: str, wanted: str) -> Refused:
    return Refused("bad_request", f"The field {name} must be {wanted}.")


def take_int(source: Json, name: str, low: int, high: int, default: int | None = None) -> int:
    value: Any = source.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise bad(name, f"an integer from {low} to {high}")
    return value


def take_number(source: Json, name: str) -> float:
    value: Any = source.get(name)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise bad(name, "a finite number")
    return float(value)


def take_clock(source: Json, name: str) -> float | None:
    return None if source.get(name) is None else take_number(source, name)


def take_text(source: Json, name: str, default: str | None = None, among: Iterable[str] = ()) -> str:
    value = source.get(name, default)
    if not isinstance(value, str) or "\0" in value or (among and value not in among):
        raise bad(name, f"one of {', '.join(among)}" if among else "text without NUL")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be an argument of a process
        raise bad(name, "valid Unicode") from None
    return value


def take_texts(source: Json, name: str) -> list[str]:
    value = source.get(name, [])
    if not isinstance(value, list):
        raise bad(name, "a list of texts")
    return [take_text({name: word}, name) for word in value]


def take_gpus(source: Json) -> list[int] | None:
    value = source.get("gpus")
    if value is None:
        return None
    if not isinstance(value, list):
        raise bad("gpus", "a list of GPU indices or null")
    return [take_int({"gpus": index}, "gpus", 0, 4095) for index in value]


def take_object(source: Json, name: str) -> Json:
    value = source.get(name)
    if not isinstance(value, dict):
        raise bad(name, "an object")
    return value


def take_key(request: Json) -> tuple[str, int]:
    job = take_text(request, "job")
    if not JOB_NAME.match(job):
        raise bad("job", "1 to 64 characters of A-Z a-z 0-9 _ -")
    return job, take_int(request, "attempt", 1, 999_999_999)


def take_spec(request: Json) -> Json:
    """The spec of a launch, checked and with nothing else in it."""
    given = take_object(request, "spec")
    limits, sandbox, env = take_object(given, "limits"), take_object(given, "sandbox"), take_object(given, "env")
    argv = take_texts(given, "argv")
    if not argv or not argv[0]:
        raise bad("argv", "a list with at least one word")
    for name in env:
        take_text(env, name)
        if not name or "=" in take_text({"env": name}, "env"):
            raise bad("env", "an object of names and texts")
    results = take_text(given, "results_name", "results.jsonl")
    if not FILE_NAME.match(results):
        raise bad("results_name", "a plain file name")
    checked: Json = {name: max(0.0, take_number(limits, name)) for name in ("wall_seconds", "grace_seconds")}
    for name in ("output_bytes", "result_bytes", "processes", "open_files", "file_bytes"):
        checked[name] = take_int(limits, name, 0, 1 << 60)
    checked["job_memory"] = take_int(limits, "job_memory", 0, 1 << 60, 0)  # 0: no limit
    box: Json = {"mode": take_text(sandbox, "mode", "none", ("bwrap", "none")), "gpus": take_gpus(sandbox)}
    box["network"] = take_text(sandbox, "network", "none", ("none", "host"))
    box["seccomp"] = sandbox.get("seccomp") is True
    prestart = given.get("prestart") is True
    box.update(binds=take_texts(sandbox, "binds"), python_prefixes=take_texts(sandbox, "python_prefixes"))
    return {
        **{"argv": argv, "env": env, "results_name": results, "limits": checked, "sandbox": box},
        "prestart": prestart,  # argv[0] is Python with a script, and `env` changes nothing about how it starts
    }


# --------------------------------------------------------------------------------------------------- the agent


class Watch:
    """One attempt the agent is connected to, and what of it has been sent to the server."""

    def __init__(self, job: str, attempt: int, path: str, directory: int) -> None:
        self.job, self.attempt, self.path, self.directory = job, attempt, path, directory
        self.socket = -1
        self.buffer = b""
        self.record: Json | None = None
        self.lost = False
        self.launched = False  # by this agent, so its supervisor may stand by for it again
        self.word: tuple[Any, Json] | None = None  # the answer to its launch, held back until `word_at`
        self.word_at = 0.0
        self.identity = read_identity(directory)
        self.following = False
        self.offsets = dict.fromkeys(STREAMS, 0)
        self.turn_offset = 0  # in the file of turns, up to where their output was sent
        self.files: dict[str, int] = {}
        self.grown = False
        self.last_push = 0.0
        self.pump_at: float | None = None
        self.blocked = False  # there is more to send than the queue to the server takes
        self.settle_at: float | None = None  # when to look at the lock again
        self.lost_since: float | None = None
        self.left: set[int] = set()  # what looks at a lost supervisor's job have found
        self.looks = 0  # so many more are to find nothing new
        self.overdue_at: float | None = None
        last = self.identity.get("last_clock")
        if isinstance(last, (int, float)):
            self.overdue_at = last + OVERDUE

    def tell(self, message: Json) -> bool:
        """Send a line to the supervisor without waiting."""
        if self.socket < 0:
            return False
        try:
            return os.write(self.socket, compact(message) + b"\n") > 0
        except OSError:
            return False

    def stream(self, name: str) -> int:
        if name not in self.files:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self.files[name] = os.open(name, flags, dir_fd=self.directory)
        return self.files[name]

    def goals(self) -> Iterator[tuple[str, int]]:
        """What to send, in the order in which it was printed: (stream, up to which byte), one after the other.

        Output after the last turn is of one stream; where no turns were noted stdout goes first.
        """
        sizes = {name: self._size(name) for name in STREAMS}  # before the turns, so that they cover all of it
        while True:
            data = self._turns()
            for turn in TURN.iter_unpack(data[: len(data) // TURN.size * TURN.size]):
                goals = dict(zip(STREAMS, turn))
                reached = all(goals[name] <= sizes[name] for name in STREAMS)
                if not reached and self.record is not None:
                    break  # what a job without a sandbox has made of the file
                for name in STREAMS:
                    yield name, min(goals[name], sizes[name])
                if not reached:
                    return
                self.turn_offset += TURN.size
            else:
                if len(data) >= TURNS_READ:
                    continue
            break
        yield from sizes.items()

    def _size(self, name: str) -> int:
        try:
            size = os.fstat(self.stream(name)).st_size
        except OSError:  # a job without a sandbox removed it
            return 0
        return size if self.record is None else min(size, self.record.get(f"{name}_bytes", 0))

    def _turns(self) -> bytes:
        try:
            return os.pread(self.stream("turns"), TURNS_READ, self.turn_offset)
        except OSError:  # an attempt from before there were any
            return b""

    def pause(self) -> float:
        """Seconds between two looks at output that grows."""
        return COALESCE if self.turn_offset < MAX_TURNS * TURN.size else COALESCE_UNNOTED

    def close(self) -> None:
        for fd in [self.directory, *self.files.values()]:
            os.close(fd)
        self.files.clear()


class Pending(NamedTuple):
    """A request whose answer a child will give: a launch (by its supervisor) or a probe."""

    id: Any
    key: tuple[str, int] | None
    offsets: dict[str, int]
    buffer: bytearray
    pid: int
    deadline: float


Reply = Optional[Tuple[Json, bytes]]


class Agent:
    """The serving side: requests in, replies and pushes out, in one thread that never waits for anything but events."""

    def __init__(self, root: str, tag: str, instance: str) -> None:
        self.root, self.tag, self.instance = root, tag, instance
        self.folder_id = folder_id(root)
        self.boot = boot_id()
        self.reader = FrameReader()
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.queue: deque[memoryview] = deque()
        self.queued = 0
        self.flush_at: float | None = None
        self.watches: dict[tuple[str, int], Watch] = {}
        self.by_socket: dict[int, Watch] = {}
        self.pending: dict[int, Pending] = {}
        self.cleaner = 0
        self.clean_again = False
        self.clean_at: float | None = None
        self.lease: Json = {}
        self.spare = -1  # socket to the supervisor that stands by for the next launch
        self.spare_at: float | None = clock() + SPARE_DELAY
        self.expected: Json | None = None  # the spec of the last launch: the next one will hardly need another start
        self.prestart_at: float | None = None
        self.stopping = False
        self.removing = False
        self.ops: dict[str, Callable[[Json, bytearray], Reply]] = {
            "hello": self._hello,
            "list": self._list,
            "ping": self._ping,
            "probe": self._probe,
            "expect": self._expect_launch,
            "launch": self._launch,
            "follow": self._follow,
            "kill": self._kill,
            "fetch": self._fetch,
            "forget": self._forget,
            "stop": self._stop,
        }

    def serve(self) -> None:
        """Until the server closes stdin or says stop. Running jobs are not touched by that."""
        wake, writer = os.pipe()
        for fd in (0, 1, wake, writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._register(wake, self._on_child)
        self._register(0, self._on_input)
        self._clean()
        for job, attempt in self._attempts():
            watch = self._open(job, attempt)
            if watch is not None and self._state(watch) == "ended":
                self._close(watch)
        gc.collect()
        gc.freeze()  # the forks then share more of the agent's memory
        while not self.stopping:
            for fd, _ in self.poll.poll(self._timeout()):
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler(fd)
            self._timers()
            # What came up in one round goes out in one piece.
            if self.flush_at is not None and clock() >= self.flush_at:
                self._on_writable(1)
        deadline = clock() + 1
        self._on_writable(1)
        while self.queued and clock() < deadline and self.poll.poll(100):
            self._on_writable(1)
        if self.removing:
            remove_root(self.root)

    # The loop's parts

    def _register(self, fd: int, handler: Callable[[int], None], events: int = select.POLLIN) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, events)

    def _unregister(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def _timeout(self) -> int | None:
        times = [pending.deadline for pending in self.pending.values()]
        if self.spare_at is not None:
            times.append(self.spare_at)
        if self.prestart_at is not None:
            times.append(self.prestart_at)
        if self.clean_at is not None:
            times.append(self.clean_at)
        if self.flush_at is not None:
            times.append(self.flush_at)
        for watch in self.watches.values():
            if watch.word is not None:
                times.append(watch.word_at)
            times += [at for at in (watch.pump_at, watch.settle_at, watch.overdue_at) if at is not None]
        if not times:
            return None
        return math.ceil(max(0.0, min(min(times) - clock(), 3600.0)) * 1000)

    def _timers(self) -> None:
        now = clock()
        if self.spare_at is not None and now >= self.spare_at:
            self._make_spare()
        if self.prestart_at is not None and now >= self.prestart_at:
            self._prestart()
        if self.clean_at is not None and now >= self.clean_at:
            self._clean()
        for watch in list(self.watches.values()):
            if watch.word is not None and now >= watch.word_at:
                self._give_word(watch)
            if watch.settle_at is not None and now >= watch.settle_at:
                self._settle(watch)
            if watch.pump_at is not None and now >= watch.pump_at:
                self._pump(watch)
            if watch.overdue_at is not None and now >= watch.overdue_at:
                watch.overdue_at = None
                if watch.record is None and is_running(watch.identity, self.boot):
                    log(f"the supervisor of {watch.path} missed its last deadline: killing it")
                    send_signal(watch.identity["pid"], signal.SIGKILL)
        for fd, pending in list(self.pending.items()):
            if now >= pending.deadline:
                self._give_up(fd, pending)

    def _on_child(self, fd: int) -> None:
        os.read(fd, 4096)
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.cleaner:
                self.cleaner = 0
                if self.clean_again:
                    self._clean()

    def _clean(self) -> None:
        """Empty tmp/ and trash/ in a child, at most one at a time."""
        self.clean_at = None
        self.clean_again = self.cleaner != 0
        if not self.cleaner:
            self.cleaner = fork_detached(lambda: clear_leftovers(self.root), (), twice=False)

    def _on_input(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.stopping = True
        for header, payload in self.reader.feed(data):
            self._answer(header, payload)

    def _answer(self, request: Json | None, payload: bytearray) -> None:
        if request is None:
            return self._reply_error(None, Refused("bad_request", "This was not a line with a JSON object."))
        try:
            op = request.get("op")
            handler = self.ops.get(op) if isinstance(op, str) else None
            if handler is None:
                raise Refused("bad_request", "There is no such operation.")
            # Not while a job starts or runs, nor before the server has taken its end: nobody else could tell it.
            if folder_id(self.root) != self.folder_id and not self.watches and not self.pending:
                return self._end_without_folder()
            reply = handler(request, payload)
        except Refused as refused:
            self._reply_error(request.get("id"), refused)
        except Exception as error:
            log(traceback.format_exc())
            code = error_code(error, "internal")
            self._reply_error(request.get("id"), Refused(code, f"The node agent failed: {error!r:.500}."))
        else:
            if reply is not None:
                self._reply(request.get("id"), *reply, lazy=op == "forget")

    def _end_without_folder(self) -> None:
        """Somebody removed the folder, or put another in its place: nothing can be done here, by a new agent it can."""
        if not self.stopping:
            message = f"The folder {self.root} was removed or replaced: the agent is started anew."
            log(message)
            self._send({"push": "fatal", "error": "folder_gone", "message": message})
        self.stopping = True

    def _reply(self, request_id: Any, fields: Json, payload: bytes = b"", lazy: bool = False) -> None:
        self._send({"re": request_id, "ok": True, "clock": clock(), **fields}, payload, lazy)

    def _reply_error(self, request_id: Any, refused: Refused) -> None:
        self._send({"re": request_id, "ok": False, "clock": clock(), "error": refused.code, "message": str(refused)})

    def _send(self, header: Json, payload: bytes = b"", lazy: bool = False) -> None:
        """Queue a message, to be written at the end of this round; a lazy one mostly with one that comes after it."""
        if payload:
            header["size"] = len(payload)
        data = compact(header) + b"\n" + payload
        self.queue.append(memoryview(data))
        self.queued += len(data)
        if 1 not in self.handlers:  # else the rest is written as soon as that is possible
            at = clock() + LAZY if lazy else 0.0
            self.flush_at = at if self.flush_at is None else min(at, self.flush_at)

    def _on_writable(self, fd: int) -> None:
        self.flush_at = None
        while self.queue:
            try:
                count = os.writev(1, list(itertools.islice(self.queue, 64)))
            except BlockingIOError:
                break
            except OSError:  # the server is gone
                self.stopping = True
                self.queue.clear()
                self.queued = 0
                break
            self.queued -= count
            while count:
                part = self.queue.popleft()
                if count < len(part):
                    self.queue.appendleft(part[count:])
                    break
                count -= len(part)
        if not self.queue:
            self._unregister(1)
        elif 1 not in self.handlers:
            self._register(1, self._on_writable, select.POLLOUT)
        if self.queued < HIGH_WATER // 2:
            for watch in self.watches.values():
                if watch.blocked:
                    watch.blocked, watch.pump_at = False, 0.0

    # Attempts

    def _path(self, job: str, attempt: int) -> str:
        return os.path.join(self.root, "attempts", f"{job}.{attempt}")

    def _attempts(self) -> list[tuple[str, int]]:
        found = (ATTEMPT_DIRECTORY.match(name) for name in os.listdir(os.path.join(self.root, "attempts")))
        return sorted((match.group(1), int(match.group(2))) for match in found if match)

    def _open(self, job: str, attempt: int, connected: int = -1) -> Watch | None:
        """The watch of an attempt, made if need be; None if there is no such attempt."""
        watch = self.watches.get((job, attempt))
        if watch is not None:
            if connected >= 0:
                os.close(connected)
            return watch
        path = self._path(job, attempt)
        try:
            watch = Watch(job, attempt, path, open_directory(path))
        except FileNotFoundError:
            return None
        self.watches[job, attempt] = watch
        self._connect(watch, connected)
        return watch

    def _connect(self, watch: Watch, connected: int = -1) -> None:
        launched = connected >= 0
        if not launched and is_locked(watch.directory):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.setblocking(False)
            try:
                client.connect(f"/proc/self/fd/{watch.directory}/control")
                connected = client.detach()
            except OSError:  # ending just now, or the job removed the socket: then the lock tells the end
                client.close()
        if connected >= 0:
            watch.socket = connected
            self.by_socket[connected] = watch
            self._register(connected, self._on_supervisor)
            # A launch has a lease of its own: pings promised theirs to attempts that were there before it.
            if self.lease and not launched:
                watch.tell(self.lease)
        else:
            self._settle(watch)

    def _disconnect(self, watch: Watch) -> None:
        if watch.socket >= 0:
            self._unregister(watch.socket)
            self.by_socket.pop(watch.socket, None)
            os.close(watch.socket)
            watch.socket = -1

    def _close(self, watch: Watch) -> None:
        self._disconnect(watch)
        watch.close()
        self.watches.pop((watch.job, watch.attempt), None)

    def _state(self, watch: Watch) -> str:
        if watch.lost:
            return "lost"
        if watch.record is not None:
            return "ended"
        if is_locked(watch.directory):
            return "running"
        return "ended" if read_json_at(watch.directory, "exit.json") is not None else "lost"

    def _on_supervisor(self, fd: int) -> None:
        watch = self.by_socket[fd]
        try:
            data = os.read(fd, PIPE_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._disconnect(watch)
            if watch.record is not None and not watch.following:
                return self._close(watch)
            return self._settle(watch)
        self._on_events(watch, data)

    def _on_events(self, watch: Watch, data: bytes) -> None:
        *lines, watch.buffer = (watch.buffer + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "grown":
                watch.grown = True
                if watch.pump_at is None and not watch.blocked:
                    watch.pump_at = watch.last_push + watch.pause()
            elif event.get("event") == "exit":
                self._ended(watch, event["record"])
                if watch.launched and event.get("again"):
                    return self._take_back(watch)

    def _take_back(self, watch: Watch) -> None:
        """Its supervisor stands by for the next launch. Until it has written the record, ours is the truth."""
        self._unregister(watch.socket)
        del self.by_socket[watch.socket]
        if self.spare < 0:
            self.spare, self.spare_at = watch.socket, None
            self.prestart_at = clock() + PRESTART_DELAY
        else:
            os.close(watch.socket)  # then it ends
        watch.socket = -1

    def _ended(self, watch: Watch, record: Json) -> None:
        watch.record = record
        watch.settle_at = watch.overdue_at = None
        watch.pump_at = 0.0

    def _settle(self, watch: Watch) -> None:
        """No supervisor to listen to: its record, its lock or what it left behind decide how the attempt stands."""
        watch.settle_at = None
        if watch.record is not None:
            return
        now = clock()
        locked = is_locked(watch.directory)  # before the record is looked for: it is written under the lock
        record = read_json_at(watch.directory, "exit.json")
        if record is not None:
            return self._ended(watch, record)
        watch.lost_since = watch.lost_since or now
        if locked:
            watch.settle_at = now + min(1.0, 0.01 + (now - watch.lost_since))
            if watch.following:
                watch.pump_at = now  # without a socket nobody tells of growth
            return
        watch.identity = read_identity(watch.directory) or watch.identity
        if not watch.lost:
            watch.lost, watch.lost_since = True, now
        left = end_leftovers(watch.path, watch.identity, self.boot)
        found = {process.pid for process in left}
        forking = bool(watch.left) and not found <= watch.left
        watch.left |= found
        watch.looks = LOOKS if forking else watch.looks - 1
        if watch.looks > 0 or (left and now < watch.lost_since + KILL_LIMIT):
            watch.settle_at = now + 0.02
        else:
            if left:
                note_survivors(self.root, watch.job, watch.attempt, left, named_groups(watch.identity))
            self._ended(watch, self._lost_record(watch, len(left)))

    def _lost_record(self, watch: Watch, survivors: int) -> Json:
        """The record of an attempt whose supervisor left none. Not kept: it can be made again from the same facts."""
        rebooted = watch.identity.get("boot_id") not in (None, self.boot)
        message = "The node was restarted while the job ran." if rebooted else "The job's supervisor was killed."
        record: Json = {"format": FORMAT, "job": watch.job, "attempt": watch.attempt, "reason": "supervisor_lost"}
        record.update(message=message, exit_code=None, signal=None, survivors=survivors, output_error=None)
        for name in STREAMS:
            try:
                size = os.fstat(watch.stream(name)).st_size
            except OSError:
                size = 0
            record.update({f"{name}_bytes": size, f"{name}_truncated": False, f"{name}_sha256": None})
        for name in ("wall_seconds", "user_seconds", "system_seconds", "max_rss_kib", "ended_clock"):
            record[name] = None
        record.update(started_clock=watch.identity.get("started_clock"), boot_id=watch.identity.get("boot_id"))
        return {**record, "results": {"state": "absent"}}

    def _give_word(self, watch: Watch) -> None:
        """Answer the launch, before anything is pushed."""
        if watch.word is not None:
            self._reply(*watch.word)
            watch.word = None

    def _pump(self, watch: Watch) -> None:
        """Send what the attempt's files hold beyond the offsets; after everything, the exit."""
        watch.pump_at = None
        if not watch.following:
            return
        if watch.grown and watch.record is None:  # before reading: what comes later is told again
            watch.grown = False
            watch.tell({"ack": 1})
        budget = HIGH_WATER
        for name, end in watch.goals():
            while watch.offsets[name] < end:
                if self.queued > HIGH_WATER:
                    watch.blocked = True
                    return
                if budget <= 0:  # let requests in between
                    watch.pump_at = 0.0
                    return
                offset = watch.offsets[name]
                try:
                    data = os.pread(watch.stream(name), min(CHUNK, end - offset), offset)
                except OSError:
                    data = b""
                if not data:
                    break
                self._give_word(watch)
                header: Json = {"push": "output", "job": watch.job, "attempt": watch.attempt, "stream": name}
                self._send({**header, "offset": offset}, data)
                watch.offsets[name] += len(data)
                watch.last_push = clock()
                budget -= len(data)
        if watch.record is not None:
            self._give_word(watch)
            results, payload = self._results(watch, watch.record)
            header = {"push": "exit", "job": watch.job, "attempt": watch.attempt, "record": watch.record}
            with contextlib.suppress(OSError):
                header["free_bytes"] = free_bytes(self.root)
            self._send({**header, "results": results, **watch.offsets}, payload)
            watch.following = False
            if self.spare < 0:
                self.spare_at = clock()
            # Its supervisor may still be writing what is known here. Once it has ended the disk holds the truth; where
            # it stands by again, nobody tells when it is done: then this is kept until the attempt is forgotten.
            if watch.socket < 0 and not watch.launched:
                self._close(watch)

    def _spec(self, directory: int) -> tuple[str, int]:
        """(name, size limit) of an attempt's results."""
        spec = read_json_at(directory, "spec.json") or {}
        limits = spec.get("limits")
        limit = limits.get("result_bytes") if isinstance(limits, dict) else None
        name = spec.get("results_name")
        good = isinstance(name, str) and FILE_NAME.match(name)
        return (name if good and name else "results.jsonl"), (limit if isinstance(limit, int) else CHUNK)

    def _results(self, watch: Watch, record: Json) -> tuple[Json, bytes]:
        """The results as the supervisor found them, with the content if it is small and still the same."""
        results = record.get("results") or {"state": "absent"}
        if results.get("state") != "inline" or not results["bytes"]:
            return results, b""
        try:
            fd, size = open_results(watch.directory, *self._spec(watch.directory))
            try:
                data = os.read(fd, min(size, CHUNK))
            finally:
                os.close(fd)
        except (OSError, Refused):
            data = b""
        if len(data) != results["bytes"] or hashlib.sha256(data).hexdigest() != results["sha256"]:
            return {"state": "invalid", "message": "The results file changed after the job's end."}, b""
        return results, data

    # Requests

    def _hello(self, request: Json, payload: bytearray) -> Reply:
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            user = str(os.getuid())
        answer: Json = {"protocol": PROTOCOL, "agent_version": self.tag, "instance": self.instance, "pid": os.getpid()}
        answer.update(boot_id=self.boot, uid=os.getuid(), user=user, hostname=os.uname().nodename)
        answer.update(python="{}.{}.{}".format(*sys.version_info), attempts=self._describe_all())
        return answer, b""

    def _list(self, request: Json, payload: bytearray) -> Reply:
        return {"attempts": self._describe_all()}, b""

    def _describe_all(self) -> list[Json]:
        result = []
        for job, attempt in self._attempts():
            known = (job, attempt) in self.watches
            watch = self._open(job, attempt)
            if watch is None:
                continue
            entry: Json = {"job": job, "attempt": attempt, "state": self._state(watch), "record": None}
            for name in STREAMS:
                try:
                    entry[name] = os.stat(name, dir_fd=watch.directory, follow_symlinks=False).st_size
                except OSError:
                    entry[name] = 0
            if entry["state"] == "ended":
                entry["record"] = watch.record or read_json_at(watch.directory, "exit.json")
            entry["boot_id"] = watch.identity.get("boot_id")
            entry["started_clock"] = (entry["record"] or watch.identity).get("started_clock")
            result.append(entry)
            if not known and entry["state"] == "ended":
                self._close(watch)
        return result

    def _ping(self, request: Json, payload: bytearray) -> Reply:
        if "lease_until" in request:
            self.lease = {"lease": take_clock(request, "lease_until")}
            for watch in self.watches.values():
                watch.tell(self.lease)
        return {}, b""

    def _probe(self, request: Json, payload: bytearray) -> Reply:
        asked: Json = {"python": take_text(request, "python", "python3"), "gpus": take_gpus(request)}
        asked["sandbox"] = take_text(request, "sandbox", "auto", ("auto", "required", "off"))
        asked["network"] = take_text(request, "network", "none", ("none", "host"))
        asked["binds"] = take_texts(request, "binds")
        asked["only"] = take_text(request, "only", "", ("", "clean"))
        asked["idle_mib"] = take_int(request, "idle_mib", 0, 1 << 40, 0)
        if not asked["python"]:
            raise bad("python", "the name or path of an interpreter")
        reader, writer = os.pipe()

        def body() -> None:
            try:
                answer = {"event": "probed", **probe(self.root, asked)}
            except Exception as error:
                answer = {"event": "failed", "error": "probe_failed", "message": f"The probe failed: {error!r}."}
            write_all(writer, compact(answer) + b"\n")

        pid = fork_detached(body, (writer,), twice=False)
        os.close(writer)
        self._expect(reader, Pending(request.get("id"), None, {}, bytearray(), pid, clock() + PROBE_LIMIT))
        return None

    def _launch(self, request: Json, payload: bytearray) -> Reply:
        job, attempt = take_key(request)
        spec, offsets = take_spec(request), self._offsets(request)
        launch = Launch(job, attempt, take_number(request, "not_after"), take_clock(request, "lease_until"), spec)
        if os.path.lexists(self._path(job, attempt)):
            return {"attached": True, **self._attach(job, attempt, offsets)}, b""
        if clock() > launch.not_after:
            raise Refused("expired", "The launch came after its time; nothing was started.")
        self.expected, self.prestart_at = spec, None
        supervisor = self._hand_over(launch, payload)
        self._expect(supervisor, Pending(request.get("id"), (job, attempt), offsets, bytearray(), 0, float("inf")))
        return None

    def _hand_over(self, launch: Launch, code: bytearray) -> int:
        """Give a launch to the supervisor standing by, or to a fresh one: the socket to it."""
        header = json.dumps(list(launch)).encode()
        while True:
            fresh = self.spare < 0
            if fresh:
                self._make_spare()
            supervisor, self.spare = self.spare, -1
            try:
                send_parcel(supervisor, LAUNCH, len(header).to_bytes(8, "big") + header, code)
                return supervisor
            except OSError:  # the spare one was killed
                os.close(supervisor)
                if fresh:
                    raise

    def _expect_launch(self, request: Json, payload: bytearray) -> Reply:
        """The server tells what the next launch will look like."""
        self.expected, self.prestart_at = take_spec(request), clock() + EXPECT_DELAY
        return {}, b""

    def _prestart(self) -> None:
        """Tell the supervisor standing by what to start before its launch comes."""
        self.prestart_at = clock() + PRESTART_AGE
        if self.expected is not None and self.spare >= 0:
            with contextlib.suppress(OSError):  # it was killed: noticed at the next launch
                send_parcel(self.spare, PRESTART, compact(self.expected))

    def _make_spare(self) -> None:
        self.spare_at = None
        seccomp_filter()  # made once, for all that are forked from here
        ours, theirs = (end.detach() for end in socket.socketpair())
        os.set_blocking(ours, False)
        fork_detached(lambda: supervise(self.root, theirs, self.tag), (theirs,), twice=True)
        os.close(theirs)
        self.spare, self.prestart_at = ours, self.prestart_at or clock() + PRESTART_DELAY

    def _expect(self, fd: int, pending: Pending) -> None:
        self.pending[fd] = pending
        self._register(fd, self._on_pending)

    def _on_pending(self, fd: int) -> None:
        """The first line of a child decides the answer to its request."""
        pending = self.pending[fd]
        try:
            data = os.read(fd, PIPE_READ)
        except BlockingIOError:
            return
        pending.buffer.extend(data)
        line, found, rest = bytes(pending.buffer).partition(b"\n")
        if data and not found:
            return
        del self.pending[fd]
        self._unregister(fd)
        event: Json = {"event": "failed", "error": "launch_failed"}
        event["message"] = "The supervisor ended before the job began."
        if found:
            event = json.loads(line)
        elif pending.key is None:
            event.update(error="probe_failed", message="The probe ended without an answer.")
        kind = event.pop("event")
        if kind == "launched" and pending.key is not None:
            watch = self._open(*pending.key, connected=fd)
            if watch is not None:
                watch.launched = True
                watch.word, watch.word_at = (pending.id, {"attached": False, **event}), clock() + HOLD
                self._begin_following(watch, pending.offsets)
                return self._on_events(watch, rest)
        os.close(fd)
        if kind == "probed":
            return self._reply(pending.id, event)
        if self.spare < 0:
            self.spare_at = clock() + SPARE_DELAY
        if kind == "exists" and pending.key is not None:
            self._clean()
            try:
                return self._reply(pending.id, {"attached": True, **self._attach(*pending.key, pending.offsets)})
            except Refused as refused:
                return self._reply_error(pending.id, refused)
        if pending.key is not None:
            self._clean()
        code, message = event.get("error", "launch_failed"), event.get("message", "The attempt is gone.")
        self._reply_error(pending.id, Refused(code, message))

    def _give_up(self, fd: int, pending: Pending) -> None:
        del self.pending[fd]
        self._unregister(fd)
        os.close(fd)
        try:
            os.killpg(pending.pid, signal.SIGKILL)  # it leads its own session
        except OSError:
            send_signal(pending.pid, signal.SIGKILL)
        message = f"The node did not answer the probe within {PROBE_LIMIT:.0f} s; a tool on it hangs."
        self._reply_error(pending.id, Refused("probe_timeout", message))

    def _offsets(self, request: Json) -> dict[str, int]:
        return {name: take_int(request, name, 0, 1 << 60, default=0) for name in STREAMS}

    def _attach(self, job: str, attempt: int, offsets: dict[str, int]) -> Json:
        watch = self._open(job, attempt)
        if watch is None:
            raise Refused("unknown_attempt", f"There is no attempt {attempt} of job {job} on this node.")
        state = self._state(watch)
        self._begin_following(watch, offsets)
        return {"state": state}

    def _begin_following(self, watch: Watch, offsets: dict[str, int]) -> None:
        watch.following, watch.offsets, watch.blocked = True, dict(offsets), False
        watch.turn_offset = 0
        watch.pump_at = 0.0

    def _follow(self, request: Json, payload: bytearray) -> Reply:
        return self._attach(*take_key(request), self._offsets(request)), b""

    def _kill(self, request: Json, payload: bytearray) -> Reply:
        job, attempt = take_key(request)
        reason = take_text(request, "reason", "cancelled", KILL_REASONS)
        grace = max(0.0, take_clock(request, "grace") or 0.0)
        watch = self.watches.get((job, attempt))
        if watch is None or self._state(watch) != "running":
            raise Refused("not_running", f"Attempt {attempt} of job {job} is not running.")
        if watch.socket < 0:
            self._connect(watch)
        if not watch.tell({"kill": reason, "grace": grace}) and not is_running(watch.identity, self.boot):
            raise Refused("not_running", f"Attempt {attempt} of job {job} is just ending.")
        # A supervisor that its job has stopped would never act: some time later it is killed, and the job with it.
        overdue = clock() + grace + OVERDUE
        watch.overdue_at = min(watch.overdue_at or overdue, overdue)
        return {}, b""

    def _fetch(self, request: Json, payload: bytearray) -> Reply:
        job, attempt = take_key(request)
        what = take_text(request, "what", among=("results", *STREAMS))
        offset = take_int(request, "offset", 0, 1 << 60, 0)
        length = take_int(request, "length", 0, MAX_FETCH, MAX_FETCH)
        known = self.watches.get((job, attempt))  # its name may lead elsewhere by now
        try:
            directory = os.dup(known.directory) if known else open_directory(self._path(job, attempt))
        except OSError:
            raise Refused("unknown_attempt", f"There is no attempt {attempt} of job {job} on this node.") from None
        try:
            if what == "results":
                fd, total = open_results(directory, *self._spec(directory))
            else:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(what, flags, dir_fd=directory)
                total = os.fstat(fd).st_size
            try:
                return {"total": total}, os.pread(fd, max(0, min(length, total - offset)), offset)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise Refused("results_absent", f"The job left no such file ({what}).") from None
        finally:
            os.close(directory)

    def _forget(self, request: Json, payload: bytearray) -> Reply:
        job, attempt = take_key(request)
        watch = self._open(job, attempt)
        if watch is None:
            return {}, b""
        # Once the record is whole, a supervisor that still holds its lock is just ending; the trash waits for it.
        over = watch.record is not None or read_json_at(watch.directory, "exit.json") is not None
        if not over and self._state(watch) != "ended":
            raise Refused("still_running", f"Attempt {attempt} of job {job} is still running or being cleared up.")
        self._close(watch)
        with contextlib.suppress(FileNotFoundError):  # the job itself removed it
            os.rename(watch.path, os.path.join(self.root, "trash", random_name()))
        if self.clean_at is None:
            self.clean_at = clock() + CLEAN_DELAY
        return {}, b""

    def _stop(self, request: Json, payload: bytearray) -> Reply:
        """End; with "remove": and take the agent's whole folder away, once it holds no attempt."""
        self.removing = request.get("remove") is True
        if self.removing and self._attempts():
            raise Refused("still_running", "There still are attempts in the folder that is to be removed.")
        if self.removing and self.spare >= 0:
            os.close(self.spare)  # who stands by ends with it
        self.stopping = True
        return {}, b""


def remove_root(root: str) -> None:
    """Remove an agent's folder, also while a supervisor that stood by, or a cleaner, is still clearing up in it."""
    deadline = clock() + KILL_LIMIT
    while True:
        try:
            os.makedirs(os.path.join(root, "trash"), mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(os.path.join(root, "gate"), os.path.join(root, "trash", random_name()))
            clear_leftovers(root)
            for name in ("tmp", "trash", "attempts"):
                os.rmdir(os.path.join(root, name))
            break
        except OSError as error:
            if clock() > deadline:
                return log(f"cannot remove {root}: {error}")
            os.makedirs(os.path.join(root, "tmp"), mode=0o700, exist_ok=True)
            time.sleep(0.02)
    for name in os.listdir(root):
        os.unlink(os.path.join(root, name))
    os.rmdir(root)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(root))  # the instance's, when this was its last node


def named_groups(record: Json) -> list[str]:
    """The control groups of an attempt that a file names. A job without a sandbox can write that file, so only
    groups that are a job's are taken from it."""
    named = record.get("groups")
    groups = [group for group in named if isinstance(group, str)] if isinstance(named, list) else []
    tops = {top for _, top in group_places().values()} if groups else set()
    return [g for g in groups if os.path.dirname(g) in tops and os.path.basename(g).startswith(GROUP_NAME)]


def note_survivors(
    root: str, job: str, attempt: int, left: list[Process], groups: list[str], keeper: int | None = None
) -> None:
    """Remember what could not be killed: until it is seen to be gone, the node is not clean.

    `keeper`: the supervisor that goes on killing, and ends when nothing is left.
    """
    named = [[process.pid, process.start] for process in left[:MAX_SURVIVORS]]
    record: Json = {"boot_id": boot_id(), "processes": named, "groups": groups}
    supervisor = read_process(keeper) if keeper is not None else None
    if supervisor is not None:
        record["keeper"] = [supervisor.pid, supervisor.start]
    log(f"{len(left)} processes of {job}.{attempt} could not be ended: {named}")
    try:
        folder = open_directory(root)
        try:
            write_at(folder, f"{SURVIVORS}{job}.{attempt}", compact(record))
        finally:
            os.close(folder)
    except OSError as error:
        log(f"cannot remember them: {error}")


def surviving(root: str) -> list[Json]:
    """What was noted as surviving and still lives, killed once more: `{job, attempt, pid, state}`. A note of which
    nothing is left is removed."""
    boot, result = boot_id(), []

    def living_pid(named: Any) -> int | None:
        """Of a process noted as [pid, start]; None when it is gone or this is no such note."""
        if not isinstance(named, list) or len(named) != 2:
            return None
        pid, start = named
        return pid if is_running({"pid": pid, "start_time": start, "boot_id": boot}, boot) else None

    folder = open_directory(root)
    try:
        for name in os.listdir(folder):
            found = ATTEMPT_DIRECTORY.match(name[len(SURVIVORS) :]) if name.startswith(SURVIVORS) else None
            if found is None:
                continue
            record = read_json_at(folder, name) or {}
            named = record.get("processes")
            # A job without a sandbox may have written anything here.
            alive = {pid for pid in map(living_pid, named if isinstance(named, list) else []) if pid is not None}
            groups = named_groups(record)
            forbid_forks(groups)
            alive.update(pid for group in groups for pid in pids_in(group))
            keeper = living_pid(record.get("keeper"))
            if keeper is not None:
                alive.discard(keeper)  # if it still is in its group
            if record.get("boot_id") != boot:
                alive, keeper = set(), None
            living = [process for process in map(read_process, sorted(alive)) if process and process.state not in "ZX"]
            for process in living:
                kill_for_good(process)
            if keeper is not None and not living:  # it knows of some that are not in sight
                living = [process for process in (read_process(keeper),) if process]
            for process in living:
                key = {"job": found.group(1), "attempt": int(found.group(2))}
                result.append({**key, "pid": process.pid, "state": process.state})
            if not living:
                with contextlib.suppress(FileNotFoundError):  # another look was faster
                    os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)
    return result[:MAX_SURVIVORS]


def end_leftovers(path: str, identity: Json, boot: str) -> list[Process]:
    """SIGKILL to the living processes of an attempt whose supervisor is dead, each as it is found; which there were.

    The first process died with it (PDEATHSIG), a sandbox as a whole. Without a sandbox the job's session, whatever has
    its HOME in the environment, and their descendants are found; who left both behind only where there is a group.
    """
    if identity.get("boot_id") != boot:
        return []
    found: dict[int, Process] = {}

    def end(process: Process | None) -> None:
        if process is not None and process.state not in "ZX":
            found[process.pid] = process
            kill_for_good(process)

    groups = named_groups(identity)
    forbid_forks(groups)
    for group in groups:
        for pid in pids_in(group):
            end(read_process(pid))
    homes = [path]
    prepared = identity.get("prepared")  # what was prestarted keeps the name of its folder from before it had a job
    if isinstance(prepared, str) and FILE_NAME.match(prepared):
        homes.append(os.path.join(os.path.dirname(os.path.dirname(path)), "tmp", prepared))
    markers = [b"\0HOME=" + os.fsencode(os.path.join(home, "work")) + b"\0" for home in homes]
    session, start = identity.get("job_pid"), identity.get("job_start_time")
    leader = read_process(session) if type(session) is int else None
    reused = leader is not None and leader.start != start
    table = {}
    for process in newest_processes():
        table[process.pid] = process
        mine = process.sid == session and not reused
        if not mine and process.pid != os.getpid():
            try:
                with open(f"/proc/{process.pid}/environ", "rb") as file:
                    environment = b"\0" + file.read() + b"\0"
                    mine = any(marker in environment for marker in markers)
            except OSError:
                pass  # another user's, or gone
        if mine:
            end(process)
    for process in descendants(table, list(found)):
        end(process)
    return list(found.values())


# --------------------------------------------------------------------------------------------------- start


def take_over(root: str) -> bool:
    """Become the one agent of this root: an older one, left over from a dead connection, is killed."""
    fd = os.open(os.path.join(root, "agent.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    boot, deadline = boot_id(), clock() + 5
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        try:
            holder = json.loads(os.pread(fd, 4096, 0) or b"{}")
        except ValueError:
            holder = {}
        if isinstance(holder, dict) and holder.get("pid") != os.getpid() and is_running(holder, boot):
            send_signal(holder["pid"], signal.SIGKILL)
        if clock() > deadline:
            return False
        time.sleep(0.01)
    own = read_process(os.getpid())
    os.ftruncate(fd, 0)
    os.pwrite(fd, compact({"pid": os.getpid(), "start_time": own.start if own else 0, "boot_id": boot}), 0)
    return True  # the descriptor stays open as long as this process lives


def main(argv: list[str]) -> int:
    """`agent.py serve --root DIR [--tag VERSION] [--instance LABEL] [--nice STEPS]`."""
    options = {"--root": "", "--tag": "unknown", "--instance": "", "--nice": "0"}
    words = argv[2:]
    if argv[1:2] != ["serve"] or len(words) % 2 or not set(words[::2]) <= set(options):
        print(main.__doc__, file=sys.stderr)
        return 2
    options.update(zip(words[::2], words[1::2]))
    if not options["--root"]:
        print(main.__doc__, file=sys.stderr)
        return 2
    os.nice(int(options["--nice"]))
    share_as_nice()
    os.umask(0o077)
    root = os.path.realpath(os.path.expanduser(options["--root"]))
    for folder in ("tmp", "trash", "attempts"):
        os.makedirs(os.path.join(root, folder), mode=0o700, exist_ok=True)
    path = os.path.join(root, "agent.log")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(fd).st_size > LOG_LIMIT:
        os.ftruncate(fd, 0)
    os.dup2(fd, 2)
    os.close(fd)
    if not take_over(root):
        message = f"Another agent holds {root}/agent.lock and could not be ended; look for it with ps on the node."
        write_all(1, compact({"push": "fatal", "error": "locked", "message": message}) + b"\n")
        return 3
    try:
        Agent(root, options["--tag"], options["--instance"]).serve()
    except BaseException:
        log(traceback.format_exc())
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
