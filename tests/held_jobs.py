"""Jobs that run until a test lets them go, a way to see from outside what a job started, and tokens for many users.

A held job waits on a named pipe in its working directory; the nodes of the tests are on this machine, so the test can
open the other end. The test decides when the job ends, and no one has to guess how long anything takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from auth import TokenDigest
from database import Database
from tests.fleet import Fleet
from tests.server import Server, wait_until
from token_manager import TokenManager, strong_token

WAIT_FOR_RELEASE = "open('go').read()\n"
HOLD = f"import os\nos.mkfifo('go')\nprint('held', flush=True)\n{WAIT_FOR_RELEASE}"


def make_tokens(server: Server, users: Iterable[str], *, admin: str) -> None:
    """What the command line does, for all of them at once: many users would be many seconds of starting Python."""
    database = Database(server.settings["DATABASE_URL"])
    try:
        manager = TokenManager(database, TokenDigest.from_file(Path(server.settings["TOKEN_KEY_FILE"])))
        for user_id in (*users, admin):
            server.tokens[user_id] = strong_token()
            manager.create(user_id, server.tokens[user_id], is_admin=user_id == admin)
    finally:
        database.close()


def work_folders(server: Server, fleet: Fleet | None, job_id: str) -> list[Path]:
    """Where the job's attempts run, on this machine or on the nodes of the fleet."""
    found = list(server.jobs_dir.glob(f".nodes/*/*/attempts/{job_id}.*/work"))
    for node in fleet.nodes if fleet is not None else []:
        found += node.home.glob(f".gpu-job-server/*/*/attempts/{job_id}.*/work")
    return found


def release(server: Server, fleet: Fleet | None, *job_ids: str) -> None:
    """Let held jobs go on; waits until each is at its pipe."""

    left = set(job_ids)

    def let_go() -> bool:
        for job_id in tuple(left):
            for folder in work_folders(server, fleet, job_id):
                with contextlib.suppress(OSError):  # nobody reads there yet
                    os.close(os.open(folder / "go", os.O_WRONLY | os.O_NONBLOCK))
                    left.remove(job_id)
        return not left

    wait_until(let_go, 40, f"jobs {job_ids} to be at their pipes")


def pids_with(word: str) -> list[int]:
    """Living processes of this machine that have `word` among their arguments, whatever namespace they are in."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:  # ended meanwhile
                continue
            if word.encode() in words:  # a zombie has no arguments any more
                found.append(int(entry))
    return found
