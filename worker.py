"""One thread per node: adopt, claim, launch, follow, finish — and notice when the node is away.

The thread holds at most one claim. Whatever goes wrong — the connection, the database, this code — it lets go of the
connection, not of the claim: it connects again, asks the node what it knows of the attempt, and goes on from the byte
where it stopped. A job is given to another node only when the attempt cannot be alive any more:

* the node says so (exit record, another boot, nothing there and nothing was started), or
* the node's own deadline has passed. Every attempt on a remote node carries a lease in the node's clock that pings
  extend; `_dead_after` is the moment, in this process's monotonic clock, by which an unrenewed attempt has ended.

May import everything but `api`, `schemas` and `main`; it knows no concrete executor.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
import time
from dataclasses import dataclass, replace
from typing import IO, Any

from sqlalchemy.exc import DBAPIError

import clock
import metrics
import states
import verdict
from config import Settings
from errors import AgentError, DatabaseError, NodeError, NodeRefused, NodeUnreachable
from executor import (
    Executor,
    JobIdentity,
    Message,
    NodeConnection,
    Probe,
    WakeUp,
    check_probe,
    job_spec,
    probe_request,
    results_expected,
)
from failpoints import reach
from logs import about
from nodes import NOT_LOOKED_AT, NodeRegistry
from queue_manager import Claim, Outcome, QueueManager
from results import ResultsFile, ResultsInvalid, ResultsTooLarge
from storage import STREAMS, JobOutput, Storage

log = logging.getLogger("worker")

LAUNCH_VALID = 5.0  # seconds within which a node may act on a launch it was sent
SLOWEST_LINK = 64 << 10  # bytes per second at which code may come in and still be in time
LAUNCH_TRIES = 3  # launches of one attempt, or of a job given back, that may get lost before it counts as a failure
LAUNCH_LEASE = 20.0  # seconds, at least, that an attempt lives whose launch was never acknowledged
LEASE_MARGIN = 5.0  # seconds for the node to have killed what it must kill
RENEW_EVERY = 20.0  # seconds between renewals of the claim in the database
PROBE_TIMEOUT = 30.0
FETCH_BLOCK = 1 << 20
RECONNECT_MOST = 15.0
IDLE_LOOK = 30.0  # seconds after which an idle node looks for work by itself, in case a hint was lost
QUARANTINE_MOST = 3600.0
# A job of less than this many seconds needs no look at the GPU afterwards: to bring up CUDA takes longer.
QUICK_JOB = 0.5
# The next job waits for the answer of the look after a job at most this share of the time that the job ran: where the
# driver is slow, short jobs are not held up by much. An answer that comes later counts if nothing runs yet.
LOOK_SHARE = 0.1
BUSY = -1
MUCH_OUTPUT = 1 << 16  # bytes at once after which the event loop has its turn before there is more
LOOK_AGAIN = 0.5  # seconds until a node that a job left unclean is looked at again, doubled up to NODE_PROBE_INTERVAL


@dataclass
class _Held:
    """The claim in hand: its files, and what is known of the attempt on the node."""

    claim: Claim
    output: JobOutput | None = None
    started: bool = False
    unrecorded: float | None = None  # the start, monotonic, while the database does not have it
    launches: int = 0  # sent and not answered
    launch_void_at: float = 0.0  # from when on the node may not act on the last one
    refetched: bool = False
    unreachable_noted: bool = False
    cancel_asked: bool = False
    cancel_sent: bool = False
    renewed_at: float = 0.0
    missing: bool = False
    ended: bool = False  # the node says that all its processes are dead, or could not be killed
    promised: float = 0.0  # the `_dead_after` of the last ping


def strangers(probe: Probe, gpus: list[int] | None) -> list[dict[str, Any]]:
    """The processes on the node's own GPUs (None: all) that are not ours."""
    own = {gpu.uuid for gpu in probe.gpus if gpus is None or gpu.index in gpus}
    return [found for found in probe.foreign_gpu_processes if found.get("gpu_uuid") in own]


def left_behind(
    probe: Probe, gpus: list[int] | None, settings: Settings, before: dict[int, int] | None = None
) -> str | None:
    """What ended jobs left on a node on which none runs, or None: memory of its GPUs. `before`: what was in use of
    each before the last job, where that is none of ours."""
    most = settings.node_idle_gpu_memory
    for gpu in probe.gpus:
        used = gpu.memory_used_mib
        allowed = most + (before or {}).get(gpu.index, 0)
        if most and used is not None and used > allowed and (gpus is None or gpu.index in gpus):
            more = f"{before[gpu.index]} MiB before the job and " if before and gpu.index in before else ""
            what = f"GPU {gpu.index} has {used} MiB in use without a job"
            return f"{what}; more than {more}NODE_IDLE_GPU_MEMORY ({most} MiB)"
    return None


def unfit(probe: Probe, gpus: list[int] | None, settings: Settings) -> str | None:
    """Why a node that can be reached must not be given work, or None."""
    try:
        check_probe(probe, settings)
    except NodeRefused as refused:
        return str(refused)
    if probe.survivors:
        first = probe.survivors[0]
        return (
            f"{len(probe.survivors)} processes of job {first.get('job')} could not be ended and are still there "
            f"(process {first.get('pid')}, state {first.get('state')})"
        )
    found = strangers(probe, gpus)
    if found:
        names = ", ".join(f"{process.get('name')} (process {process.get('pid')})" for process in found[:3])
        return f"its GPU is used by something that is not ours: {names}"
    if probe.free_bytes < settings.node_min_free_disk:
        return f"its disk has {probe.free_bytes} bytes free, less than NODE_MIN_FREE_DISK"
    return None


class Worker(threading.Thread):
    """The thread of one node. `start`, then `stop` and `join`."""

    def __init__(
        self,
        executor: Executor,
        queue: QueueManager,
        storage: Storage,
        registry: NodeRegistry,
        settings: Settings,
        *,
        takes_jobs: bool = True,
    ) -> None:
        super().__init__(name=f"worker-{executor.node_id}", daemon=True)
        self.executor = executor
        self.node_id = executor.node_id
        self._queue = queue
        self._storage = storage
        self._registry = registry
        self._settings = settings
        self._takes_jobs = takes_jobs
        self._wake = WakeUp()
        self._asked = False  # whether the wake-up may mean the running job
        self._stopping = threading.Event()
        self._held: _Held | None = None
        self._probe: Probe | None = None
        self._probe_asked_at = 0.0
        self._pinged_at = 0.0
        self._dead_after = 0.0
        self._look_at = 0.0
        self._idle_since = time.monotonic()
        self._sweep = False  # an ended attempt could not be removed from the node
        self._launches = 0  # sent by this thread: whether one was between two moments
        self._unclean = False  # a look after a job is awaited, or found something: no work until one finds nothing
        self._clean_by = 0.0  # until when work waits for that
        self._look_again_at = float("inf")
        self._look_again_pause = LOOK_AGAIN
        self._gpus_seen = False
        # In use of this machine's GPUs while no job ran: they may drive a screen, too. A node's are all for jobs.
        self._memory_before: dict[int, int] | None = None
        self._quarantined_until = 0.0
        self._quarantine_reason: str | None = None
        self._results_expected = results_expected(settings)
        for counter in (metrics.NODE_CONNECTIONS, metrics.NODE_CONNECTION_FAILURES):
            counter.labels(self.node_id)  # exported with 0 before the first one

    # -- for other threads -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed: perhaps the end of the running job was asked for."""
        self._asked = True
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; the running job stays with its supervisor on the node."""
        self._stopping.set()
        self._wake.set()

    # -- the outer loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`: connect, serve, and after any trouble connect again."""
        about(node=self.node_id)
        failures = 0
        pause = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._rest(pause)
                self._adopt()
                began = time.monotonic()
                self._connect_and_serve()
                pause = 0.0
            except Exception as error:
                failures = 0 if time.monotonic() - began > RECONNECT_MOST else failures + 1
                pause = random.uniform(0.05, min(RECONNECT_MOST, 0.5 * 2 ** min(failures, 10)))  # noqa: S311  # jitter
                self._close_output()  # opened anew: its files may have been removed
                if isinstance(error, NodeError):
                    reason = str(error)
                    if isinstance(error, NodeRefused):
                        pause = RECONNECT_MOST
                elif isinstance(error, OSError):
                    reason = f"the server cannot write its files: {error.strerror}"
                elif isinstance(error, (DatabaseError, DBAPIError)):
                    reason = "the server's database cannot be used"
                else:
                    log.exception("%s: unexpected error; the node is connected again", self.node_id)
                    reason = "an internal error, see the server's log"
                metrics.NODE_CONNECTION_FAILURES.labels(self.node_id).inc()
                self._offline(reason)
        self._close_output()

    def _connect_and_serve(self) -> None:
        connection = self.executor.connect()
        try:
            self._serve(connection)
        finally:
            self._queue.idle.leave(self.node_id)
            connection.close()

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping.is_set():
            self._give_up_if_lost()
            left = until - time.monotonic()
            if left <= 0:
                return
            if self._held is not None:
                left = min(left, max(0.05, self._dead_after - time.monotonic()))
            # A wake-up while away can only be a stop, a drain or a cancellation; the latter wait for the node.
            self._wake.wait(left)

    def _offline(self, reason: str) -> None:
        record = self._registry.get(self.node_id)
        counted_on = record is not None and (record.connected or record.may_become_usable)
        if record is not None and (record.connected or record.reason != reason):
            log.warning("%s (%s): %s", self.node_id, self.executor.address, reason)
        self._registry.update(self.node_id, connected=False, reason=reason)
        self._queue.nodes_changed()
        if counted_on:
            self._queue.idle.offer()  # a job kept for this node may now be one for the node it was to avoid
        held = self._held
        if held is not None and held.started and not held.unreachable_noted and not self._stopping.is_set():
            held.unreachable_noted = True
            self._queue.note(held.claim, "unreachable", reason)

    def _give_up_if_lost(self) -> None:
        """Out of reach for so long that the node itself has ended the attempt: let another node run the job."""
        held = self._held
        if held is None or time.monotonic() < self._dead_after:
            return
        what = f"{self.node_id} was out of reach for longer than its job could live without the server."
        if not held.started:
            what = f"{self.node_id} was sent the job and went out of reach before it said whether the job started."
        self._requeue(held.claim, states.NODE_LOST, what)

    def _adopt(self) -> None:
        if self._held is not None:
            return
        claim = self._queue.adopt(self.node_id)
        if claim is None:
            return
        about(job_id=claim.job_id)
        self._held = _Held(
            claim,
            started=claim.started_at is not None,
            launch_void_at=time.monotonic() + self._launch_valid(claim),  # maybe sent just before the last process died
            cancel_asked=claim.cancel_requested,
        )
        # After a restore the database does not know of a lease that was granted later, at a stop on purpose.
        granted = claim.time_limit if self._registry.fenced() else claim.node_lease or 0.0
        self._lives_for(max(self._settings.node_lost_after, self._launch_lease(claim), granted))
        reach("adopted")
        log.info("%s: adopted job %s, attempt %d", self.node_id, claim.job_id, claim.attempt)
        self._registry.update(self.node_id, job_id=claim.job_id)

    @staticmethod
    def _launch_valid(claim: Claim) -> float:
        return LAUNCH_VALID + len(claim.code) / SLOWEST_LINK

    def _launch_lease(self, claim: Claim) -> float:
        return max(LAUNCH_LEASE, self._launch_valid(claim) + self._settings.node_ping_timeout)

    def _lives_for(self, lease: float) -> None:
        """Note by when the attempt in hand will have ended if the node hears nothing more: its lease is at most
        `lease` seconds from now. On this machine there is no lease, only the time limit."""
        assert self._held is not None
        seconds = lease if self.executor.remote else self._held.claim.time_limit
        self._dead_after = time.monotonic() + seconds + self._settings.kill_grace + LEASE_MARGIN

    # -- one connection --------------------------------------------------------------------------------------------

    def _serve(self, connection: NodeConnection) -> None:
        self._unclean = False  # what follows is a whole look
        self._look_again_at = float("inf")
        if self._held is not None:
            self._held.ended = False  # it is told again
        if self._held is not None and self._held.started:
            # Its job comes first: a look can take long, and fails where a driver hangs.
            self._pinged_at = time.monotonic()
            self._reconcile(connection)
            if self._probe is None:
                self._registry.update(self.node_id, quarantined=NOT_LOOKED_AT)
            self._ask_for_look(connection)
        else:
            look = probe_request(self.executor, self._settings)
            idle = self._idle()
            self._probed(connection.request("probe", timeout=PROBE_TIMEOUT, **look), idle)
            assert self._probe is not None
            if self._held is None:
                check_probe(self._probe, self._settings)
            self._pinged_at = time.monotonic()
            self._reconcile(connection)
        self._registry.update(self.node_id, connected=True, reason=None)
        metrics.NODE_CONNECTIONS.labels(self.node_id).inc()
        log.info("%s (%s): connected%s", self.node_id, self.executor.address, self._describe())
        self._queue.nodes_changed()
        self._look_at = 0.0
        if self._probe is not None:
            nobody = JobIdentity("", "", "", "")
            connection.send("expect", spec=job_spec(nobody, 0, self._probe, self.executor.gpus(), self._settings))
        while not self._stopping.is_set():
            if self._held is None:
                self._look_for_work(connection)
            pushes = connection.wait(self._pause(), self._wake.fileno())
            for push in pushes:
                self._handle(connection, push)
            if pushes and self._held is not None:
                self._queue.growth.changed(self._held.claim.job_id)
            if sum(len(push.get("data", b"")) for push in pushes) >= MUCH_OUTPUT:
                self._queue.growth.heard()
            self._take_wake_up()
            self._send_cancel(connection)
            self._beat(connection)
        self._farewell(connection)

    def _describe(self) -> str:
        probe = self._probe
        if probe is None:
            return ""
        gpu = f"{len(probe.gpus)} GPU(s)" if probe.gpus else "no GPU"
        box = "sandbox" if probe.sandbox_works and self._settings.sandbox != "off" else "NO SANDBOX"
        return f": Python {probe.python_version}, {gpu}, {box}"

    def _probed(self, reply: Message, idle: int) -> None:
        if not reply.get("ok"):
            self._probe_asked_at = time.monotonic()
            self._set_quarantine(f"the look at it failed: {reply.get('message')}")
            return
        self._probe = Probe.of(reply)
        self._probe_asked_at = time.monotonic()
        self._registry.update(self.node_id, probe=self._probe)
        self._judge_fitness(idle)

    def _judge_fitness(self, idle: int) -> None:
        """After a look at the node: may it be given work? `idle`: what `_idle` said when the look was asked for."""
        assert self._probe is not None
        gpus = self.executor.gpus()
        reason = unfit(self._probe, gpus, self._settings)
        self._gpus_seen = self._gpus_seen or any(gpus is None or gpu.index in gpus for gpu in self._probe.gpus)
        if reason is None and self._gpus_seen and self._probe.gpu_error:
            reason = f"its GPU cannot be looked at any more: {self._probe.gpu_error}"
        if reason is None and idle == self._idle() != BUSY:
            found = {gpu.index: gpu.memory_used_mib or 0 for gpu in self._probe.gpus}
            if self._memory_before is None and not self.executor.remote:
                self._memory_before = found
            reason = left_behind(self._probe, gpus, self._settings, self._memory_before)
            if reason is None and not self.executor.remote:
                self._memory_before = found
            if reason is None and self._unclean:
                self._unclean, self._look_again_at = False, float("inf")
                self._look_at = 0.0
        if reason is None and time.monotonic() < self._quarantined_until:
            reason = self._quarantine_reason
        self._registry.update(self.node_id, foreign_processes=strangers(self._probe, gpus))
        self._set_quarantine(reason)

    # -- whether a job left the node clean -------------------------------------------------------------------------

    def _idle(self) -> int:
        """BUSY while a job may live on the node, else how many were launched: the same twice, and none ran between."""
        return BUSY if self._held is not None and not self._held.ended else self._launches

    def _prove_clean(self, connection: NodeConnection, push: Message) -> None:
        """The job in hand has ended on the node: look at what it may have left, while its end is written here.

        Its supervisor has seen its processes dead, or noted those that are not; the disk's room came with the exit.
        Only the GPU takes a look that is long compared with a job's start, so only what can have used one costs that.
        """
        assert self._held is not None
        self._held.ended = True
        record, probe = push["record"], self._probe
        if probe is None:
            self._probe_asked_at = float("-inf")  # the look that is under way began while the job ran: one more
            return
        seconds = record.get("wall_seconds")
        used_gpu = self._gpus_seen and (not isinstance(seconds, (int, float)) or seconds >= QUICK_JOB)
        free = push.get("free_bytes")
        no_room = isinstance(free, int) and free < self._settings.node_min_free_disk
        certain = no_room or bool(record.get("survivors")) or not isinstance(seconds, (int, float))
        if used_gpu or certain:
            self._unclean = True
            self._clean_by = float("inf") if certain else time.monotonic() + LOOK_SHARE * seconds
            self._look_again_pause = LOOK_AGAIN
            self._look_whether_clean(connection)

    def _look_whether_clean(self, connection: NodeConnection) -> None:
        self._look_again_at = float("inf")
        idle = self._idle()
        # From this much memory in use on, the processes on it are asked for; always where some were seen before.
        most = self._settings.node_idle_gpu_memory if self._probe and not self._probe.foreign_gpu_processes else 0
        connection.send(
            "probe", on_reply=lambda reply: self._looked_whether_clean(reply, idle), only="clean", idle_mib=most
        )

    def _looked_whether_clean(self, reply: Message, idle: int) -> None:
        assert self._probe is not None
        if reply.get("ok"):
            self._probe = self._probe.renewed(reply)
            self._registry.update(self.node_id, probe=self._probe)
            self._judge_fitness(idle)
        else:
            self._set_quarantine(f"the look at it failed: {reply.get('message')}")
        if self._unclean and idle == self._idle():
            self._clean_by = float("inf")
            self._look_again_at = time.monotonic() + self._look_again_pause
            self._look_again_pause = min(2 * self._look_again_pause, self._settings.node_probe_interval)

    def _set_quarantine(self, reason: str | None) -> None:
        record = self._registry.get(self.node_id)
        if record is None or record.quarantined == reason:
            return
        if reason is not None:
            log.warning("%s: quarantined: %s", self.node_id, reason)
        elif record.quarantined != NOT_LOOKED_AT:
            log.info("%s: no longer quarantined", self.node_id)
        self._registry.update(self.node_id, quarantined=reason)
        self._queue.nodes_changed()
        if reason is not None:
            self._queue.idle.offer()  # as when it goes offline
        self._look_at = 0.0

    def _quarantine(self, failures: int, message: str) -> None:
        """Too many infrastructure failures in a row: no work until time has passed and a look finds the node fit."""
        settings = self._settings
        beyond = failures - settings.quarantine_after
        if beyond < 0:
            return
        seconds = min(QUARANTINE_MOST, settings.quarantine_seconds * 2 ** min(beyond, 16))
        self._quarantined_until = time.monotonic() + seconds
        self._quarantine_reason = f"{failures} infrastructure failures in a row; the last: {message}"
        self._registry.update(self.node_id, quarantined=self._quarantine_reason)
        log.warning("%s: quarantined for %.0f seconds: %s", self.node_id, seconds, self._quarantine_reason)

    def _quarantine_for(self, survivors: int, job_id: str) -> None:
        """Processes of an ended job cannot be killed: no work until time has passed and a look finds the node fit."""
        seconds = self._settings.quarantine_seconds
        self._quarantined_until = max(self._quarantined_until, time.monotonic() + seconds)
        self._quarantine_reason = f"{survivors} processes of job {job_id} could not be ended"
        self._registry.update(self.node_id, quarantined=self._quarantine_reason)
        log.warning("%s: quarantined for at least %.0f seconds: %s", self.node_id, seconds, self._quarantine_reason)

    def _pause(self) -> float:
        now = time.monotonic()
        due = min(self._pinged_at + self._settings.node_ping_interval, self._look_again_at)
        if self._held is None:
            due = min(due, self._look_at)
        return max(0.0, due - now)

    def _take_wake_up(self) -> None:
        if self._wake.wait(0):
            self._look_at = 0.0
            asked, self._asked = self._asked, False
            if asked and self._held is not None and not self._held.cancel_asked:
                self._renew()

    def _beat(self, connection: NodeConnection) -> None:
        now = time.monotonic()
        if now - self._pinged_at >= self._settings.node_ping_interval:
            # A silence is only one when something was asked before it began.
            if connection.silent_for() > self._settings.node_ping_timeout:
                raise NodeUnreachable(f"The node has been silent for {connection.silent_for():.0f} seconds.")
            self._extend_lease(connection)
        if self._held is not None and now - self._held.renewed_at > RENEW_EVERY:
            self._renew()
        if now >= self._look_again_at:
            self._look_whether_clean(connection)
        # A quarantine that is over waits for a look, not for the next round of looks.
        release = self._probe_asked_at < self._quarantined_until <= now
        if release or now - self._probe_asked_at >= self._settings.node_probe_interval:
            self._ask_for_look(connection)
            if self._sweep and self._held is None:
                self._sweep = False
                self._reconcile(connection)

    def _ask_for_look(self, connection: NodeConnection) -> None:
        self._probe_asked_at = time.monotonic()
        idle = self._idle()
        look = probe_request(self.executor, self._settings)
        connection.send("probe", on_reply=lambda reply: self._probed(reply, idle), **look)

    def _extend_lease(self, connection: NodeConnection) -> None:
        self._pinged_at = time.monotonic()
        if not self.executor.remote:
            connection.send("ping")
            return
        held = self._held
        if held is None or held.missing:
            connection.send("ping")  # what the node does not show must die of its lease
            return
        before = self._dead_after
        self._lives_for(self._settings.node_lost_after)
        held.promised = self._dead_after
        # A shorter life than the one promised before (at a launch, at a farewell) is certain only once it is confirmed.
        self._dead_after = max(before, held.promised)

        def confirmed(reply: Message) -> None:
            if self._held is held and reply.get("ok"):
                self._dead_after = held.promised

        lease_until = connection.node_clock() + self._settings.node_lost_after
        connection.send("ping", lease_until=lease_until, on_reply=confirmed)

    def _renew(self) -> None:
        held = self._held
        assert held is not None
        held.renewed_at = time.monotonic()
        renewal = self._queue.renew(held.claim)
        if not renewal.held:
            log.error("%s: the claim on job %s is void; letting go of it", self.node_id, held.claim.job_id)
            self._let_go()
            raise NodeUnreachable("The claim on the running job was void; looking at the node again.")
        held.cancel_asked = held.cancel_asked or renewal.cancel_requested

    def _farewell(self, connection: NodeConnection) -> None:
        """The server stops on purpose: the job may go on for as long as its own time limit lets it."""
        held = self._held
        if held is None or not held.started or not self.executor.remote or held.missing:
            return
        if self._queue.set_node_lease(held.claim, held.claim.time_limit):
            connection.request("ping", lease_until=None, timeout=2)

    # -- what is on the node ---------------------------------------------------------------------------------------

    def _reconcile(self, connection: NodeConnection) -> None:
        """After connecting: find the attempt in hand again, and leave nothing else alive on the node."""
        held = self._held
        deadline = time.monotonic() + self._settings.kill_grace + LEASE_MARGIN
        while True:
            attempts = connection.request("list")["attempts"]
            mine = None
            alive = 0
            for found in attempts:
                key = (found["job"], found["attempt"])
                if held is not None and key == (held.claim.job_id, held.claim.attempt):
                    mine = found
                elif found["state"] == "running":
                    alive += 1
                    self._try(connection, "kill", key, reason="superseded", grace=1)
                else:
                    self._try(connection, "forget", key)
            if not alive:
                break
            if time.monotonic() > deadline:
                raise NodeRefused("A former job on the node cannot be ended; an operator must look at it.")
            connection.wait(0.2)
        self._registry.update(self.node_id, asked=True)
        if held is not None:
            reach("reconciled")
            self._resume(connection, held, mine)

    def _try(self, connection: NodeConnection, op: str, key: tuple[str, int], **fields: Any) -> None:
        try:
            connection.request(op, job=key[0], attempt=key[1], **fields)
        except AgentError as error:
            log.debug("%s: %s of %s.%d: %s", self.node_id, op, *key, error)

    def _resume(self, connection: NodeConnection, held: _Held, found: Message | None) -> None:
        claim = held.claim
        held.missing = held.cancel_sent = False
        self._renew()
        if found is not None:
            if not held.started:
                self._mark_started(connection, held, {})
            if claim.node_lease is not None:
                # Since the farewell it lives without a lease: its life is short again only once the node confirms it.
                connection.request("ping", lease_until=connection.node_clock() + self._settings.node_lost_after)
                self._queue.set_node_lease(claim, None)
            self._extend_lease(connection)
            self._follow(connection, held)
            self._note_reachable(held)
        elif not held.started:
            # The launch was never acknowledged. The former agent is dead and (job, attempt) starts once only, so
            # sending it again cannot run it twice.
            self._launch_again(connection, held)
        elif claim.boot_id and claim.boot_id != connection.boot_id:
            self._requeue(claim, states.NODE_LOST, f"{self.node_id} was restarted while the job ran.")
        else:
            held.missing = True
            log.error("%s: the attempt %s.%d is not on the node", self.node_id, claim.job_id, claim.attempt)
            raise NodeRefused(
                f"The files of job {claim.job_id} are gone from the node; waiting until its process must have ended."
            )

    def _launch_again(self, connection: NodeConnection, held: _Held) -> None:
        assert self._probe is not None
        try:
            check_probe(self._probe, self._settings)
        except NodeRefused as refused:
            if time.monotonic() < held.launch_void_at:
                raise  # the last launch may still be on its way to starting
            what = f"The job could not be started on {self.node_id}: {refused}"
            self._requeue(held.claim, states.LAUNCH_FAILED, what)
            return
        if held.launches >= LAUNCH_TRIES and time.monotonic() > held.launch_void_at:
            self._requeue(held.claim, states.LAUNCH_FAILED, self._too_slow(held.launches))
        else:
            self._launch(connection, held)

    def _too_slow(self, launches: int) -> str:
        return (
            f"The job could not be started on {self.node_id}: its code did not get there in time, tried {launches} "
            "times; the connection is too slow or keeps breaking."
        )

    def _note_reachable(self, held: _Held) -> None:
        if held.unreachable_noted:
            held.unreachable_noted = False
            self._queue.note(held.claim, "reachable", f"{self.node_id} is back; the output continues where it stopped.")

    def _follow(self, connection: NodeConnection, held: _Held) -> None:
        output = self._open_output(held)
        stdout, stderr = (output.offsets[stream] for stream in STREAMS)
        connection.request("follow", job=held.claim.job_id, attempt=held.claim.attempt, stdout=stdout, stderr=stderr)

    def _open_output(self, held: _Held) -> JobOutput:
        if held.output is None:
            self._storage.prepare(held.claim.job_id, held.claim.code, held.claim.config)
            held.output = self._storage.output(held.claim.job_id, held.claim.attempt)
        return held.output

    # -- taking and starting a job ---------------------------------------------------------------------------------

    def _look_for_work(self, connection: NodeConnection) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + IDLE_LOOK
        record = self._registry.get(self.node_id)
        proven = not self._unclean or now >= self._clean_by
        if not proven:
            self._look_at = min(self._look_at, self._clean_by)
        if not self._takes_jobs or record is None or not record.usable or not proven or self._registry.fenced():
            self._queue.idle.leave(self.node_id)
            self._queue.pass_on(self.node_id, claimed=True)
            return
        # First in the list, then the look: a job that comes in between wakes this node.
        self._queue.idle.enter(
            self.node_id,
            record.consecutive_infra_failures,
            record.consecutive_failed_jobs,
            self._idle_since,
            self._wake.set,
        )
        take_avoided = not self._registry.others_may(self.node_id)
        claim = self._queue.claim(self.node_id, self.executor.address, take_avoided=take_avoided)
        self._queue.pass_on(self.node_id, claimed=claim is not None)
        if claim is None:
            return
        self._queue.idle.leave(self.node_id)
        reach("claimed")
        about(job_id=claim.job_id)
        self._held = held = _Held(claim, renewed_at=now)
        self._registry.update(self.node_id, job_id=claim.job_id)
        self._launch(connection, held)

    def _launch(self, connection: NodeConnection, held: _Held) -> None:
        claim, settings, probe = held.claim, self._settings, self._probe
        assert probe is not None
        identity = JobIdentity(claim.job_id, claim.user_id, claim.competition_id, claim.project_id)
        node_clock = connection.node_clock()
        valid, lease = self._launch_valid(claim), self._launch_lease(claim)
        self._lives_for(lease)
        held.launches += 1
        self._launches += 1
        self._unclean, self._look_again_at = False, float("inf")
        sent = time.monotonic()
        held.launch_void_at = sent + valid
        reply = connection.ask(
            "launch",
            claim.code,
            job=claim.job_id,
            attempt=claim.attempt,
            not_after=node_clock + valid,
            lease_until=node_clock + lease if self.executor.remote else None,
            spec=job_spec(identity, claim.time_limit, probe, self.executor.gpus(), settings),
        )
        reach("launch_sent")
        # While the node starts it, make the job's folder here.
        self._open_output(held)
        try:
            answer = reply(valid + settings.node_ping_timeout)
        except AgentError as error:
            self._launch_refused(connection, held, error)
            return
        metrics.LAUNCH.observe(time.monotonic() - sent)
        if answer.get("attached"):
            self._follow(connection, held)
        self._mark_started(connection, held, answer)
        if self.executor.remote and not connection.pushed("exit"):  # a quick one is over already
            self._extend_lease(connection)

    def _launch_refused(self, connection: NodeConnection, held: _Held, error: AgentError) -> None:
        claim = held.claim
        log.warning("%s: job %s could not be started: %s (%s)", self.node_id, claim.job_id, error, error.code)
        if error.code == "expired":
            # Every attempt but this one either failed or was given back.
            launches = claim.attempt - claim.infra_failures
            if launches >= LAUNCH_TRIES:
                self._requeue(claim, states.LAUNCH_FAILED, self._too_slow(launches))
            else:
                self._queue.give_back(claim, f"{self.node_id} answered too late.")
                self._let_go()
            return
        reason = states.NODE_DISK_FULL if error.code == "disk_full" else states.LAUNCH_FAILED
        self._requeue(claim, reason, f"The job could not be started on {self.node_id}: {error}")
        self._try(connection, "forget", (claim.job_id, claim.attempt))

    def _mark_started(self, connection: NodeConnection, held: _Held, answer: Message) -> None:
        held.started = True
        held.renewed_at = time.monotonic()
        held.claim = replace(held.claim, boot_id=connection.boot_id)
        # Both instants are of the node's clock: how long ago that was.
        ago = float(answer.get("clock") or 0.0) - float(answer.get("started_clock") or math.inf)
        ago = min(max(0.0, ago), LAUNCH_LEASE)
        if connection.pushed("exit"):  # the end is at hand, and recorded together with the start
            held.unrecorded = time.monotonic() - ago
        else:
            self._queue.launched(held.claim, connection.boot_id, ago)
        reach("launched")
        log.info("%s: job %s of %s started", self.node_id, held.claim.job_id, held.claim.user_id)

    # -- following and finishing -----------------------------------------------------------------------------------

    def _handle(self, connection: NodeConnection, push: Message) -> None:
        held = self._held
        if held is None or (push.get("job"), push.get("attempt")) != (held.claim.job_id, held.claim.attempt):
            return
        assert held.output is not None
        if push["push"] == "output":
            reach("output_received")
            try:
                held.output.append(push["stream"], push["offset"], push["data"])
                metrics.LOG_BYTES.inc(len(push["data"]))
            except ValueError as error:
                raise NodeUnreachable(f"Output is missing ({error}); connecting again.") from None
        elif push["push"] == "exit":
            self._queue.growth.changed(held.claim.job_id)  # of what came just before: the rest takes a while
            self._ended(connection, held, push)

    def _send_cancel(self, connection: NodeConnection) -> None:
        held = self._held
        if held is None or not held.cancel_asked or held.cancel_sent or not held.started:
            return
        held.cancel_sent = True
        self._try(
            connection,
            "kill",
            (held.claim.job_id, held.claim.attempt),
            reason="cancelled",
            grace=self._settings.kill_grace,
        )

    def _ended(self, connection: NodeConnection, held: _Held, push: Message) -> None:
        reach("exit_received")
        record: Message = push["record"]
        claim, output = held.claim, held.output
        assert output is not None
        key = (claim.job_id, claim.attempt)
        survivors = int(record.get("survivors") or 0)
        if not held.ended:
            self._prove_clean(connection, push)
        failure = verdict.infrastructure_failure(record, self.node_id)
        if failure is not None:
            self._requeue(claim, *failure)
            if survivors:
                self._quarantine_for(survivors, claim.job_id)
            self._try(connection, "forget", key)
            return
        sizes = {stream: int(record.get(f"{stream}_bytes") or 0) for stream in STREAMS}
        if output.offsets != sizes and not held.refetched:
            log.warning("%s: output of %s is %s, not %s; fetching it again", self.node_id, key, output.offsets, sizes)
            held.refetched = True
            output.truncate()
            self._follow(connection, held)
            return
        output.sync()
        sealed, problem = self._seal_results(connection, held, record, push)
        judged = verdict.judge(
            record, expected_time=claim.expected_time, time_limit=claim.time_limit, results_problem=problem
        )
        reach("sealed")
        completed_at = clock.now_us()
        published = None
        if judged.state == states.COMPLETED:
            published = self._storage.publish(claim.job_id, claim.user_id, claim.competition_id, completed_at)
            reach("published")
        outcome = Outcome(
            state=judged.state,
            message=judged.message,
            completed_at=completed_at,
            failure_reason=judged.failure_reason,
            exit_code=record.get("exit_code"),
            signal=record.get("signal"),
            stdout_bytes=output.offsets["stdout"],
            stderr_bytes=output.offsets["stderr"],
            stdout_truncated=bool(record.get("stdout_truncated")),
            stderr_truncated=bool(record.get("stderr_truncated")),
            result_file=published.name if published else None,
            result_bytes=sealed.size if sealed else None,
            result_sha256=sealed.sha256 if sealed else None,
        )
        started_ago = None if held.unrecorded is None else time.monotonic() - held.unrecorded
        if self._queue.finish(claim, outcome, started_ago):
            log.info("%s: job %s is %s. %s", self.node_id, claim.job_id, outcome.state, outcome.message)
            self._count(outcome.state)
        else:
            log.error("%s: job %s was finished by someone else", self.node_id, claim.job_id)
        reach("finished")
        if survivors:
            self._quarantine_for(survivors, claim.job_id)
        # Only now that it is durable may the node delete its copy.
        self._let_go()
        connection.send("forget", on_reply=self._forgotten, later=True, job=claim.job_id, attempt=claim.attempt)

    def _seal_results(
        self, connection: NodeConnection, held: _Held, record: Message, push: Message
    ) -> tuple[ResultsFile | None, tuple[str, str] | None]:
        """Fetch, validate and seal; (what was sealed, what is wrong with the results)."""
        found: Message = push.get("results") or {"state": "absent"}
        succeeded = record.get("exit_code") == 0 and record.get("reason") is None
        state = found.get("state")
        if state == "invalid":
            return None, (states.RESULTS_INVALID, f"The results file is not usable: {found.get('message')}")
        if state == "too_large":
            return None, (states.RESULTS_TOO_LARGE, f"The results file is too large: {found.get('message')}")
        if state == "absent":
            if self._results_expected:
                return None, (
                    states.RESULTS_MISSING,
                    "The command ended well but left no results file, which it should have written.",
                )
            if not succeeded:
                return None, None
        try:
            if state == "absent":
                return self._seal(held, None), None
            with self._storage.incoming(held.claim.job_id) as incoming:
                self._fetch_results(connection, held, found, push, incoming)
                return self._seal(held, incoming), None
        except ResultsInvalid as error:
            return None, (states.RESULTS_INVALID, f"The results are not valid: {error}.")
        except ResultsTooLarge as error:
            return None, (states.RESULTS_TOO_LARGE, f"The results are too large: {error}.")
        except AgentError as error:
            reason = states.RESULTS_TOO_LARGE if error.code == "results_too_large" else states.RESULTS_INVALID
            return None, (reason, f"The results file is not usable: {error}")

    def _seal(self, held: _Held, source: IO[bytes] | None) -> ResultsFile:
        settings = self._settings
        return self._storage.seal_results(
            held.claim.job_id, source, settings.max_result_bytes, settings.max_result_line_bytes
        )

    def _fetch_results(
        self, connection: NodeConnection, held: _Held, found: Message, push: Message, target: IO[bytes]
    ) -> None:
        """One snapshot: its length and digest are those the supervisor took when everything was dead."""
        digest = hashlib.sha256()
        if found["state"] == "inline":
            digest.update(push.get("data", b""))
            target.write(push.get("data", b""))
        else:
            total, offset = int(found["bytes"]), 0
            while offset < total:
                block = connection.request(
                    "fetch",
                    job=held.claim.job_id,
                    attempt=held.claim.attempt,
                    what="results",
                    offset=offset,
                    length=min(FETCH_BLOCK, total - offset),
                ).get("data", b"")
                if not block:
                    raise ResultsInvalid("the file became shorter while it was fetched")
                digest.update(block)
                target.write(block)
                offset += len(block)
                if time.monotonic() - self._pinged_at > self._settings.node_ping_interval:
                    self._extend_lease(connection)
                    self._renew()
        if digest.hexdigest() != found.get("sha256"):
            raise ResultsInvalid("the file was changed while it was fetched")

    def _forgotten(self, reply: Message) -> None:
        if not reply.get("ok"):
            log.warning("%s: an ended attempt is not removed yet: %s", self.node_id, reply.get("message"))
            self._sweep = True

    # -- letting go ------------------------------------------------------------------------------------------------

    def _requeue(self, claim: Claim, reason: str, message: str) -> None:
        self._storage.unpublish(claim.job_id)
        state = self._queue.requeue(claim, reason, message)
        reach("requeued")
        log.warning("%s: job %s: %s Now %s.", self.node_id, claim.job_id, message, state)
        record = self._registry.get(self.node_id)
        if record is not None:
            failures = record.consecutive_infra_failures + 1
            self._registry.update(
                self.node_id,
                infra_failures=record.infra_failures + 1,
                consecutive_infra_failures=failures,
            )
            self._quarantine(failures, message)
        self._let_go()

    def _count(self, state: str) -> None:
        record = self._registry.get(self.node_id)
        if record is None:
            return
        name = {
            states.COMPLETED: "jobs_completed",
            states.FAILED: "jobs_failed",
            states.CANCELLED: "jobs_cancelled",
        }[state]
        self._registry.update(
            self.node_id,
            consecutive_infra_failures=0,
            consecutive_failed_jobs=record.consecutive_failed_jobs + 1 if state == states.FAILED else 0,
            **{name: getattr(record, name) + 1},
        )

    def _let_go(self) -> None:
        self._close_output()
        about(job_id=None)
        self._held = None
        self._idle_since = time.monotonic()
        self._look_at = 0.0
        self._registry.update(self.node_id, job_id=None)
        self._queue.nodes_changed()

    def _close_output(self) -> None:
        if self._held is not None and self._held.output is not None:
            self._held.output.close()
            self._held.output = None
