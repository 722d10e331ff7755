"""What the documents say is held against the code: tables are generated, the README's blocks run, names looked up.

`UPDATE_DOCS=1 python3 -m pytest tests/test_docs.py` writes the generated tables anew.
"""

from __future__ import annotations

import configparser
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from pydantic import ValidationError

import config
from api import make_app
from config import Settings
from tests.fleet import missing_tools
from tests.fresh import FreshCopy
from tests.server import FINAL, PROJECT, wait_until

FOLDER = PROJECT / "documentation"
NAMES = (
    *("INDEX", "QUICK_START", "API_DOCUMENTATION", "ACCESS_CONTROL", "SETUP", "TOKEN_IMPLEMENTATION_SUMMARY"),
    *("TOKEN_MANAGEMENT_ANALYSIS", "AUTHORIZATION_SUMMARY", "TESTING_PLAN", "POTENTIAL_ISSUES", "ARCHITECTURE"),
)
DOCUMENTS = [
    *(PROJECT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    PROJECT / "tests" / "README.md",
    *sorted(FOLDER.glob("*.md")),
]
IDS = [str(path.relative_to(PROJECT)) for path in DOCUMENTS]
PORT = "localhost:8001"  # what the documents say; replaced by the port of the server under test
NOT_RUN = "not run by the tests: "
STAYS = "runs until it is stopped"
STOPPED = "the server is stopped first"


# -- reading Markdown ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the comment right before it, the heading above it, its first line's number."""

    language: str
    text: str
    comment: str
    heading: str
    line: int


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document."""
    found = []
    heading = comment = ""
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            body = []
            for _, inner in lines:
                if inner.startswith("```"):
                    break
                body.append(inner)
            else:
                raise AssertionError(f"{path}:{number}: the block has no end")
            found.append(Block(line[3:].strip(), "\n".join(body) + "\n", comment, heading, number + 1))
        if line.strip():
            match = re.fullmatch(r"<!-- (.*) -->", line)
            comment = match.group(1) if match else ""
    return found


@functools.cache
def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def words_in_backticks(path: Path) -> list[str]:
    """Everything that stands as `code` in running text."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page has, one per heading."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows, headers and rulers left out."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        is_row = line.startswith("| ")
        is_header = number + 1 < len(lines) and lines[number + 1].startswith("|---")
        if is_row and not is_header:
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


# -- generated tables ----------------------------------------------------------------------------------------------


def assert_generated(path: Path, name: str, wanted: str) -> None:
    """The text between the two markers is `wanted`; with UPDATE_DOCS=1 it is made so."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, marker, rest = path.read_text(encoding="utf-8").partition(begin)
    present, second_marker, after = rest.partition(end)
    assert marker, f"{path} lacks {begin!r}"
    assert second_marker, f"{path} lacks {end!r}"
    if os.environ.get("UPDATE_DOCS") == "1" and present != wanted:
        path.write_text(before + begin + wanted + end + after, encoding="utf-8")
        present = wanted
    assert present == wanted, "run: UPDATE_DOCS=1 python3 -m pytest tests/test_docs.py"


@functools.cache
def openapi() -> dict[str, Any]:
    """The OpenAPI document of this very code."""
    return make_app().openapi()


def operations() -> dict[str, dict[str, Any]]:
    """`GET /api/jobs` and so on, with what OpenAPI says of it."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi()["paths"].items()
        for method, operation in methods.items()
    }


def calls_table() -> str:
    """The calls as a Markdown table: who may, which statuses, what it does."""
    rows = ["| call | token | statuses | what it does |", "|---|---|---|---|"]
    for call, operation in operations().items():
        security = operation.get("security", [])
        token = "no" if not security else "optional" if {} in security else "yes"
        if "/admin/" in call:
            token = "admin's"
        if call == "POST /api/submit":
            token = "in the config, or as Bearer"
        statuses = ", ".join(sorted(operation["responses"]))
        first = operation["description"].split("\n")[0]
        rows.append(f"| `{call}` | {token} | {statuses} | {first} |")
    return "\n".join(rows) + "\n"


def test_the_settings_table_is_the_one_of_the_code() -> None:
    assert_generated(FOLDER / "SETUP.md", "settings", config.settings_table())


def test_the_table_of_calls_is_the_one_of_the_code() -> None:
    assert_generated(FOLDER / "API_DOCUMENTATION.md", "calls", calls_table())


def test_every_call_has_its_section_and_no_section_is_without_a_call() -> None:
    headings = re.findall(
        r"^### `((?:GET|HEAD|POST|PUT|PATCH|DELETE) [^`]+)`$", prose(FOLDER / "API_DOCUMENTATION.md"), re.M
    )
    assert sorted(headings) == sorted(operations())


# -- names ---------------------------------------------------------------------------------------------------------

# Files that exist only while or after a server runs, or on a node.
MADE_BY_RUNNING = {
    *(".env", ".venv", ".venv/", "database.db", "database.db-wal", "database.db-shm", "token.key", "server.log"),
    *(
        "database.db.server-lock",
        "database.db.write-lock",
        "database.db.last-backup",
        ".quickstart_token",
        ".server.pid",
        "fleet.env",
    ),
    *("config.json", "stdout", "stderr", "results.jsonl", "manifest.json", ".gpu-job-server/", "solution.py"),
    *(
        "attempts/<job>.<attempt>/",
        "exit.json",
        "spec.json",
        "supervisor.json",
        "work/",
        "attempts/",
        "agent.log",
        "agent.lock",
        "grade_code.py",
    ),
    *("jobs/results/", "jobs/<job_id>/", "jobs/.nodes/", "jobs/", "tmp/", "trash/", "stdout.attempt-1", "exit.new"),
    *("gate/sitecustomize.py", "sitecustomize.py", "*.db*"),
}
# Words in capitals that are no settings: what a job sees, what other programs define, what the tests read.
OTHER_CAPITALS = {
    *("JOB_ID", "USER_ID", "COMPETITION_ID", "PROJECT_ID", "RESULTS_FILE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "UPDATE_DOCS"),
    *("GPUQ_URL", "GPUQ_TOKEN", "GPUQ_CA", "GPUQ_CONFIG", "GPUQ_COMPETITION", "GPUQ_PROJECT", "GPUQ_EXPECTED_TIME"),
    *("SQLITE_BUSY_SNAPSHOT", "GPUQ_NO_SKIPS", "JOB_SERVER_FAILPOINT", "YYYYMMDD_HHMMSS"),
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_named_file_is_there(path: Path) -> None:
    missing = []
    for word in words_in_backticks(path):
        name, _, test = word.partition("::")
        if (
            name in MADE_BY_RUNNING
            or name.startswith("/")
            or not re.fullmatch(r"[\w.*/<>-]+(\.(py|sh|md|txt|toml|service|yml|json)|/)", name)
        ):
            continue
        candidates = [base / name for base in (PROJECT, path.parent, PROJECT / "tests", PROJECT / "node_agent")]
        file = next((candidate for candidate in candidates if candidate.exists()), None)
        defined = rf"^\s*(?:async )?def {re.escape(test)}\("
        if file is None or (test and not re.search(defined, file.read_text(), re.MULTILINE)):
            missing.append(word)
    assert not missing


@functools.cache
def constants() -> dict[str, str]:
    """Names in capitals that the modules define, with what stands behind the equals sign."""
    assignment = re.compile(r"^([A-Z][A-Z0-9_]+)(?::[^=\n]+)? = ([^#\n]*)", re.MULTILINE)
    return {
        name: value.strip()
        for module in (*PROJECT.glob("*.py"), PROJECT / "node_agent" / "agent.py")
        for name, value in assignment.findall(module.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_value_given_with_a_name_is_the_one_of_the_code(path: Path) -> None:
    """`RETENTION_DAYS` (365), `LAUNCH_LEASE` (20 s), `MAX_CODE_BYTES` (10 MiB)."""
    wrong = []
    for name, number, unit in re.findall(
        r"`([A-Z][A-Z0-9_]+)`\s+\((\d+) ?(s|MiB)?\)", path.read_text(encoding="utf-8")
    ):
        said = int(number) * (1 << 20 if unit == "MiB" else 1)
        field = Settings.model_fields.get(name.lower())
        true = field.default if field is not None else float(constants()[name])
        if said != true:
            wrong.append(f"{name} is {true}, not {said}")
    assert not wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_named_setting_is_there(path: Path) -> None:
    known = {name.upper() for name in Settings.model_fields} | constants().keys()
    named = {match for word in words_in_backticks(path) for match in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", word)}
    named -= OTHER_CAPITALS | {test_name for test_name in named if (FOLDER / f"{test_name}.md").exists()}
    assert not named - known


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_named_call_is_there(path: Path) -> None:
    patterns = [
        re.compile(re.sub(r"\\{\w+\\}", "[^/ ]+", re.escape(address)) + r"(?:\?\S*)?") for address in openapi()["paths"]
    ]
    patterns += [re.compile(re.escape(address)) for address in ("/docs", "/openapi.json", "/static/swagger-ui/")]
    unknown = []
    for word in words_in_backticks(path):
        match = re.fullmatch(r"(?:(?:GET|POST|HEAD) )?(/(?:api|docs|openapi|healthz|readyz|metrics|static)\S*)", word)
        if match and not any(pattern.fullmatch(match.group(1)) for pattern in patterns):
            unknown.append(word)
    assert not unknown


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_internal_link_resolves(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_index_names_every_document() -> None:
    text = (FOLDER / "INDEX.md").read_text(encoding="utf-8")
    linked = {(FOLDER / target).resolve() for target in re.findall(r"\]\(([^)\s#]+)\)", text)}
    assert {path.resolve() for path in DOCUMENTS} - linked == {(FOLDER / "INDEX.md").resolve()}
    assert set(NAMES) <= {path.stem for path in FOLDER.glob("*.md")}


def test_every_module_has_its_room_in_the_architecture() -> None:
    named = set(words_in_backticks(FOLDER / "ARCHITECTURE.md"))
    assert {path.name for path in PROJECT.glob("*.py")} - named == set()


def test_the_changelog_knows_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert config.VERSION in versions


def test_the_contributors_guide_fits_on_a_page() -> None:
    assert len((PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 66


# -- risks ---------------------------------------------------------------------------------------------------------

ANSWERS = ("prevented", "bounded", "out of scope", "open")


def risk_answers() -> dict[str, dict[str, list[str]]]:
    """Per subject of POTENTIAL_ISSUES: risk -> [answer, how]."""
    text = (FOLDER / "POTENTIAL_ISSUES.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        rows = table_rows(section)
        if rows:
            found[section.splitlines()[0].strip()] = {row[0]: row[1:] for row in rows}
    return found


def listed_risks() -> dict[str, list[str]]:
    """The operators' list where it is at hand, else the subjects that the document itself names."""
    source = PROJECT.parent / "shared" / "risks.md"
    if not source.exists():
        text = (FOLDER / "POTENTIAL_ISSUES.md").read_text(encoding="utf-8")
        subjects = re.search(r"^Subjects: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
        assert subjects is not None
        return {subject.strip(): [] for subject in " ".join(subjects.group(1).split()).split("·")}
    listed = {}
    for subject, risks in re.findall(r"^\*\*(.+?)\.\*\* (.+?)\.?$", source.read_text(encoding="utf-8"), re.MULTILINE):
        listed[subject] = [risk.strip() for risk in risks.split(" · ")]
    return listed


def test_every_risk_has_an_answer() -> None:
    answered = risk_answers()
    listed = listed_risks()
    assert list(answered) == list(listed)
    for subject, risks in listed.items():
        assert [risk for risk in risks if risk not in answered[subject]] == [], subject
    for subject, rows in answered.items():
        for risk, (answer, how) in rows.items():
            assert answer in ANSWERS, f"{subject}: {risk}"
            assert how, f"{subject}: {risk}"


def test_what_is_prevented_names_the_test_that_shows_it() -> None:
    silent = [
        f"{subject}: {risk}"
        for subject, rows in risk_answers().items()
        for risk, (answer, how) in rows.items()
        if answer == "prevented" and not re.search(r"`(test_|tests/)\w+\.py", how)
    ]
    assert not silent


# -- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_block_can_be_read(path: Path) -> None:
    """Shell by bash -n, Python by compiling, JSON by parsing, settings by the code that reads them."""
    for block in blocks(path):
        where = f"{path.name}:{block.line}"
        assert block.language in ("bash", "python", "json", "ini", "text"), f"{where}: say what language it is"
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), where
        elif block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "ini":
            assert_settings(block.text, where)


def assert_settings(text: str, where: str) -> None:
    """Lines of `.env` that the server takes."""
    given = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    unknown = [name for name in given if name.lower() not in Settings.model_fields]
    assert not unknown, where
    values: dict[str, Any] = {}
    for name, value in given.items():
        is_list = Settings.model_fields[name.lower()].annotation not in (str, int, float, bool, Path)
        values[name.lower()] = json.loads(value) if is_list and value.startswith("[") else value
    try:
        Settings(_env_file=None, **values)  # type: ignore[call-arg]
    except ValidationError as error:
        raise AssertionError(f"{where}: {error}") from None


def test_few_blocks_of_the_readme_are_not_run_and_each_says_why() -> None:
    shell = [block for block in blocks(PROJECT / "README.md") if block.language == "bash"]
    not_run = [block for block in shell if block.comment.startswith(NOT_RUN)]
    assert len(not_run) * 3 <= len(shell)
    assert all(block.comment.removeprefix(NOT_RUN).strip() for block in not_run)


class Newcomer:
    """Someone who pastes the README's blocks into terminals, one after the other, in a fresh copy."""

    def __init__(self, copy: FreshCopy) -> None:
        self.copy = copy
        self.environment = copy.environment(SERVER_PORT=str(copy.port))
        self.left: list[subprocess.Popen[str]] = []
        self.shown = ""

    def paste(self, block: Block) -> str:
        """Run the block as it stands but for the port; what it shows. A failing line fails the block."""
        text = block.text.replace(PORT, f"localhost:{self.copy.port}")
        if block.language == "python":
            argv = [sys.executable, "-c", text]
        else:
            # What a block sets stays set in the same terminal.
            argv = ["bash", "-euo", "pipefail", "-c", f"set -a\n{text}\nenv -0 >.terminal"]
        if block.comment == STOPPED:
            self.go_home()
        if block.comment == STAYS:
            return self._leave_running(argv, text)
        done = subprocess.run(
            argv,
            cwd=self.copy.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"README.md:{block.line}:\n{block.text}\n{done.stdout}\n{done.stderr}"
        terminal = self.copy.folder / ".terminal"
        if terminal.exists():
            pairs = (pair.partition("=") for pair in terminal.read_text().split("\0") if pair)
            self.environment = {name: value for name, _, value in pairs}
            terminal.unlink()
        self._let_jobs_end()
        self.shown = done.stdout
        return done.stdout

    def _leave_running(self, argv: list[str], text: str) -> str:
        log = self.copy.folder / "newcomer.log"
        with open(log, "a") as target:
            process = subprocess.Popen(
                argv,
                cwd=self.copy.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                text=True,
                start_new_session=True,
            )
        self.left.append(process)

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return (self.copy.folder / "fleet.env").exists() if "tests.fleet" in text else self._ready()

        wait_until(up, 60, f"{text} to be up")
        return ""

    def _ready(self) -> bool:
        try:
            return requests.get(f"{self.copy.url}/readyz", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def _let_jobs_end(self) -> None:
        """A person pauses between two pastes: jobs of the README end by then."""
        headers = {"Authorization": "Bearer mytoken"}
        try:
            answer = requests.get(f"{self.copy.url}/api/jobs", headers=headers, timeout=5)
        except requests.ConnectionError:
            return
        if answer.status_code == 200:
            wait_until(
                lambda: all(
                    job["status"] in FINAL
                    for job in requests.get(f"{self.copy.url}/api/jobs", headers=headers, timeout=5).json()["jobs"]
                ),
                60,
                "the README's jobs to end",
            )

    def go_home(self) -> None:
        """Ctrl-C in every terminal, the last one first."""
        for process in reversed(self.left):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(30)
        self.left.clear()
        wait_until(lambda: not self.copy.left_running(), 30, "nothing to be left running")


@pytest.fixture(scope="module")
def copy() -> Iterator[FreshCopy]:
    with FreshCopy() as fresh:
        fresh.make_environment()
        yield fresh


@pytest.fixture
def newcomer(copy: FreshCopy) -> Iterator[Newcomer]:
    person = Newcomer(copy)
    try:
        yield person
    finally:
        person.go_home()


FLEET_HEADING = "Eight SSH nodes on one machine"


def to_run(fleet: bool) -> list[Block]:
    """The README's blocks that are run, those about the fleet or the others."""
    return [
        block
        for block in blocks(PROJECT / "README.md")
        if block.language in ("bash", "python")
        and not block.comment.startswith(NOT_RUN)
        and (block.heading == FLEET_HEADING) == fleet
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README uses curl")
def test_a_newcomer_can_follow_the_readme_from_top_to_bottom(newcomer: Newcomer) -> None:
    shown = {}
    for block in to_run(fleet=False):
        output = newcomer.paste(block)
        assert '"request_id"' not in output or "/api/events/" in block.text, f"an error is shown: {output}"
        shown[block.text] = output

    def output_of(part: str) -> str:
        (found,) = [output for text, output in shown.items() if part in text]
        return found

    assert "status: completed" in output_of("bash quickstart.sh\n")
    assert "has stopped" in output_of("quickstart.sh --stop")
    assert "Token for myuser (user) created" in output_of("create myuser mytoken")
    assert json.loads(output_of('-F "code=@solution.py"'))["status"] == "pending"
    decoder = json.JSONDecoder()
    reading = output_of("/api/status/$JOB_ID")
    status, end = decoder.raw_decode(reading)
    results = decoder.raw_decode(reading, reading.rindex('{"job_id"'))[0]
    assert (status["status"], results["status"], results["exit_code"]) == ("completed", "completed", 0)
    assert "the squares below 1,000 add up to 332,833,500" in reading[end : reading.rindex('{"job_id"')]
    records, events = output_of("/api/events/$JOB_ID").rsplit("\n", 1)
    assert [json.loads(record)["n"] for record in records.splitlines()] == [1_000, 1_000_000]
    assert [event["event"] for event in json.loads(events)["events"]] == [
        "submitted",
        "claimed",
        "started",
        "completed",
    ]
    assert json.loads(output_of("/api/cancel/$JOB_ID"))["status"] == "cancelled"
    assert output_of("import requests") == "completed 0 [{'score': 0.93}]\n"
    assert "the squares below 1,000 add up to 332,833,500" in output_of("gpuq.py run")
    tokens = output_of("create boss --admin")
    assert "Token for boss (admin) created" in tokens
    assert "The token of alice is revoked." in tokens
    assert "1 of 1 fit." in output_of("python3 main.py check")
    assert "Restored from backup-1." in output_of("python3 main.py restore")
    (serve,) = [block for block in to_run(fleet=False) if block.text == "python3 main.py\n"]
    newcomer.paste(serve)
    headers = {"Authorization": "Bearer mytoken"}
    kept = requests.get(f"{newcomer.copy.url}/api/jobs", headers=headers, timeout=10).json()["jobs"]
    assert [job["status"] for job in kept] == ["completed", "completed", "cancelled", "completed"], (
        "what was backed up is there"
    )
    newcomer.paste(next(block for block in blocks(PROJECT / "README.md") if '-F "code=@solution.py"' in block.text))
    newest = requests.get(f"{newcomer.copy.url}/api/jobs?limit=1", headers=headers, timeout=10).json()["jobs"][0]
    assert newest["job_id"] not in [job["job_id"] for job in kept]
    assert newest["status"] == "completed", "after a restore jobs run again"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_newcomer_gets_eight_ssh_nodes_on_one_machine(newcomer: Newcomer) -> None:
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    for block in to_run(fleet=True):
        output = newcomer.paste(block)
        if "check" in block.text:
            assert "8 of 8 fit." in output
    listed = requests.get(f"{newcomer.copy.url}/api/nodes", timeout=10).json()["nodes"]
    assert [node["node_id"] for node in listed] == [f"node-{number}" for number in range(1, 9)]


def test_the_unit_for_systemd_lets_jobs_survive_a_restart() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(PROJECT / "deploy" / "gpu-job-server.service")
    service = unit["Service"]
    assert (service["KillMode"], service["Restart"], service["OOMPolicy"]) == ("process", "always", "continue")
    assert service["ExecStart"].split()[-1] == f"{service['WorkingDirectory']}/main.py"
