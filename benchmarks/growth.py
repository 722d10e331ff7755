"""What each cost becomes as jobs, users and nodes grow, and which of them is the first to become too much."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field

from benchmarks.idle import busy_share, started
from benchmarks.load import MARK
from benchmarks.measure import Chart, Findings, Row, Spread, timed
from benchmarks.population import TOKEN, USER, filled
from benchmarks.servers import UNLIMITED, Client, MeasuredServer, Run, multipart, resident_bytes
from benchmarks.simulated import SimulatedServer
from benchmarks.throughput import Load

ORDER = 8
TITLE = "Growth"
ABOUT = """
Each cost is measured alone, by one client, while one quantity grows: jobs in the database (all of them ended), users of
whom each has a job waiting, and nodes. The nodes are simulated: they answer at once and run nothing, so what is seen is
the server's own cost. The table shows each cost at the smallest and at the largest size, and the exponent with which it
grows in between: 0 is constant, 1 is in proportion.
"""
LEFT_OUT = 0.15  # exponents below this are noise
TOO_MUCH = {
    "ms": 1000.0,
    "s": 60.0,
    "% of a core": 50.0,
    "MB": 2000.0,
}  # for an answer, a start, doing nothing, a process

ENDED = {"smoke": [3000], "short": [1000, 30_000, 1_000_000], "full": [1000, 10_000, 100_000, 1_000_000]}
WAITING = {"smoke": [30], "short": [10, 300, 10_000], "full": [10, 100, 1000, 10_000]}
NODES = {"smoke": [2], "short": [8, 32, 256], "full": [8, 16, 32, 64, 128, 256]}


@dataclass
class Costs:
    """By name, the points (size, value) of each cost, and its unit."""

    what: str
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, size: int, name: str, unit: str, value: float) -> None:
        """One more point."""
        self.points.setdefault(name, []).append((size, value))
        self.units[name] = unit

    def exponent(self, name: str) -> float:
        """With which power of the size the cost grows between the ends."""
        (small, little), (large, much) = self.points[name][0], self.points[name][-1]
        return math.log(much / little) / math.log(large / small) if small != large and little > 0 and much > 0 else 0.0

    def room(self, name: str) -> float:
        """By which factor the largest size can still grow before the cost is too much; inf when it does not grow."""
        exponent, value = self.exponent(name), self.points[name][-1][1]
        if exponent <= LEFT_OUT or value <= 0:
            return math.inf
        return float((TOO_MUCH[self.units[name]] / value) ** (1 / exponent))

    def rows(self) -> list[Row]:
        """Each cost at both ends."""
        return [
            Row(
                f"{name}, {self.what}",
                self.units[name],
                Spread.of([points[-1][1]]),
                f"with {points[0][0]:,.0f} instead of {points[-1][0]:,.0f}",
                Spread.of([points[0][1]]),
                Spread.of([points[-1][1] / points[0][1] if points[0][1] else 1.0]),
                note=f"exponent {self.exponent(name):.2f}",
            )
            for name, points in self.points.items()
        ]

    def chart(self) -> Chart:
        """All costs over the size, as multiples of what they are at the smallest."""
        lines = {
            f"{name} ({points[0][1]:.3g} {self.units[name]} at first)": [
                (size, value / points[0][1]) for size, value in points if points[0][1]
            ]
            for name, points in self.points.items()
        }
        name = f"growth-{self.what.split()[-1]}"
        return Chart(name, f"Costs over {self.what}", self.what, "times the first", lines, x_log=True, y_log=True)


def measure(run: Run) -> Findings:
    """Three sweeps, and which cost breaks first."""
    sweeps = [
        of_jobs(run, ENDED[run.mode]),
        of_users(run, WAITING[run.mode]),
        of_nodes(run, NODES[run.mode]),
    ]
    rows = [row for costs in sweeps for row in costs.rows()]
    breaking = [(costs.room(name), name, costs) for costs in sweeps for name in costs.points]
    room, name, costs = min(breaking, key=lambda found: found[0])
    size, value = costs.points[name][-1]
    verdict = (
        f"“{name}” at {room * size:,.0f} {costs.what}: it is {value:.3g} {costs.units[name]} at {size:,.0f}, grows "
        f"with the power {costs.exponent(name):.2f}, and {TOO_MUCH[costs.units[name]]:g} are too much"
        if room < math.inf
        else "nothing grows by more than noise"
    )
    rows.append(Row("first to become too much", "", note=verdict))
    return Findings(rows, [costs.chart() for costs in sweeps])


def token(number: int) -> str:
    """The token of a user of `populate`."""
    return TOKEN.replace(MARK, f"{number:07d}")


class Newcomers:
    """Users of `populate` who submit one after the other."""

    def __init__(self, server: MeasuredServer) -> None:
        self._client = Client(server.port)
        self._number = 0
        self.last = ("", "")  # token and job of the last one

    def submit(self) -> None:
        """The next one does."""
        self._number += 1
        user, own = USER.replace(MARK, f"{self._number:07d}"), token(self._number)
        config = {"competition_id": "comp", "project_id": "proj", "user_id": user, "expected_time": 60, "token": own}
        status, answer = self._client.post("/api/submit", *multipart(b"pass\n", config))
        if status != 200:
            raise RuntimeError(f"a submission that should have been taken: {status} {answer!r}")
        self.last = (own, json.loads(answer)["job_id"])


def ask(server: MeasuredServer, path: str, own: str, times: int) -> float:
    """Milliseconds for one answer, the median."""
    with Client(server.port, own) as client:

        def once() -> None:
            status, body = client.get(path)
            if status != 200:
                raise RuntimeError(f"{path}: {status} {body[:200]!r}")

        once()
        return timed(once, times)


def ordinary(run: Run, costs: Costs, size: int, server: MeasuredServer) -> None:
    """What users do all day: submit, look, list."""
    times = run.scaled(2, 60, 300)
    newcomers = Newcomers(server)
    newcomers.submit()
    costs.add(size, "submitting", "ms", timed(newcomers.submit, times))
    own, job = newcomers.last
    costs.add(size, "status", "ms", ask(server, f"/api/status/{job}", own, times))
    admin = server.token("root", admin=True)
    costs.add(size, "page of 50 jobs", "ms", ask(server, "/api/jobs", admin, times))
    costs.add(size, "nodes and queue", "ms", ask(server, "/api/nodes", own, times))
    costs.add(size, "dashboard of a user", "ms", ask(server, "/api/dashboard", own, run.scaled(1, 9, 30)))
    costs.add(size, "dashboard of an administrator", "ms", ask(server, "/api/dashboard", admin, run.scaled(1, 5, 15)))
    costs.add(size, "memory", "MB", resident_bytes(server.pid) / 1e6)


def of_jobs(run: Run, sizes: list[int]) -> Costs:
    """Ended jobs."""
    costs = Costs("ended jobs")
    for size in sizes:
        with filled(run, ended=size) as server:
            ordinary(run, costs, size, server)
            costs.add(size, "start to ready", "s", started(server))
    return costs


def of_users(run: Run, sizes: list[int]) -> Costs:
    """Users with a waiting job each."""
    costs = Costs("waiting users")
    for size in sizes:
        with filled(run, pending=size) as server:
            ordinary(run, costs, size, server)
    return costs


def of_nodes(run: Run, sizes: list[int]) -> Costs:
    """Simulated nodes, idle and with no-op jobs."""
    costs = Costs("simulated nodes")
    for size in sizes:
        settings = {**UNLIMITED, "NUM_GPU_NODES": str(size)}
        with SimulatedServer(settings) as server, Load(server, 8) as load:
            costs.add(size, "no-op jobs, seconds per thousand", "s", 1000 / load.rate(run.scaled(8, 200, 2000)))
            own = server.token("user0")
            costs.add(size, "nodes and queue", "ms", ask(server, "/api/nodes", own, run.scaled(2, 60, 300)))
            time.sleep(run.scaled(0, 1, 5))
            share = busy_share(server.pid, run.scaled(1, 4, 60))
            costs.add(size, "idle", "% of a core", max(share, 0.01))
            costs.add(size, "memory", "MB", resident_bytes(server.pid) / 1e6)
    return costs
