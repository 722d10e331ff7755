"""The shape of the code: which module may import which, who writes where, what is never used."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parent.parent

# A module imports only from rows above its own. A new module gets its place here.
ROWS = (
    ("gpuq", "attacks", "errors", "states", "clock", "failpoints", "forecast", "logs", "results", "node_agent"),
    ("config", "estimates", "models", "metrics", "wakeups", "verdict", "sqlite_files"),
    ("database", "storage"),
    ("backup", "audit"),
    ("queue_manager",),
    ("auth", "rate_limiter"),
    ("token_manager", "submission"),
    ("executor",),
    ("nodes", "drill"),
    ("ssh_executor", "local_executor", "history"),
    ("worker", "maintenance", "gauges"),
    ("schemas", "answers"),
    ("problems", "downloads", "live", "pages"),
    ("stream", "direct"),
    ("services",),
    ("job_routes", "cluster_routes"),
    ("dashboard_routes",),
    ("api",),
    ("main",),
)
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}


def row_of(module: str) -> int:
    """The module's row; the last one while it has none, which one test below says."""
    return ROW_OF.get(module, len(ROWS) - 1)


CONCRETE_EXECUTORS = {"ssh_executor", "local_executor", "slurm_executor"}
BESIDE = {"tests", "benchmarks"}  # packages that are not the product; it imports neither
AGENT = PROJECT / "node_agent" / "agent.py"
MIGRATIONS = sorted((PROJECT / "migrations").rglob("*.py"))


def files() -> dict[str, Path]:
    """Every module of the product by its name."""
    found = {path.stem: path for path in PROJECT.glob("*.py")}
    for package in PROJECT.glob("*/__init__.py"):
        if package.parent.name not in BESIDE:
            found[package.parent.name] = package
    return found


FILES = files()
# What runs as the product: the modules, what is inside their packages, and the migrations.
PRODUCT = sorted(
    {
        *FILES.values(),
        *(inner for path in FILES.values() if path.name == "__init__.py" for inner in path.parent.rglob("*.py")),
        *MIGRATIONS,
    }
)


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Everything in the file's syntax tree; the module itself comes first."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, first word of the module's name) of every import, wherever it stands."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield node.lineno, (node.module or "").split(".")[0]


def ours(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    return {name for _, name in imports(path) if name in FILES}


def docstring(path: Path) -> str:
    module = nodes(path)[0]
    assert isinstance(module, ast.Module)
    return " ".join((ast.get_docstring(module) or "").split())


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    """The last word of what is called: `run` for `subprocess.run(…)`."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


# -- who imports whom ----------------------------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_rows() -> None:
    assert sorted(ROW_OF) == sorted(FILES), "each module needs one place in ROWS"
    assert len(ROW_OF) == sum(len(row) for row in ROWS), "a module stands in two rows"


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    wrong = {name for name in ours(FILES[module]) if row_of(name) >= row_of(module)}
    assert not wrong, f"{module} (row {row_of(module)}) imports {sorted(wrong)}"


def test_nothing_imports_main() -> None:
    assert [name_of(path) for path in PRODUCT if "main" in ours(path)] == []


def test_the_product_imports_neither_tests_nor_benchmarks() -> None:
    assert [name_of(path) for path in PRODUCT for _, name in imports(path) if name in BESIDE] == []


def test_only_main_names_concrete_executors() -> None:
    assert [name_of(path) for path in PRODUCT if ours(path) & CONCRETE_EXECUTORS] == ["main.py"]


def test_executors_know_nothing_of_queue_and_database() -> None:
    for module in ("executor", *(CONCRETE_EXECUTORS & set(FILES))):
        assert ours(FILES[module]) <= {"errors", "config", "executor", "node_agent"}, module


def test_migrations_import_only_models() -> None:
    assert MIGRATIONS
    for path in MIGRATIONS:
        assert ours(path) <= {"models"}, name_of(path)


def test_revisions_build_the_schema_from_their_own_text() -> None:
    # A revision that reads `models` would build something else each time they change.
    for path in MIGRATIONS:
        if path.parent.name == "versions":
            assert ours(path) == set(), name_of(path)


# -- what the docstrings promise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_every_module_says_what_lives_there(path: Path) -> None:
    assert len(docstring(path)) >= 5


def promised(module: str) -> set[str]:
    """The modules that the docstring's "May import …" allows."""
    text = docstring(FILES[module])
    found = re.search(r"\b[Mm]ay import (.+?)(?:\.(?:\s|$)|;)", text)
    assert found is not None, f"{module}: no “May import …” in the docstring"
    sentence = found.group(1)
    if sentence == "nothing of the project":
        return set()
    names = set(re.findall(r"`(\w+)`", sentence))
    assert names <= set(FILES), f"{module}: no such module: {sorted(names - set(FILES))}"
    if sentence.startswith("everything but "):
        if "the concrete executors" in sentence or "knows no concrete executor" in text:
            names |= CONCRETE_EXECUTORS
        return set(FILES) - names
    assert names, f"{module}: {sentence!r} names nothing"
    return names


@pytest.mark.parametrize("module", sorted(set(FILES) - {"main"}))
def test_what_the_docstring_says_of_imports_is_true(module: str) -> None:
    assert ours(FILES[module]) <= promised(module)


def test_a_docstring_promises_no_import_that_the_rows_forbid() -> None:
    for module in set(FILES) - {"main"}:
        if "everything but" in docstring(FILES[module]):
            continue
        wrong = {name for name in promised(module) if row_of(name) >= row_of(module)}
        assert not wrong, f"{module} claims {sorted(wrong)}"


# -- the node agent ------------------------------------------------------------------------------------------------


def test_the_agent_imports_only_the_standard_library() -> None:
    assert {name for _, name in imports(AGENT)} <= set(sys.stdlib_module_names)


def test_the_agent_parses_as_python_3_8() -> None:
    ast.parse(AGENT.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_the_agent_uses_no_library_newer_than_python_3_8() -> None:
    newer = {"zoneinfo", "graphlib", "tomllib"}
    assert not newer & {name for _, name in imports(AGENT)}
    methods = {"removeprefix", "removesuffix", "pidfd_open", "randbytes"}
    used = {node.attr for node in nodes(AGENT) if isinstance(node, ast.Attribute)}
    guarded = {"pidfd_open"} if 'hasattr(os, "pidfd_open")' in AGENT.read_text(encoding="utf-8") else set()
    assert not (methods - guarded) & used


def test_the_server_never_imports_the_agent_itself() -> None:
    for path in PRODUCT:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module == "node_agent":
                assert "agent" not in {name.name for name in node.names}, name_of(path)
            if isinstance(node, ast.ImportFrom):
                assert node.module != "node_agent.agent", name_of(path)
            if isinstance(node, ast.Import):
                assert "node_agent.agent" not in {name.name for name in node.names}, name_of(path)


# -- one place for every change of a job ---------------------------------------------------------------------------

JOB_TABLES = {"jobs", "job_events", "job_inputs"}
_WRITES = re.compile(
    r"\b(?:INSERT(?:\s+OR\s+\w+)?\s+INTO|REPLACE\s+INTO|UPDATE(?:\s+OR\s+\w+)?|DELETE\s+FROM|DROP\s+TABLE|ALTER\s+TABLE)"
    r"\s+[\"'`]?(?:jobs|job_events|job_inputs)\b",
    re.IGNORECASE,
)
# A restore raises the epochs in a copy that no server has open, so that nothing from before it matches any more.
OFFLINE = {"backup.py": ["UPDATE jobs SET epoch = epoch + ?"]}


def writes_to_jobs(path: Path) -> list[str]:
    """Statements that change the tables of jobs: SQLAlchemy's, and SQL as text."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Call) and re.search(r"insert|update|delete", called(node)):
            targets = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
            for target in targets:
                name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
                if name in JOB_TABLES:
                    found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _WRITES.search(node.value):
            found.append(node.value)
    return found


def test_only_the_queue_manager_writes_to_the_tables_of_jobs() -> None:
    found = {path.name: writes_to_jobs(path) for path in PRODUCT if "migrations" not in path.parts}
    assert found.pop("queue_manager.py"), "the search finds no write where they all are"
    assert {name: writes for name, writes in found.items() if writes} == {
        name: writes for name, writes in OFFLINE.items() if name in found
    }


def test_the_search_for_writes_finds_each_way_to_write(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            "update(jobs).values(state='x')",
            "connection.execute(insert(models.job_events), {})",
            "sqlite_insert(jobs).on_conflict_do_nothing()",
            "delete(job_events)",
            "jobs.update().values(a=1)",
            "text('update jobs set state = 1')",
            "c.execute('INSERT OR REPLACE INTO job_events VALUES (1)')",
        )
    ):
        path = tmp_path / f"module{number}.py"
        path.write_text(text)
        assert writes_to_jobs(path), text
    path = tmp_path / "reader.py"
    path.write_text("select(jobs); registry.update(jobs=1); digest.update(block); 'UPDATE nodes SET a = 1'")
    assert not writes_to_jobs(path)


# -- what is never used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_bare_except_and_no_silent_one(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: bare except"
            broad = {"Exception", "BaseException"} & {
                part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)
            }
            silent = all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
            assert not (broad and silent), f"{name_of(path)}:{node.lineno}: every error is swallowed"
        if isinstance(node, ast.Call) and called(node) == "suppress":
            named = {part.id for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Name)}
            assert not named & {"Exception", "BaseException"}, (
                f"{name_of(path)}:{node.lineno}: every error is swallowed"
            )


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_goes_through_a_shell_or_is_evaluated(path: Path) -> None:
    for call in calls(path):
        where = f"{name_of(path)}:{call.lineno}"
        for keyword in call.keywords:
            assert keyword.arg != "shell" or ast.unparse(keyword.value) == "False", f"{where}: shell"
        if isinstance(call.func, ast.Name):
            assert call.func.id not in {"eval", "exec", "__import__"}, where
        assert ast.unparse(call.func) not in {
            *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
            *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "marshal.loads"),
            *("paramiko.AutoAddPolicy", "paramiko.WarningPolicy", "tempfile.mktemp"),
        }, where


def test_no_module_is_called_utils() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & set(FILES)


# -- requirements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-client.txt", "requirements-bench.txt"]
)
def test_every_requirement_is_pinned(name: str) -> None:
    lines = [line.split("#")[0].strip() for line in (PROJECT / name).read_text(encoding="utf-8").splitlines()]
    pinned = re.compile(
        r"[A-Za-z0-9._-]+(?:\[[a-z,]+\])?==[0-9][0-9A-Za-z.]*(?:; python_version (?:>=|<) \"3\.[0-9]+\")?"
    )
    found = 0
    for line in filter(None, lines):
        if line.startswith("-r "):
            assert (PROJECT / line[3:]).is_file()
            continue
        assert pinned.fullmatch(line), line
        found += 1
    assert found >= 3


def locked(name: str) -> list[Requirement]:
    """The packages of a lock file. Fails where one is not pinned, or has no hash."""
    text = (PROJECT / name).read_text(encoding="utf-8")
    assert not re.search(r"^\s*-(?!-hash=sha256:[0-9a-f]{64})|://", text, re.MULTILINE), "pins and hashes, no index"
    entries = re.sub(r"\s+#.*|^#.*", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found = []
    for entry in filter(str.strip, entries):
        pin, *hashes = entry.split("--hash=")
        assert hashes, pin
        found.append(Requirement(pin))
        assert [specifier.operator for specifier in found[-1].specifier] == ["=="], pin
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    ("lock", "names"),
    [
        ("requirements.lock", ["requirements.txt"]),
        ("requirements-dev.lock", ["requirements.txt", "requirements-client.txt", "requirements-dev.txt"]),
    ],
)
def test_the_locks_hold_what_is_required_for_every_python(lock: str, names: list[str], python: str) -> None:
    where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}

    def chosen(requirements: list[Requirement]) -> dict[str, str]:
        fitting = [found for found in requirements if found.marker is None or found.marker.evaluate(where)]
        pins = {str(canonicalize_name(found.name)): str(found.specifier) for found in fitting}
        assert len(pins) == len(fitting), "each package once"
        return pins

    asked = [
        Requirement(line)
        for name in names
        for line in (PROJECT / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "-r "))
    ]
    pins = chosen(locked(lock))
    assert chosen(asked).items() <= pins.items(), "run: bash deploy/lock.sh"
    assert chosen(locked("requirements.lock")).items() <= chosen(locked("requirements-dev.lock")).items()


def test_an_altered_package_is_not_installed(tmp_path: Path) -> None:
    """deploy/venv.sh with an index of one package, and a lock that first holds another hash than its file has."""
    venv.create(tmp_path / ".venv")
    (packages,) = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # pip
    wheel = tmp_path / "altered-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("altered.py", "")
        about = "altered-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: altered\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", f"altered.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")

    def install(digest: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "requirements.lock").write_text(f"altered==1.0 \\\n    --hash=sha256:{digest}\n")
        return subprocess.run(
            ["bash", "-c", f". {PROJECT}/deploy/venv.sh; ensure_venv requirements.txt"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    refused = install("0" * 64)
    assert refused.returncode == 1
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not list(packages.glob("altered*"))
    done = install(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert (packages / "altered.py").exists()


def test_everything_the_product_imports_is_a_requirement() -> None:
    provided_by = {
        "yaml": "pyyaml",
        "python_multipart": "python-multipart",
        "pydantic_settings": "pydantic-settings",
        "sqlalchemy": "sqlalchemy",
        # Parts of what is required: FastAPI is made of Starlette, which brings anyio.
        "starlette": "fastapi",
        "anyio": "fastapi",
        "prometheus_client": "prometheus-client",
        "limits": "slowapi",  # which is made of it
    }

    def required_by(name: str) -> set[str]:
        text = (PROJECT / name).read_text(encoding="utf-8").lower()
        return {line.split("==")[0] for line in text.splitlines() if "==" in line}

    for path in PRODUCT:
        required = required_by("requirements-client.txt" if path.name == "gpuq.py" else "requirements.txt")
        for line, name in imports(path):
            if name not in sys.stdlib_module_names and name not in FILES:
                assert provided_by.get(name, name) in required, f"{name_of(path)}:{line}: {name}"
