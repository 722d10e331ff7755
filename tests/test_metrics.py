"""/metrics of a real server: what is counted, under which names; alert rules and dashboard use just those."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server import PROJECT, Server, wait_until

DEPLOY = PROJECT / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "gpu-job-server.json"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two slots, so that a queue is made of three jobs."""
    with Server({"NUM_GPU_NODES": "2", "SUBMITS_PER_MINUTE": "20"}) as running:
        yield running


def scrape(server: Server) -> Samples:
    """Every sample by name and labels."""
    answer = server.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def grown(server: Server, before: Samples, name: str, **labels: str) -> float:
    """By how much a sample has grown; one that was not there counts from 0."""
    key = name, frozenset(labels.items())
    return scrape(server).get(key, 0) - before.get(key, 0)


# -- what is counted -----------------------------------------------------------------------------------------------


def test_a_job_is_counted_and_timed_from_submission_to_end(server: Server) -> None:
    before = scrape(server)
    server.run_job("alice", "import time; time.sleep(0.6); print('x' * 1000)\n", expected_time=2)
    assert grown(server, before, "gpujobs_jobs_submitted_total") == 1
    assert grown(server, before, "gpujobs_jobs_ended_total", state="completed", reason="") == 1
    assert grown(server, before, "gpujobs_job_wait_seconds_count") == 1
    assert grown(server, before, "gpujobs_launch_seconds_count") == 1
    assert 0.6 <= grown(server, before, "gpujobs_job_run_seconds_sum", state="completed") < 5
    assert 0.3 <= grown(server, before, "gpujobs_job_run_ratio_sum") < 2.5
    assert grown(server, before, "gpujobs_log_received_bytes_total") == 1001
    assert grown(server, before, "gpujobs_database_writes_total") >= 4
    assert grown(server, before, "gpujobs_database_commit_seconds_count") >= 3


def test_a_failed_and_a_cancelled_job_are_told_apart(server: Server) -> None:
    before = scrape(server)
    server.run_job("alice", "raise SystemExit(3)\n")
    job = server.submit("alice", "import time; time.sleep(60)\n")
    server.wait_for(job, "alice", ("running",))
    server.cancel(job, "alice")
    server.wait_for(job, "alice")
    assert grown(server, before, "gpujobs_jobs_ended_total", state="failed", reason="exit_code") == 1
    assert grown(server, before, "gpujobs_jobs_ended_total", state="cancelled", reason="") == 1
    assert grown(server, before, "gpujobs_job_run_ratio_count") == 1


def test_the_queue_and_the_nodes_are_as_they_are(server: Server) -> None:
    users = ("bob", "carol", "dave")
    ids = [server.submit(user, "import time; time.sleep(60)\n") for user in users]
    for job, user in zip(ids[:2], users[:2], strict=True):
        server.wait_for(job, user, ("running",))
    time.sleep(0.3)
    samples = scrape(server)
    assert value(samples, "gpujobs_active_jobs", state="running") == 2
    assert value(samples, "gpujobs_active_jobs", state="pending") == 1
    assert value(samples, "gpujobs_nodes", state="busy") == 2
    assert value(samples, "gpujobs_nodes", state="online") == 0
    assert value(samples, "gpujobs_node_busy", node="local-1") == 1
    assert value(samples, "gpujobs_node_connections_total", node="local-2") == 1
    assert 0.2 < value(samples, "gpujobs_queue_oldest_seconds") < 30
    assert 30 < value(samples, "gpujobs_queue_expected_wait_seconds") < 130
    for job, user in zip(ids, users, strict=True):
        server.cancel(job, user)
        server.wait_for(job, user)
    samples = scrape(server)
    assert value(samples, "gpujobs_active_jobs", state="pending") == 0
    assert value(samples, "gpujobs_queue_oldest_seconds") == 0


def test_requests_are_counted_by_template_whatever_paths_are_tried(server: Server) -> None:
    before = scrape(server)
    for number in range(30):
        server.get(f"/api/status/no-such-{number}", "alice")
        server.get(f"/attack/{number}")
        server.get(f"/static/{number}")
        requests.request(f"VERB{number}", f"{server.url}/api/jobs", timeout=30)
    after = scrape(server)
    name = "gpujobs_http_requests_total"
    assert grown(server, before, name, method="GET", route="/api/status/{job_id}", status="404") == 30
    assert grown(server, before, name, method="GET", route="unmatched", status="404") == 60
    assert len(set(after) - set(before)) < 60, "labels grow with the requests"
    assert value(after, "gpujobs_http_request_duration_seconds_count", method="GET", route="unmatched") >= 60


def test_watchers_are_counted_while_they_watch(server: Server) -> None:
    job = server.submit("alice", "import time; time.sleep(60)\n")
    server.wait_for(job, "alice", ("running",))
    streams = [
        requests.get(f"{server.url}{path}?follow=true", headers=server.bearer("alice"), stream=True, timeout=30)
        for path in (f"/api/logs/{job}", f"/api/logs/{job}", f"/api/status/{job}", "/api/stream")
    ]
    samples = scrape(server)
    assert value(samples, "gpujobs_stream_watchers", stream="log") == 2
    assert value(samples, "gpujobs_stream_watchers", stream="status") == 1
    assert value(samples, "gpujobs_stream_watchers", stream="dashboard") == 1
    for stream in streams:
        stream.close()
    wait_until(lambda: value(scrape(server), "gpujobs_stream_watchers", stream="log") == 0)
    server.cancel(job, "alice")
    server.wait_for(job, "alice")


def test_refusals_are_counted_by_their_limit(server: Server) -> None:
    before = scrape(server)
    job = server.submit("erin", "import time; time.sleep(60)\n")
    assert server.post("1", server.config("erin")).status_code == 429
    assert grown(server, before, "gpujobs_limit_hits_total", limit="active_jobs") == 1
    server.cancel(job, "erin")
    for _ in range(25):
        answer = server.post("1", server.config("erin"))
    assert answer.status_code == 429
    assert grown(server, before, "gpujobs_limit_hits_total", limit="submit_rate") >= 5


def test_a_backup_sets_its_time(server: Server, tmp_path: Path) -> None:
    assert value(scrape(server), "gpujobs_last_backup_timestamp_seconds") == 0
    server.run("main.py", "backup", str(tmp_path / "backup"))
    assert value(scrape(server), "gpujobs_last_backup_timestamp_seconds") == pytest.approx(time.time(), abs=30)


def test_no_user_job_or_competition_is_in_it(server: Server) -> None:
    job = server.run_job("mallory", "print(1)\n", competition_id="secret-comp")["job_id"]
    text = server.get("/metrics").text
    for word in ("mallory", "alice", "secret-comp", job):
        assert word not in text


def test_openmetrics_is_given_to_who_prefers_it(server: Server) -> None:
    answer = server.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_names_follow_the_conventions_of_prometheus(server: Server) -> None:
    families = list(text_string_to_metric_families(server.get("/metrics").text))
    for family in families:
        assert family.documentation
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples if "_created" not in sample.name)
    done = promtool("check", "metrics", text=server.get("/metrics").text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_gpus_are_read_from_the_nodes(ssh_server: Server) -> None:
    nodes = ssh_server.get("/api/nodes").json()["nodes"]
    samples = scrape(ssh_server)
    seen = 0
    for node in nodes:
        for gpu in node["gpus"]:
            where = {"node": node["node_id"], "gpu": str(gpu["index"])}
            assert value(samples, "gpujobs_gpu_memory_bytes", **where) == gpu["memory_total_mib"] << 20
            assert value(samples, "gpujobs_gpu_temperature_celsius", **where) == gpu["temperature"]
            assert value(samples, "gpujobs_gpu_utilization_ratio", **where) == pytest.approx(gpu["utilization"] / 100)
            seen += 1
    assert seen >= 8


# -- what is made of it --------------------------------------------------------------------------------------------


def promtool(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run(["promtool", *words], input=text, capture_output=True, text=True, timeout=60)


def expressions() -> list[str]:
    """Every PromQL expression of the rules and the dashboard."""
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_rules_and_dashboard_use_only_names_the_server_exports(server: Server) -> None:
    server.run_job("alice")
    exported = {name for name, _ in scrape(server)}
    exported |= {family.name for family in text_string_to_metric_families(server.get("/metrics").text)}
    used = {name for expression in expressions() for name in re.findall(r"\bgpujobs_\w+", expression)}
    assert len(used) > 25
    # Without a GPU here its families have no samples, but they are there.
    assert used - exported == set()


def test_the_rules_and_the_scrape_configuration_are_valid() -> None:
    done = promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(yaml.safe_load(RULES.read_text())['groups'][0]['rules'])} rules found" in done.stdout


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", str(DEPLOY / "prometheus" / "alerts_test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_expression_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    done = promtool("check", "rules", "--lint=none", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
