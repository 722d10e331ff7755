"""`python3 main.py drill`: runs the table of attacks on the operator's own nodes and tells what was not contained.

It talks to the nodes' agents itself, under an instance name of its own, so that neither the database nor a running
server's attempts are touched; every attack is followed by a look at the node and by an honest job. Afterwards the nodes
are as they were before. May import `attacks`, `errors`, `states`, `config`, `verdict`, `results`, `executor`.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import states
import verdict
from attacks import (
    CONTAINED,
    LOOK,
    NOT_APPLICABLE,
    NOT_CONTAINED,
    READY,
    SMALL_LIMITS,
    Answer,
    Attack,
    Judgement,
    weigh,
)
from config import Settings
from errors import AgentError, NodeError, NodeUnreachable
from executor import (
    CODE_NAME,
    Executor,
    JobIdentity,
    Message,
    NodeConnection,
    Probe,
    check_probe,
    job_spec,
    probe_request,
)
from results import ResultsInvalid, ResultsTooLarge, records_of_file

INSTANCE = "drill"
PROBE_WITHIN = 30.0  # seconds
CLEAR_WITHIN = 15.0  # seconds for a node to remove what the drill left
OVERTIME = 60.0  # seconds beyond its last deadline at which a job counts as never ended
RECONNECTS = 5  # connections that one job may cost: some attacks kill the agent

Tell = Callable[[str], None]


class NeverEnded(Exception):
    """A job was still there long after its limit."""


class Post:
    """A node in the drill's hands, for one thread: connected again whenever an attack has cost the connection."""

    def __init__(self, executor: Executor, settings: Settings) -> None:
        self._executor = executor
        self._settings = settings
        self._connection: NodeConnection | None = None
        self._number = 0
        self.probe = self._look()
        check_probe(self.probe, settings)
        self._clear()

    # -- the connection

    def _connected(self) -> NodeConnection:
        if self._connection is None:
            self._connection = self._executor.connect()
        return self._connection

    def _lost(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, op: str, payload: bytes = b"", **fields: Any) -> Message:
        """A request; once more over a new connection if this one turns out to be dead."""
        try:
            return self._connected().request(op, payload, **fields)
        except NodeUnreachable:
            self._lost()
            return self._connected().request(op, payload, **fields)

    def _look(self) -> Probe:
        return Probe.of(self._ask("probe", timeout=PROBE_WITHIN, **probe_request(self._executor, self._settings)))

    def strangers(self) -> list[str]:
        """Names of the processes on the GPUs that are not the server's, by a fresh look."""
        return [str(found.get("name")) for found in self._look().foreign_gpu_processes]

    # -- jobs

    def attack(self, attack: Attack, port: int | None) -> Answer:
        """Run an attack's job to its end."""
        return self.run(
            attack.program(port),
            attack.expected_time * 2,
            limits={name: SMALL_LIMITS[name] for name in attack.limits},
            cancel=attack.cancel,
            needs_results=attack.needs_results,
        )

    def run(
        self,
        code: str,
        seconds: float,
        *,
        contained: bool = True,
        limits: dict[str, int] | None = None,
        cancel: bool = False,
        needs_results: bool = False,
    ) -> Answer:
        """Run a job to its end and forget it. `contained`: in the sandbox, if the settings and the node have one."""
        self._number += 1
        key: Message = {"job": f"drill-{self._number}", "attempt": 1}
        spec = job_spec(
            JobIdentity(key["job"], "drill", "drill", "drill"),
            seconds,
            self.probe,
            self._executor.gpus(),
            self._settings,
        )
        # Whatever grader the deployment has is not for these.
        spec["argv"] = [self.probe.python or "python3", "-u", CODE_NAME]
        for name, most in (limits or {}).items():
            spec["limits"][name] = min(spec["limits"][name] or most, most)  # 0: there is no limit
        if not contained:
            spec["sandbox"]["mode"] = "none"
        connection = self._connected()
        not_after = connection.node_clock() + PROBE_WITHIN
        self._ask(
            "launch", code.encode(), timeout=PROBE_WITHIN, not_after=not_after, lease_until=None, spec=spec, **key
        )
        deadline = time.monotonic() + seconds + self._settings.kill_grace + OVERTIME
        push, streams = self._follow(key, cancel, deadline)
        self._ask("forget", **key)
        return _answer(push, streams, seconds, self._executor.node_id, needs_results)

    def _follow(self, key: Message, cancel: bool, deadline: float) -> tuple[Message, dict[str, bytearray]]:
        """(the push of the exit, the output)."""
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        reconnects = 0
        while time.monotonic() < deadline:
            try:
                if self._connection is None:
                    sizes: Message = {name: len(data) for name, data in streams.items()}
                    self._connected().request("follow", **key, **sizes)
                for push in self._connected().wait(1.0):
                    if (push.get("job"), push.get("attempt")) != (key["job"], key["attempt"]):
                        continue
                    if push["push"] == "exit":
                        return push, streams
                    streams[push["stream"]][push["offset"] :] = push["data"]
                if cancel and READY.encode() in streams["stdout"]:
                    cancel = False
                    self._connected().request("kill", reason="cancelled", grace=1.0, **key)
            except NodeUnreachable:
                reconnects += 1
                if reconnects > RECONNECTS:
                    raise
                self._lost()
        raise NeverEnded(f"{key['job']} had not ended {OVERTIME:.0f} s after its limit")

    # -- the end

    def _clear(self) -> None:
        """End and forget every attempt below the drill's own name, also one of a drill that was interrupted."""
        deadline = time.monotonic() + CLEAR_WITHIN
        while True:
            attempts = self._ask("list")["attempts"]
            for found in attempts:
                key = {"job": found["job"], "attempt": found["attempt"]}
                try:
                    if found["state"] == "running":
                        self._ask("kill", reason="superseded", grace=0, **key)
                    else:
                        self._ask("forget", **key)
                except AgentError:
                    pass  # it is just ending: listed again
            if not attempts or time.monotonic() > deadline:
                return
            self._connected().wait(0.1)

    def leave(self) -> None:
        """Remove the drill's folder from the node. Raises NodeError when it cannot be removed."""
        self._clear()
        self._ask("stop", remove=True)
        deadline = time.monotonic() + CLEAR_WITHIN
        try:
            while time.monotonic() < deadline:
                self._connected().wait(1.0)  # the agent ends when everything is gone
        except NodeUnreachable:
            pass
        self._lost()


def _answer(push: Message, streams: dict[str, bytearray], seconds: float, node_id: str, needs_results: bool) -> Answer:
    """What the server would say of such an end."""
    record: Message = push["record"]
    failure = verdict.infrastructure_failure(record, node_id)
    records: list[dict[str, Any]] = []
    if failure is not None:
        judged = verdict.Verdict(states.FAILED, *failure)
    else:
        problem, records = _results(push, needs_results)
        judged = verdict.judge(record, expected_time=seconds / 2, time_limit=seconds, results_problem=problem)
    return Answer(
        status=judged.state,
        failure_reason=judged.failure_reason,
        exit_code=record.get("exit_code"),
        message=judged.message,
        stdout=streams["stdout"].decode("utf-8", "replace"),
        stderr=streams["stderr"].decode("utf-8", "replace"),
        stdout_truncated=bool(record.get("stdout_truncated")),
        stderr_truncated=bool(record.get("stderr_truncated")),
        results=records,
        seconds=float(record.get("wall_seconds") or 0.0),
        survivors=int(record.get("survivors") or 0),
    )


def _results(push: Message, needs_results: bool) -> tuple[tuple[str, str] | None, list[dict[str, Any]]]:
    """(what is wrong with the results, the records), as the worker finds them. No attack leaves large valid ones."""
    found: Message = push.get("results") or {"state": "absent"}
    state, message = found.get("state"), str(found.get("message"))
    if state == "absent":
        return ((states.RESULTS_MISSING, "The job left no results file.") if needs_results else None), []
    if state == "invalid":
        return (states.RESULTS_INVALID, message), []
    if state != "inline":
        return (states.RESULTS_TOO_LARGE, message), []
    data = push.get("data", b"")
    if hashlib.sha256(data).hexdigest() != found.get("sha256"):
        return (states.RESULTS_INVALID, "The results were changed while they were fetched."), []
    try:
        return None, [json.loads(line) for line in records_of_file(io.BytesIO(data), 1 << 20)]
    except ResultsInvalid as error:
        return (states.RESULTS_INVALID, f"The results are not valid: {error}."), []
    except ResultsTooLarge as error:
        return (states.RESULTS_TOO_LARGE, f"The results are too large: {error}."), []


# -- the programme -------------------------------------------------------------------------------------------------


def _try(post: Post, attack: Attack, port: int | None) -> Judgement:
    """One attack, a look from outside the sandbox, and an honest job."""
    answer = post.attack(attack, port)
    seen = post.run(LOOK, 30.0, contained=False).report
    honest = post.run(LOOK, 30.0)
    if honest.status != states.COMPLETED:
        seen = {}
    if attack.uses_gpu:
        seen["gpu"] = post.strangers()
    return weigh(attack, answer, seen)


def run_node(
    executor: Executor, settings: Settings, attacks: Sequence[Attack], port: int | None, tell: Tell
) -> list[Judgement]:
    """All attacks on one node, one after another; each told as soon as it is judged. Never raises NodeError."""
    judgements: list[Judgement] = []

    def add(rows: str, name: str, judgement: Judgement, remedy: str = "") -> None:
        judgements.append(judgement)
        tell(f"{executor.node_id:<9} {rows:>4}  {name:<47} {judgement.outcome:<14} {' '.join(judgement.seen.split())}")
        if judgement.outcome == NOT_CONTAINED and remedy:
            tell(f"{'':<15}  {remedy}")

    try:
        post = Post(executor, settings)
    except NodeError as error:
        add("-", "cannot be tried", Judgement(NOT_CONTAINED, str(error)), "See `python3 main.py check`.")
        return judgements
    for attack in attacks:
        try:
            judgement = _try(post, attack, port)
        except (NodeError, AgentError, NeverEnded) as error:
            judgement = Judgement(NOT_CONTAINED, str(error))
        add(",".join(map(str, attack.rows)), attack.name, judgement, attack.remedy)
    try:
        post.leave()
    except (NodeError, AgentError) as error:
        add("-", "the node is left clean", Judgement(NOT_CONTAINED, str(error)), "Remove what it names by hand.")
    return judgements


def run(executors: Sequence[tuple[Executor, int | None]], settings: Settings, attacks: Sequence[Attack]) -> int:
    """The command: each executor comes with a port that listens on its node. 1 if something was not contained."""
    lock = threading.Lock()

    def tell(line: str) -> None:
        with lock:
            print(line, flush=True)

    # Nodes of one login on one host share its home and processes, so they take turns.
    turns: dict[str, list[tuple[Executor, int | None]]] = {}
    for executor, port in executors:
        turns.setdefault(executor.address, []).append((executor, port))

    def one_host(nodes: list[tuple[Executor, int | None]]) -> list[Judgement]:
        return [found for node, port in nodes for found in run_node(node, settings, attacks, port, tell)]

    with ThreadPoolExecutor(max_workers=min(32, len(turns))) as pool:
        found = [judgement for judgements in pool.map(one_host, turns.values()) for judgement in judgements]
    counts = {
        word: sum(judgement.outcome == word for judgement in found)
        for word in (CONTAINED, NOT_CONTAINED, NOT_APPLICABLE)
    }
    print(", ".join(f"{count} {word}" for word, count in counts.items()) + ".")
    return 1 if counts[NOT_CONTAINED] else 0
