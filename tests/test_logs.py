"""The log of a real server as JSON lines and as text."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

from logs import JsonLines, TextLines
from tests.server import Server, wait_until


def lines(server: Server) -> list[dict[str, Any]]:
    """Every line, each of them a JSON object."""
    return [json.loads(line) for line in server.log().splitlines()]


def test_json_lines_tell_which_request_job_and_node_they_are_about() -> None:
    with Server({"LOG_FORMAT": "json", "NUM_GPU_NODES": "2"}) as server:
        answer = server.post("print(1)\n", server.config("alice"), headers={"X-Request-ID": "mine-1"}, wait=30)
        job = answer.json()["job_id"]
        server.token("root", admin=True)
        second = server.run_job("alice")["job_id"]

        def ended() -> list[dict[str, Any]]:
            return [line for line in lines(server) if line["message"].endswith("is completed. Completed.")]

        assert wait_until(lambda: len(ended()) == 2)
        (queued,) = [line for line in lines(server) if line.get("request_id") == "mine-1"]
        assert (queued["level"], queued["logger"], queued["job_id"]) == ("info", "api", job)
        assert queued["time"].endswith("Z")
        assert "node" not in queued
        for line, job_id in zip(ended(), (job, second), strict=True):
            assert (line["job_id"], line["logger"]) == (job_id, "worker")
            assert line["node"] in line["message"]
            assert "request_id" not in line
        started = next(line for line in lines(server) if "connected" in line["message"])
        assert started["node"].startswith("local-")
        assert "job_id" not in started
        server.terminate()
        assert "job_id" not in lines(server)[-1]


def test_a_stack_and_hostile_characters_stay_in_their_line() -> None:
    log, out = logging.Logger("test"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    try:
        raise ValueError("two\nlines and \x1b[31m")
    except ValueError:
        log.exception("it said %s", "a\nb")
    (line,) = out.getvalue().splitlines()
    assert "\x1b" not in line
    told = json.loads(line)
    assert (told["level"], told["message"]) == ("error", "it said a\nb")
    assert told["exception"].endswith("ValueError: two\nlines and \x1b[31m")


def test_no_text_forges_a_line_or_a_colour() -> None:
    log, out = logging.Logger("test"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(TextLines())
    log.addHandler(handler)
    hostile = "a\nb\r\x1b[31m\x9b31m\u2028\x85ä"
    log.info("said %s", hostile)
    assert out.getvalue().endswith(r" INFO    test: said a\nb\r\x1b[31m\x9b31m\u2028\x85ä" + "\n")
    assert len(out.getvalue().splitlines()) == 1
    try:
        raise ValueError(hostile)
    except ValueError:
        log.exception("failed")
    stack = out.getvalue().splitlines()[2:]
    assert all(line.startswith("    ") for line in stack)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())


def test_text_is_the_default() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        assert " INFO    main: listening on http://" in server.log()


def test_a_format_that_is_none_stops_the_start_and_is_named() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        server.settings["LOG_FORMAT"] = "xml"
        done = server.run("main.py", "check", code=1)
        assert "LOG_FORMAT" in done.stderr
