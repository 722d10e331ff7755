"""The interface as /openapi.json tells it: complete, with examples, and true of a running server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema_rs
import pytest
import requests
import schemathesis as schemathesis_package
from fastapi.routing import APIRoute
from pydantic import BaseModel
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import schemas
from api import ROUTERS, RequestContext, make_app
from auth import TokenDigest
from database import Database
from tests.server import Server, wait_until
from token_manager import TokenManager

PROBLEM = "application/problem+json"
METHODS = ("get", "head", "post", "put", "delete", "patch", "options", "trace")
# Served, but no part of the interface that the document describes.
BESIDE_THE_DOCUMENT = {"GET /docs", "GET /openapi.json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose limits in time are out of the way; `alice` is the admin of the examples."""
    settings = {"SUBMITS_PER_MINUTE": "1000000", "LOGIN_FAILURES_PER_MINUTE": "1000000", "SUBMIT_MAX_WAIT": "60"}
    with Server(settings) as running:
        database = Database(f"sqlite:///{running.folder / 'database.db'}")
        manager = TokenManager(database, TokenDigest.from_file(running.folder / "token.key"))
        for user_id, is_admin in (("root", True), ("bob", False), ("carol", False), ("dan", False)):
            running.tokens[user_id] = f"token-of-{user_id}-in-this-test"
            manager.create(user_id, running.tokens[user_id], is_admin=is_admin)
        database.close()
        yield running


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    """/openapi.json."""
    answer = server.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("GET /path", operation) of every call."""
    return [
        (f"{method.upper()} {path}", item[method])
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]


def media_types(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(where, media type object) of every body, sent and received."""
    found = []
    for name, operation in operations(document):
        for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
            found.append((f"{name} takes {media_type}", body))
        if name.startswith("HEAD "):
            continue  # its answers have no body
        for status, response in operation["responses"].items():
            for media_type, body in response.get("content", {}).items():
                found.append((f"{name} answers {status} {media_type}", body))
    return found


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A validator of a schema that may refer to the document's components."""
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, or what it refers to."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def examples(document: dict[str, Any], body: dict[str, Any]) -> list[Any]:
    """The examples of a media type or a parameter, or of its schema."""
    if "example" in body:
        return [body["example"]]
    if "examples" in body:
        return [example["value"] for example in body["examples"].values()]
    schema = resolved(document, body["schema"])
    if "example" in schema:
        return [schema["example"]]
    if "examples" in schema:
        return list(schema["examples"])
    if schema.get("type") == "object" and "properties" in schema:
        # A form: every part has one.
        parts = {name: examples(document, {"schema": part}) for name, part in schema["properties"].items()}
        return [{name: found[0] for name, found in parts.items()}] if all(parts.values()) else []
    return []


# -- the document --------------------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    OPENAPI_31_VALIDATOR.validate(document)
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        assert name


def test_every_reference_in_it_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert references
    for reference in references:
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_it_describes_every_route_and_the_service_lists_each(server: Server, document: dict[str, Any]) -> None:
    routes = {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    described = {name for name, _ in operations(document)}
    assert described == routes - BESIDE_THE_DOCUMENT
    listed = set(server.get("/").json()["endpoints"].values())
    assert listed == (described | BESIDE_THE_DOCUMENT) - {name for name in described if name.startswith("HEAD ")} - {
        "GET /"
    }


def test_every_call_is_explained_and_has_an_id_of_its_own(document: dict[str, Any]) -> None:
    calls = operations(document)
    assert all(len(operation["description"]) > 10 and operation["tags"] for _, operation in calls)
    assert len({operation["operationId"] for _, operation in calls}) == len(calls)


def test_every_parameter_has_an_example_that_fits_it(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        for parameter in operation.get("parameters", []):
            found = examples(document, parameter)
            assert found, f"{name}: {parameter['name']} has no example"
            for example in found:
                assert validator(document, parameter["schema"]).is_valid(example), (name, parameter["name"], example)


def test_every_body_has_an_example_that_fits_it(document: dict[str, Any]) -> None:
    bodies = media_types(document)
    assert len(bodies) > 50
    for where, body in bodies:
        found = examples(document, body)
        assert found, f"{where}: no example"
        for example in found:
            errors = [error.message for error in validator(document, body["schema"]).iter_errors(example)]
            assert not errors, (where, errors)


def test_every_call_with_a_body_answers_it_and_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        statuses = [int(status) for status in operation["responses"]]
        assert 200 in statuses, name
        for status in statuses:
            response = operation["responses"][str(status)]
            if status < 400 or name.startswith("HEAD "):
                continue
            if (name, status) == ("GET /readyz", 503):
                assert list(response["content"]) == ["application/json"]
                continue
            assert list(response["content"]) == [PROBLEM], (name, status)
            example = response["content"][PROBLEM]["example"]
            assert example["status"] == status
            assert example["detail"].endswith(".")
        if operation.get("security") == [{"Bearer": []}]:
            assert {401, 429} <= set(statuses), name
        if "{job_id}" in name:
            assert {401, 403, 404} <= set(statuses), name
        for status in {401, 429, 503} & set(statuses):
            if name.startswith("HEAD ") or name == "GET /readyz":
                continue
            wanted = "WWW-Authenticate" if status == 401 else "Retry-After"
            assert wanted in operation["responses"][str(status)]["headers"], (name, status)


def test_what_is_guarded_says_so(document: dict[str, Any]) -> None:
    public = {"GET /", "GET /healthz", "GET /readyz", "GET /metrics"}
    for name, operation in operations(document):
        if name in public:
            assert "security" not in operation, name
        else:
            assert {"Bearer": []} in operation["security"], name
    assert document["components"]["securitySchemes"]["Bearer"] == {"type": "http", "scheme": "bearer"}


# -- schemathesis --------------------------------------------------------------------------------------------------

# Refusals of requests that fit the document, for reasons that no schema can tell, and which test shows each: a cursor
# of another server (400, below), a job that has ended (400, test_lifecycle), a token that differs from that of the
# header (400, test_submit_checks), an Idempotency-Key used for another submission (422, test_queueing).
# The second run sends a header that holds no token at all: what fits the document must get as far as being refused
# for that, with 401.
SCHEMATHESIS = """
[[operations]]
include-name = "GET /api/jobs"
parameters = { "query.cursor" = "c2VxOjQ3MTE" }

[[operations]]
include-name = "GET /api/admin/audit"
parameters = { "query.cursor" = "c2VxOjQ3MTE" }

[[operations]]
include-name = "GET /api/admin/users"
parameters = { "query.cursor" = "dXNlcjphbGljZQ" }

[[operations]]
include-name = "POST /api/cancel/{job_id}"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 403, 404, 409]
"""
SUBMIT_WITH_BEARER = """
[[operations]]
include-name = "POST /api/submit"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 422, 429]
"""


def schemathesis(server: Server, folder: Path, config: str, *words: str) -> str:
    """Run it over the server's document with every check; what it printed."""
    (folder / "schemathesis.toml").write_text(config)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    # Hypothesis would take CI for a reason to be slower.
    environment = {**{name: value for name, value in os.environ.items() if name != "CI"}, "COLUMNS": "160"}
    done = subprocess.run(
        [*command, "--checks", "all", "--continue-on-failure", "--no-color", "--request-timeout", "60", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_schemathesis_finds_nothing_over_the_whole_document_as_an_admin(tmp_path: Path) -> None:
    settings = {
        "SUBMITS_PER_MINUTE": "1000000",
        "LOGIN_FAILURES_PER_MINUTE": "1000000",
        "SUBMIT_MAX_WAIT": "1",
        "MAX_ACTIVE_JOBS": "8",
    }
    with Server(settings) as server:
        # The user and the token of the examples, so that they are taken as they stand.
        server.run("token_manager.py", "create", "alice", "alice_token", "--admin")
        config = SCHEMATHESIS + SUBMIT_WITH_BEARER
        # The stream has no end; test_dashboard reads it.
        words = ("--header", "Authorization: Bearer alice_token", "--max-examples", "20", "--seed", "1")
        printed = schemathesis(server, tmp_path, config, *words, "--exclude-path", "/api/stream")
        found = re.search(r"(\d+) selected / (\d+) total", printed)
        assert found is not None
        assert int(found[1]) == int(found[2]) - 1
        assert int(found[1]) >= 15
        jobs = server.get("/api/jobs?limit=500", headers={"Authorization": "Bearer alice_token"}).json()["jobs"]
        assert jobs, "no generated submission was ever taken"
        assert "Traceback" not in server.log()


def test_schemathesis_finds_no_config_that_fits_the_document_and_is_not_valid(server: Server, tmp_path: Path) -> None:
    # Without its links' phase: none of them leads from this one call to itself.
    phases = ("--phases", "examples,coverage,fuzzing")
    words = ("--include-path", "/api/submit", "--max-examples", "60", "--seed", "2", *phases)
    schemathesis(server, tmp_path, "", "--header", "Authorization: Basic YWxpY2U6eA==", *words)
    assert "Traceback" not in server.log()


def test_a_submission_links_to_all_that_can_be_asked_of_its_job(document: dict[str, Any]) -> None:
    names = {operation["operationId"]: name for name, operation in operations(document)}
    links = document["paths"]["/api/submit"]["post"]["responses"]["200"]["links"]
    assert {names[link["operationId"]] for link in links.values()} == {
        name
        for name in names.values()
        if "{job_id}" in name and not name.startswith("HEAD")  # as GET
    }


def test_schemathesis_finds_nothing_on_any_way_through_a_jobs_life(server: Server) -> None:
    """A state machine made of the document's links: submissions that are taken, and what can be asked of their jobs,
    in any order and also when they have ended."""
    made = schemathesis_package.openapi.from_url(f"{server.url}/openapi.json").include(tag="jobs")
    config = json.dumps({name: value for name, value in server.config("root").items() if name != "token"})
    called: Counter[tuple[str, int]] = Counter()
    # A random config names a user who may not submit; what may be said of one shows in the runs above.
    taken = (negative_data_rejection, positive_data_acceptance)

    class Life(made.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Any) -> None:
            if case.operation.path == "/api/submit":
                case.body = {"code": b"print('on')\n", "config_file": config}
            super().before_call(case)

        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"headers": server.bearer("root")}

        def after_call(self, response: Any, case: Any) -> None:
            called[f"{case.method} {case.operation.path}", response.status_code] += 1

        def validate_response(self, response: Any, case: Any, additional_checks: Any = None, **more: Any) -> None:
            case.validate_response(
                response,
                additional_checks=additional_checks,
                excluded_checks=taken,
                transport_kwargs=more or None,
                recorder=self.recorder,
            )

    bounded = hypothesis.settings(
        max_examples=6,
        stateful_step_count=8,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schemathesis's own
        Life.run(settings=bounded)
    asked = {name for name, status in called if "{job_id}" in name and status in (200, 202, 400, 409)}
    assert called["POST /api/submit", 200]
    assert len(asked) >= 2, called
    assert "Traceback" not in server.log()


# -- real answers fit their models ---------------------------------------------------------------------------------


def fits(model: type[BaseModel], answer: requests.Response, status: int = 200) -> dict[str, Any]:
    """The answer's body, strictly as the model has it and with no field that the model lacks."""
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    parsed = model.model_validate_json(answer.content, strict=True)
    assert set(body) >= set(model.model_fields) - {
        name for name, field in model.model_fields.items() if not field.is_required()
    }
    assert parsed is not None
    return body


def test_the_answers_of_a_real_flow_fit_their_models(server: Server) -> None:
    code = "import time\nprint('on', flush=True)\ntime.sleep(600)\n"
    first = fits(schemas.SubmitAnswer, server.post(code, server.config("bob")))
    job = first["job_id"]
    server.wait_for_output(job, "bob", "on")
    # Output may be here before the note of the start is durable.
    wait_until(lambda: server.status(job, "bob")["started_at"], 20, "the start to be noted")
    running = fits(schemas.JobStatus, server.get(f"/api/status/{job}", "bob"))
    assert (running["status"], running["node_reachable"]) == ("running", True)
    assert running["estimated_finish"] > running["started_at"] > running["created_at"]

    # With every node drained but the busy one, the next job has to wait.
    for node in server.get("/api/nodes").json()["nodes"]:
        drained = requests.post(
            f"{server.url}/api/admin/nodes/{node['node_id']}/drain", headers=server.bearer("root"), timeout=30
        )
        fits(schemas.NodeChange, drained)
    waiting = fits(schemas.SubmitAnswer, server.post("print('x')", server.config("carol")))["job_id"]
    pending = fits(schemas.JobStatus, server.get(f"/api/status/{waiting}", "carol"))
    assert (pending["status"], pending["queue_position"]) == ("pending", 1)
    assert assert_problem(server.get(f"/api/results/{waiting}", "carol"), 409)["detail"]

    for user_id in ("bob", "root"):
        summary = fits(schemas.Dashboard, server.get("/api/dashboard", user_id))
        assert summary["is_admin"] == (user_id == "root") == (summary["user_statistics"] is not None)
        assert job in [active["job_id"] for active in summary["active_jobs"]]
        fits(schemas.JobPage, server.get("/api/jobs", user_id))
        fits(schemas.QueueList, server.get("/api/queue", user_id))
        fits(schemas.Whoami, server.get("/api/whoami", user_id))
        fits(schemas.History, server.get("/api/history", user_id))
    public = fits(schemas.NodeList, server.get("/api/nodes"))
    assert (public["queue_length"], public["running_jobs"]) == (1, 1)
    assert job not in json.dumps(public)
    assert job in json.dumps(fits(schemas.NodeList, server.get("/api/nodes", "root")))

    for node in public["nodes"]:
        resumed = requests.post(
            f"{server.url}/api/admin/nodes/{node['node_id']}/resume", headers=server.bearer("root"), timeout=30
        )
        assert fits(schemas.NodeChange, resumed)["node_id"] == node["node_id"]
    server.wait_for(waiting, "carol")
    done = fits(schemas.JobResults, server.get(f"/api/results/{waiting}", "carol"))
    assert (done["status"], done["stdout"]) == ("completed", "x\n")
    fits(schemas.JobStatus, server.cancel(job, "bob"))
    cancelled = fits(schemas.JobResults, server.get(f"/api/results/{job}", "bob"))
    assert cancelled["status"] == "cancelled"
    waited = server.post("raise SystemExit(3)", server.config("bob"), wait=60)
    failed = fits(schemas.JobResults, waited)
    assert (failed["status"], failed["failure_reason"], failed["exit_code"]) == ("failed", "exit_code", 3)
    for user_id, ended in (("bob", job), ("carol", waiting), ("bob", failed["job_id"])):
        fits(schemas.JobStatus, server.get(f"/api/status/{ended}", user_id))
        fits(schemas.JobEvents, server.get(f"/api/events/{ended}", user_id))
    fits(schemas.AuditPage, server.get("/api/admin/audit", "root"))
    fits(schemas.UserPage, server.get("/api/admin/users", "root"))
    fits(schemas.Service, server.get("/"))
    fits(schemas.Health, server.get("/healthz"))
    fits(schemas.Readiness, server.get("/readyz"))


# -- the page for people -------------------------------------------------------------------------------------------


def test_the_docs_page_asks_no_other_host(server: Server) -> None:
    page = server.get("/docs")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith(("/", "data:")), address
        assert not address.startswith("//"), address
        if address.startswith("/"):
            assert server.get(address).status_code == 200, address
    assert "http://" not in page.text
    assert "https://" not in page.text
    # Swagger UI would otherwise show a badge that it loads from a validator on the internet.
    assert re.search(r'"validatorUrl":\s*null', page.text)


@pytest.mark.parametrize(
    ("name", "media_type"), [("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "text/css"), ("LICENSE", "")]
)
def test_the_files_of_the_docs_page_are_served_from_here(server: Server, name: str, media_type: str) -> None:
    answer = server.get(f"/static/swagger-ui/{name}")
    assert answer.status_code == 200
    assert media_type in answer.headers["Content-Type"]
    assert len(answer.content) > 1000
    assert answer.headers["X-Request-ID"]


# -- addresses, methods --------------------------------------------------------------------------------------------


def assert_problem(response: requests.Response, status: int) -> dict[str, Any]:
    """The answer is a problem document with that status."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["Content-Type"] == PROBLEM
    problem = schemas.Problem.model_validate_json(response.content, strict=True)
    assert problem.status == status
    assert problem.detail.endswith(".")
    assert problem.request_id == response.headers["X-Request-ID"] != ""
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/api",
        "/api/",
        "/api/status",
        "/api/status/",
        "/api/status/a/b",
        "/api/jobs/x",
        "/API/JOBS",
        "/static/nothing.js",
        "/static/",
        "/static/..%2fapi.py",
        "/static/%2e%2e/api.py",
        "/static/....//api.py",
        "/static/%2fetc%2fpasswd",
        "/static/swagger-ui/../../token.key",
        "/%00",
        "/\u2603",
    ],
)
def test_an_unknown_address_is_a_problem_404(server: Server, path: str) -> None:
    # Sent as it stands: requests would tidy it.
    session = requests.Session()
    prepared = session.prepare_request(requests.Request("GET", server.url))
    prepared.url = server.url + (path if path.isascii() else requests.utils.quote(path))  # type: ignore[attr-defined]
    answer = session.send(prepared, timeout=30)
    assert_problem(answer, 404)
    assert "import" not in answer.text


def test_a_wrong_method_is_a_problem_405_that_names_the_right_ones(server: Server, document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        right = {method.upper() for method in METHODS if method in item}
        address = server.url + path.format(job_id="x", node_id="x")
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - right:
            answer = requests.request(method, address, timeout=30)
            assert_problem(answer, 405)
            allowed = {word.strip() for word in answer.headers["Allow"].split(",")}
            assert allowed <= right | {"HEAD"}, (method, path)
            assert allowed & right, (method, path)


@pytest.mark.parametrize("given", ["abc-123", "0" * 64])
def test_a_request_id_of_the_client_is_kept(server: Server, given: str) -> None:
    answer = server.get("/api/status/x", headers={"X-Request-ID": given})
    assert assert_problem(answer, 401)["request_id"] == given


@pytest.mark.parametrize("given", ["0" * 65, "a b", "../x", "a\tb", "<script>", ""])
def test_a_request_id_that_could_do_harm_is_replaced(server: Server, given: str) -> None:
    answer = server.get("/api/status/x", headers={"X-Request-ID": given})
    assert assert_problem(answer, 401)["request_id"] != given


# -- who may -------------------------------------------------------------------------------------------------------

CALLS = ["GET /api/status", "GET /api/results", "GET /api/logs", "GET /api/events", "GET /api/code", "POST /api/cancel"]
READINGS = [*CALLS, "HEAD /api/results"]


def ask(server: Server, call: str, job_id: str, headers: dict[str, str] | None = None) -> requests.Response:
    """The call for a job."""
    method, path = call.split()
    return requests.request(method, f"{server.url}{path}/{job_id}", headers=headers, timeout=30)


@pytest.fixture(scope="module")
def bobs_job(server: Server) -> str:
    """A job of bob that has ended."""
    return str(server.run_job("bob", "print('private')\n")["job_id"])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "header",
    [None, "Bearer no-such-token", "Bearer", "Basic YTpi", "nonsense", "Bearer " + "x" * 5000, "Bearer \u00ff"],
)
def test_without_a_good_token_it_is_401(server: Server, bobs_job: str, call: str, header: str | None) -> None:
    for job_id in (bobs_job, "no-such-job"):
        headers = None if header is None else {"Authorization": header.encode("latin-1")}
        answer = ask(server, call, job_id, headers)  # type: ignore[arg-type]
        assert_problem(answer, 401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert "private" not in answer.text


@pytest.mark.parametrize("call", CALLS)
def test_the_job_of_another_is_403_and_an_unknown_one_404(server: Server, bobs_job: str, call: str) -> None:
    answer = ask(server, call, bobs_job, server.bearer("carol"))
    assert_problem(answer, 403)
    assert "private" not in answer.text
    unknown = [
        "no-such-job",
        "0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11",
        bobs_job.upper(),
        bobs_job + "x",
        "%00",
        "' OR 1=1",
    ]
    for job_id in unknown:
        assert_problem(ask(server, call, job_id, server.bearer("bob")), 404)
        assert_problem(ask(server, call, job_id, server.bearer("root")), 404)


@pytest.mark.parametrize("call", CALLS[:-1])
def test_owner_and_admin_may_read(server: Server, bobs_job: str, call: str) -> None:
    for user_id in ("bob", "root"):
        assert ask(server, call, bobs_job, server.bearer(user_id)).status_code == 200


def test_head_of_results_asks_for_the_token_as_well(server: Server, bobs_job: str) -> None:
    for headers, status in (({}, 401), (server.bearer("carol"), 403), (server.bearer("bob"), 200)):
        assert ask(server, "HEAD /api/results", bobs_job, headers).status_code == status


@pytest.mark.parametrize("path", ["/api/jobs", "/api/dashboard", "/api/admin/audit"])
def test_lists_need_a_token(server: Server, path: str) -> None:
    assert_problem(server.get(path), 401)
    assert_problem(server.get(path, headers={"Authorization": "Bearer no-such-token"}), 401)


@pytest.mark.parametrize("call", ["drain", "resume"])
def test_only_an_admin_changes_nodes(server: Server, call: str) -> None:
    address = f"{server.url}/api/admin/nodes/local-1/{call}"
    assert_problem(requests.post(address, timeout=30), 401)
    assert_problem(requests.post(address, headers=server.bearer("bob"), timeout=30), 403)
    assert_problem(requests.post(address.replace("local-1", "no"), headers=server.bearer("root"), timeout=30), 404)
    assert_problem(server.get("/api/admin/audit", "bob"), 403)


def test_nodes_are_public_but_a_bad_token_is_refused(server: Server) -> None:
    assert server.get("/api/nodes").status_code == 200
    assert_problem(server.get("/api/nodes", headers={"Authorization": "Bearer no-such-token"}), 401)


# -- the list of jobs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(server: Server) -> dict[str, list[str]]:
    """Ended jobs by user, oldest first, among those that other tests made."""
    made: dict[str, list[str]] = {"carol": [], "dan": []}
    for number in range(11):
        user_id = "dan" if number % 3 else "carol"
        fields = {"competition_id": f"c{number % 2}", "project_id": f"p{number % 5}"}
        made[user_id].append(server.run_job(user_id, f"raise SystemExit({number % 2})\n", **fields)["job_id"])
    return made


def pages(server: Server, user_id: str, limit: int, query: str = "") -> list[list[dict[str, Any]]]:
    """Every page, following the cursors."""
    found, cursor = [], ""
    while True:
        answer = fits(schemas.JobPage, server.get(f"/api/jobs?limit={limit}{query}{cursor}", user_id))
        found.append(answer["jobs"])
        if answer["next_cursor"] is None:
            return found
        cursor = f"&cursor={answer['next_cursor']}"
        assert len(answer["jobs"]) == limit
        assert len(found) < 1000


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 500])
def test_pages_hold_every_job_once_newest_first(server: Server, history: dict[str, list[str]], limit: int) -> None:
    own = [job["job_id"] for page in pages(server, "dan", limit) for job in page]
    assert own == history["dan"][::-1]
    everything = [job["job_id"] for page in pages(server, "root", limit) for job in page]
    assert len(everything) == len(set(everything)) >= 11
    assert set(history["dan"]) | set(history["carol"]) <= set(everything)
    if limit < len(history["dan"]):
        assert len(pages(server, "dan", limit)) == -(-len(history["dan"]) // limit)


def test_a_job_that_comes_between_two_pages_makes_neither_a_double_nor_a_gap(
    server: Server, history: dict[str, list[str]]
) -> None:
    first = server.get("/api/jobs?limit=3", "dan").json()
    new = server.run_job("dan")["job_id"]
    try:
        rest, cursor = [], first["next_cursor"]
        while cursor is not None:
            page = server.get(f"/api/jobs?limit=3&cursor={cursor}", "dan").json()
            rest += [job["job_id"] for job in page["jobs"]]
            cursor = page["next_cursor"]
        assert [job["job_id"] for job in first["jobs"]] + rest == history["dan"][::-1]
    finally:
        history["dan"].append(new)


def test_filters_hold_alone_and_together(server: Server, history: dict[str, list[str]]) -> None:
    everything = [job for page in pages(server, "root", 500) for job in page]
    queries: list[dict[str, str]] = [
        {"user_id": "dan"},
        {"status": "failed"},
        {"status": "completed"},
        {"status": "pending"},
        {"competition_id": "c1"},
        {"project_id": "p3"},
        {"user_id": "dan", "status": "failed"},
        {"user_id": "carol", "competition_id": "c0", "status": "completed"},
        {"competition_id": "c1", "project_id": "p1", "status": "failed", "user_id": "dan"},
        {"competition_id": "no-such"},
        {"user_id": "' OR 1=1 --"},
        {"project_id": "%"},
    ]
    hits = 0
    for query in queries:
        wanted = [job["job_id"] for job in everything if all(job[name] == value for name, value in query.items())]
        text = "".join(f"&{name}={requests.utils.quote(value)}" for name, value in query.items())  # type: ignore[attr-defined]
        assert [job["job_id"] for page in pages(server, "root", 2, text) for job in page] == wanted, query
        hits += len(wanted) > 0
    assert hits >= 8


def test_a_user_sees_own_jobs_only(server: Server, history: dict[str, list[str]], bobs_job: str) -> None:
    assert {job["user_id"] for page in pages(server, "dan", 500) for job in page} == {"dan"}
    assert server.get("/api/jobs?user_id=dan", "dan").status_code == 200
    for other in ("bob", "carol", "nobody", "DAN", ""):
        assert_problem(server.get(f"/api/jobs?user_id={other}", "dan"), 403)
    assert {job["user_id"] for job in server.get("/api/jobs?user_id=bob", "root").json()["jobs"]} == {"bob"}


@pytest.mark.parametrize("limit", ["0", "-1", "501", "99999999999999999999", "ten", "1.5", "", "nan"])
def test_a_limit_out_of_bounds_is_422_and_named(server: Server, limit: str) -> None:
    problem = assert_problem(server.get(f"/api/jobs?limit={limit}", "bob"), 422)
    assert [error["field"] for error in problem["errors"]] == ["limit"]


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "",
        "c2VxOg",
        "c2VxOi01",
        "c2VxOmFiYw",
        "aWQ6NQ",
        "c2VxOjEuNQ",
        "c2VxOjU%3D%3D%3D",
        "%00",
        "\u2603",
        "4" * 200,
    ],
)
def test_a_cursor_that_is_none_is_400(server: Server, cursor: str) -> None:
    problem = assert_problem(server.get(f"/api/jobs?cursor={cursor}", "bob"), 400)
    assert [error["field"] for error in problem["errors"]] == ["cursor"]


def test_wrong_parameters_are_422_and_named(server: Server, bobs_job: str) -> None:
    wrong = {
        "/api/jobs?status=done": "status",
        f"/api/jobs?user_id={'x' * 65}": "user_id",
        f"/api/jobs?cursor={'x' * 201}": "cursor",
        f"/api/results/{bobs_job}?format=xml": "format",
        f"/api/logs/{bobs_job}?stream=stdin": "stream",
        f"/api/logs/{bobs_job}?offset=-1": "offset",
        f"/api/logs/{bobs_job}?tail=many": "tail",
    }
    for path, name in wrong.items():
        problem = assert_problem(server.get(path, "bob"), 422)
        assert [error["field"] for error in problem["errors"]] == [name], path


@pytest.mark.parametrize(
    "range_header", ["bytes=1000000-", "bytes=5-2", "bytes=abc", "lines=1-2", "bytes=", "bytes=--"]
)
def test_a_range_of_results_that_makes_no_sense_has_a_defined_answer(
    server: Server, bobs_job: str, range_header: str
) -> None:
    headers = {**server.bearer("bob"), "Range": range_header}
    answer = requests.get(f"{server.url}/api/results/{bobs_job}?format=jsonl", headers=headers, timeout=30)
    if answer.status_code == 416:
        assert_problem(answer, 416)
        assert answer.headers["Content-Range"].startswith("bytes */")
    else:  # RFC 9110: a Range that is not understood is passed over
        assert answer.status_code == 200
        assert json.loads(answer.text) == {"output": "private"}


# -- the short way -------------------------------------------------------------------------------------------------


def test_every_call_gives_the_same_answer_the_short_way_and_fastapis(server: Server, bobs_job: str) -> None:
    paths = [
        *("/", "/healthz", "/readyz", "/api/nodes", "/api/jobs", "/api/status/", "/api/status", "/api/nothing"),
        *(f"/api/{call}/{job}" for call in ("status", "events", "results", "logs") for job in (bobs_job, "nonsense")),
        *("/api/admin/audit", f"/api/status/{bobs_job}/", f"/api/status//{bobs_job}", "/api/status/%2e%2e", "/docs"),
    ]
    for path in paths:
        for headers in ({}, server.bearer("bob"), {"Authorization": "Bearer nonsense-token"}):
            for method in ("GET", "HEAD", "POST", "DELETE"):
                url = f"{server.url}{path}"
                ways = [
                    requests.request(method, url + query, headers=headers, timeout=30, allow_redirects=False)
                    for query in ("", "?unknown=1")  # where none is of plain text a query goes FastAPI's way
                ]
                short, long = (
                    (
                        answer.status_code,
                        re.sub(r'"request_id": ?"[^"]*"', "", answer.text),
                        sorted(name for name in answer.headers if name not in ("location",)),
                    )
                    for answer in ways
                )
                assert short == long, (method, path, headers)


def test_the_calls_that_come_often_go_the_short_way() -> None:
    direct = RequestContext(make_app())._app
    assert {
        *(("GET", "/api/status/"), ("POST", "/api/submit"), ("GET", "/api/results/"), ("GET", "/api/jobs")),
        *(("GET", "/api/nodes"), ("GET", "/api/dashboard"), ("POST", "/api/cancel/"), ("GET", "/healthz")),
    } <= set(direct._routes)
    with_query = {call for call, (_, _, _, takes_query) in direct._routes.items() if takes_query}
    assert with_query == {("POST", "/api/submit")}


def test_a_query_is_read_the_short_way_as_fastapi_reads_it(server: Server) -> None:
    files = {"code": "pass\n", "config_file": json.dumps(server.config("carol"))}
    told = {}
    for query in ("wait=false", "wait=0&wait=30", "wait=30&wait=0", "other=1&wait=%35", "wait=x", "wait=", "wait"):
        answer = requests.post(f"{server.url}/api/submit?{query}", files=files, timeout=60)
        told[query] = answer.json()["status"]
        if answer.status_code == 200:
            server.wait_for(answer.json()["job_id"], "carol")
    assert [told[query] for query in ("wait=x", "wait=", "wait")] == [400, 400, 400]
    assert told["wait=0&wait=30"] == told["other=1&wait=%35"] == "completed"  # the last one counts
    assert {told["wait=false"], told["wait=30&wait=0"]} <= {"pending", "running"}
