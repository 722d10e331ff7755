"""Places at which a test can have the server die, as by `kill -9`. May import nothing of the project.

`JOB_SERVER_FAILPOINT=name` kills the process the first time it comes by that place, `name:3` the third time. Without
the variable a place costs one comparison. The names are in `NAMES`, so that tests can go through all of them.
"""

from __future__ import annotations

import os
import signal
import threading

NAMES = (
    "submit_committed",  # the job is durable, its submitter has no answer yet
    "claimed",  # the claim is durable, the node has not been told
    "launch_sent",  # the node may have started the job, the server does not know
    "launched",  # the node has started it, that may not be written down yet
    "output_received",  # a piece of the output is here, not yet in its file
    "exit_received",  # the node has told the end, nothing was done about it
    "sealed",  # the results are whole in the job's folder, not published
    "published",  # the results have their final name, the job is still running in the database
    "finished",  # the job is final, the node still has its copy
    "requeued",  # the job is pending again after an infrastructure failure
    "adopted",  # a former process's job was taken over, the node has not been asked
    "reconciled",  # the node was asked, the output does not flow yet
)
_armed, _, _count = os.environ.get("JOB_SERVER_FAILPOINT", "").partition(":")
_left = int(_count or 1)
_lock = threading.Lock()
if _armed and _armed not in NAMES:
    raise SystemExit(f"JOB_SERVER_FAILPOINT: there is no failpoint {_armed!r}; there are {', '.join(NAMES)}")


def reach(name: str) -> None:
    """Die here if this place is armed and was reached often enough."""
    if name != _armed:
        return
    global _left
    with _lock:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
