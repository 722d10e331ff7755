"""What has to be done from time to time: forget old jobs, notice what command lines changed in the database,
take the samples of the charts.

One thread; it holds no state that matters. May import `clock`, `config`, `history`, `nodes`, `queue_manager`,
`storage`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import clock
from config import Settings
from history import History
from nodes import NodeRegistry
from queue_manager import QueueManager
from storage import Storage

log = logging.getLogger("maintenance")
DAY_US = 86_400_000_000
LOOK_EVERY = 2.0  # seconds between looks at what `main.py drain` and `resume` wrote
SAMPLE_EVERY = 60.0
PRUNE_EVERY = 600.0
PRUNE_BATCH = 100


class Maintenance(threading.Thread):
    """The thread; `start`, then `stop` and `join`."""

    def __init__(
        self,
        queue: QueueManager,
        storage: Storage,
        registry: NodeRegistry,
        history: History,
        settings: Settings,
        wake_node: Callable[[str], None],
    ) -> None:
        super().__init__(name="maintenance", daemon=True)
        self._queue = queue
        self._storage = storage
        self._registry = registry
        self._history = history
        self._settings = settings
        self._wake_node = wake_node
        self._fenced = registry.fenced()
        self._over = threading.Event()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._over.set()

    def run(self) -> None:
        """Until `stop`."""
        prune_at = sample_at = 0.0
        while not self._over.wait(LOOK_EVERY):
            try:
                self.notice_drains()
                self.lift_fence()
                if time.monotonic() >= sample_at:
                    sample_at = time.monotonic() + SAMPLE_EVERY
                    self._history.sample()
                if time.monotonic() >= prune_at:
                    more = self.prune()
                    # A long backlog goes in small batches, so that no request waits for it.
                    prune_at = 0.0 if more else time.monotonic() + PRUNE_EVERY
            except Exception:
                log.exception("maintenance failed; it is tried again")

    def notice_drains(self) -> None:
        """Bring the registry up to what the database says of drained nodes."""
        rows = self._queue.node_rows()
        for record in self._registry.all():
            row = rows.get(record.node_id)
            drained_by = row.drained_by if row is not None else None
            if record.drained_by != drained_by:
                self._registry.update(record.node_id, drained_by=drained_by)
                self._queue.nodes_changed()
                self._wake_node(record.node_id)

    def lift_fence(self) -> None:
        """Once no node can run what a restored database has forgotten, work is given out again."""
        if self._fenced and not self._registry.fenced():
            self._queue.database.lift_fence()
            self._fenced = False
            log.info("the nodes have been asked what they run; jobs are started again")
            for record in self._registry.all():
                self._wake_node(record.node_id)

    def prune(self) -> bool:
        """Forget one batch of jobs that ended more than RETENTION_DAYS ago; whether there may be more.

        Files go first: after a crash in between, the row is found again and its missing files are no error.
        """
        if self._settings.retention_days == 0:
            return False
        cutoff = clock.now_us() - self._settings.retention_days * DAY_US
        rows = self._queue.oldest_ended_before(cutoff, PRUNE_BATCH)
        for row in rows:
            self._storage.remove(row.job_id, row.result_file)
        if rows:
            count = self._queue.forget([row.seq for row in rows])
            log.info("forgot %d jobs that ended before %s", count, clock.iso(cutoff))
        # Among the oldest there may be some that still wait or run, so a batch that is not full says nothing.
        return bool(rows)
