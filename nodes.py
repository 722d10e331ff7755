"""What the server knows of its nodes right now, for the queue's forecast and for whoever asks.

Each record is written by its worker's thread and read by any. May import `clock`, `states`, `executor`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import clock
import states
from executor import Probe

NOT_TRIED = "not connected yet"
NOT_LOOKED_AT = "it has not been looked at yet"


@dataclass
class NodeRecord:
    """One node. `reason` says why it takes no work; `since` is when its status last changed (microseconds)."""

    node_id: str
    address: str
    connected: bool = False
    # What it runs was listed since the start, and nothing lives there that this server does not know.
    asked: bool = False
    reason: str | None = NOT_TRIED
    drained_by: str | None = None
    # Why the node, although reached, must not be given work: failures in a row, a stranger on its GPU, a full disk.
    quarantined: str | None = None
    job_id: str | None = None
    probe: Probe | None = None
    # On its GPUs and not ours: `{pid, name, gpu_uuid, memory_mib}`.
    foreign_processes: list[dict[str, Any]] = field(default_factory=list)
    since: int = field(default_factory=clock.now_us)
    jobs_completed: int = 0
    jobs_failed: int = 0
    jobs_cancelled: int = 0
    infra_failures: int = 0
    consecutive_infra_failures: int = 0
    consecutive_failed_jobs: int = 0

    @property
    def status(self) -> str:
        """One of states.NODE_STATES."""
        if self.drained_by is not None:
            return states.NODE_DRAINING
        if not self.connected:
            return states.NODE_OFFLINE
        if self.job_id is not None:
            return states.NODE_BUSY
        return states.NODE_QUARANTINED if self.quarantined is not None else states.NODE_ONLINE

    @property
    def usable(self) -> bool:
        """Whether the node takes jobs, now or after the one it runs."""
        return self.connected and self.drained_by is None and self.quarantined is None

    @property
    def may_become_usable(self) -> bool:
        """Whether what keeps it from taking jobs is only that it was not tried or looked at yet."""
        if self.drained_by is not None:
            return False
        return self.quarantined == NOT_LOOKED_AT if self.connected else self.reason == NOT_TRIED

    @property
    def why(self) -> str | None:
        """Why the node takes no work, or None."""
        if self.drained_by is not None:
            return f"drained by {self.drained_by}"
        return self.quarantined if self.connected else self.reason


class NodeRegistry:
    """All records of this server, in the order of the settings."""

    def __init__(self) -> None:
        self._records: dict[str, NodeRecord] = {}
        self._lock = threading.Lock()
        self._fenced_until: float | None = None
        # Told after every change of a record, on the thread that made it; must be short.
        self.changed: Callable[[], None] = lambda: None

    def add(self, record: NodeRecord) -> NodeRecord:
        """Make the node known."""
        with self._lock:
            self._records[record.node_id] = record
        return record

    def update(self, node_id: str, **values: object) -> None:
        """Change fields of a record; `since` moves when the status does."""
        with self._lock:
            record = self._records[node_id]
            before = record.status
            for name, value in values.items():
                setattr(record, name, value)
            if record.status != before:
                record.since = clock.now_us()
        self.changed()

    def get(self, node_id: str) -> NodeRecord | None:
        """The record, or None."""
        return self._records.get(node_id)

    def all(self) -> list[NodeRecord]:
        """Every record."""
        with self._lock:
            return list(self._records.values())

    def fence(self, until: float) -> None:
        """Give out no work before `until` (monotonic) or before every node was asked: after a restore a node may
        still run what the database has forgotten."""
        self._fenced_until = until

    def fenced(self) -> bool:
        """Whether the fence still stands."""
        if self._fenced_until is None:
            return False
        if time.monotonic() >= self._fenced_until or all(record.asked for record in self.all()):
            self._fenced_until = None
        return self._fenced_until is not None

    def others_may(self, node_id: str) -> bool:
        """Whether a node besides this one takes jobs, or may as soon as it was tried and looked at: right after the
        start."""
        return any(record.usable or record.may_become_usable for record in self.all() if record.node_id != node_id)

    def aside(self) -> str:
        """Which nodes take no work, in a few words without names of people; empty when all do."""
        if self.fenced():
            return "restored from a backup: every node is asked first what it runs"
        records = self.all()
        found = {
            "drained": sum(record.drained_by is not None for record in records),
            "out of reach": sum(record.drained_by is None and not record.connected for record in records),
            "kept out after failures or for want of room": sum(
                record.status == states.NODE_QUARANTINED for record in records
            ),
        }
        parts = [f"{count} {what}" for what, count in found.items() if count]
        return f"of {len(records)} nodes {', '.join(parts)}" if parts else ""

    def usable(self) -> list[str]:
        """Ids of the nodes that take jobs."""
        return [record.node_id for record in self.all() if record.usable]
