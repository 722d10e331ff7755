"""Every setting: name, default, one line of help. Read once at the start and never changed afterwards.

Each setting can be overridden by an environment variable or a line in `.env` of the same name (upper case).
Relative paths are relative to this folder, so that the command lines mean the same files from anywhere.
May import only `errors`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from errors import ConfigurationError

PROJECT_DIR = Path(__file__).resolve().parent
VERSION = "1.0.0"
TOKEN_MAX_DAYS = 30  # a promise of the interface, so not a setting

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class NodeConfig(BaseModel):
    """One entry of GPU_NODES."""

    model_config = ConfigDict(extra="forbid")

    host: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    user: str | None = None
    key_file: str | None = None
    gpus: list[Annotated[int, Field(ge=0)]] | None = None
    jump: str | None = None


class Settings(BaseSettings):
    """The settings of one server. Units stand in the help text."""

    model_config = SettingsConfigDict(
        env_file=PROJECT_DIR / ".env", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    # The server
    # The promised default; every call that matters needs a token.
    server_host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104
    server_port: int = Field(8001, ge=1, le=65535, description="Port to listen on.")
    database_url: str = Field("sqlite:///database.db", description="SQLAlchemy URL of the database.")
    jobs_dir: Path = Field(Path("jobs"), description="Folder of the jobs' files and results.")
    token_key_file: Path = Field(
        Path("token.key"),
        description="File of the key with which token digests are made; made at first use, mode 0600.",
    )
    min_free_disk: int = Field(
        1 << 30, ge=0, description="Bytes that must be free in JOBS_DIR for submissions to be taken."
    )
    retention_days: int = Field(
        365, ge=0, description="Days after its end that a job's code, output, results and row are kept; 0: for ever."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines to read, or as JSON objects with request, job and node."
    )

    # Nodes
    gpu_node_host: str = Field(
        "", description="Host of the GPU nodes; `{i}` becomes the node's number. Empty: jobs run on this machine."
    )
    gpu_node_user: str = Field("", description="Login on the nodes; empty: what `~/.ssh/config` or the own name says.")
    num_gpu_nodes: int = Field(8, ge=1, le=1024, description="Number of nodes (or slots on this machine).")
    gpu_nodes: list[NodeConfig] = Field(
        default_factory=list,
        description="Where nodes differ: JSON list of `{host, port, user, key_file, gpus, jump}`.",
    )
    ssh_key_file: str = Field("", description="Private key for the nodes; empty: the SSH agent and the usual files.")
    ssh_known_hosts: str = Field("~/.ssh/known_hosts", description="Host keys that are accepted.")
    ssh_config_file: str = Field("~/.ssh/config", description="OpenSSH client configuration that is honoured.")
    ssh_connect_timeout: Seconds = Field(10, description="Seconds for each step of a connection to a node.")
    node_python: str = Field("python3", min_length=1, description="Python (3.8 or newer) on the nodes.")
    node_dir: str = Field(
        ".gpu-job-server",
        min_length=1,
        description="Folder on a node for the agent and attempts; relative to its home.",
    )
    node_ping_interval: Seconds = Field(3, description="Seconds between signs of life asked of a node.")
    node_ping_timeout: Seconds = Field(9, description="Seconds of silence after which a connection is given up.")
    node_probe_interval: Seconds = Field(30, description="Seconds between looks at a node's GPU, disk and load.")
    node_min_free_disk: int = Field(
        1 << 30, ge=0, description="Bytes that must be free on a node for it to be given work."
    )
    node_idle_gpu_memory: int = Field(
        1024,
        ge=0,
        description="MiB in use on a GPU without a job, as by its driver, above which a node gets no work (on this "
        "machine: more than before the job); 0: any.",
    )
    quarantine_after: int = Field(
        3, ge=1, description="Infrastructure failures in a row after which a node is given no work for a while."
    )
    quarantine_seconds: Seconds = Field(
        60, description="Seconds of the first quarantine; doubled each time, up to an hour; a good look ends it."
    )
    node_lost_after: Seconds = Field(
        900, description="Seconds out of reach after which a node has ended its job and the job is run elsewhere."
    )

    # Jobs
    job_command: str = Field(
        "{python} -u {code}",
        description="A job's command: {python} {code} {results} {job_id} {user_id} {competition_id} {project_id}.",
    )
    prestart: bool = Field(
        True,
        description="Start the next job's Python before the job comes; only with the default JOB_COMMAND.",
    )
    job_python: str = Field(
        "",
        description="Interpreter for jobs; empty: NODE_PYTHON on a node, the server's own interpreter on this machine.",
    )
    max_expected_time: float = Field(
        86400, ge=1, allow_inf_nan=False, description="Largest `expected_time` of a job, in seconds."
    )
    max_job_timeout_multiplier: float = Field(
        2, ge=1, allow_inf_nan=False, description="A job may run `expected_time` times this before it is ended."
    )
    kill_grace: Seconds = Field(5, description="Seconds between SIGTERM and SIGKILL.")
    max_infra_retries: int = Field(2, ge=0, description="How often a job is run again after an infrastructure failure.")
    max_code_bytes: Bytes = Field(10 << 20, description="Largest `code` part, in bytes.")
    max_output_bytes: Bytes = Field(64 << 20, description="Bytes of stdout, and of stderr, that are kept per job.")
    max_result_bytes: Bytes = Field(1 << 30, description="Largest results file, in bytes.")
    max_result_line_bytes: Bytes = Field(16 << 20, description="Longest line of a results file, in bytes.")
    max_processes: Count = Field(1024, description="Processes and threads a job may have (RLIMIT_NPROC).")
    max_open_files: Count = Field(4096, description="Files a job's process may hold open (RLIMIT_NOFILE).")
    max_file_bytes: Bytes = Field(64 << 30, description="Largest file a job may write, in bytes (RLIMIT_FSIZE).")
    max_job_memory: int = Field(
        0, ge=0, description="Memory a job may use, in bytes, where a control group can hold it; 0: no limit."
    )
    check_syntax: bool = Field(False, description="Refuse code with a syntax error (400) instead of running it.")

    # Containment
    sandbox: Literal["auto", "required", "off"] = Field(
        "auto", description="bubblewrap on nodes: used where it works, required, or not used."
    )
    job_network: Literal["none", "host"] = Field("none", description="Network of a sandboxed job.")
    sandbox_binds: list[str] = Field(
        default_factory=list,
        description="JSON list of further paths of a node that sandboxed jobs may read (datasets, CUDA, environments).",
    )

    # Limits
    max_active_jobs: int = Field(1, ge=1, le=64, description="Pending and running jobs a user may have at once.")
    submits_per_minute: Count = Field(5, description="Submissions a user may make in any 60 seconds.")
    login_failures_per_minute: Count = Field(
        30, description="Refused tokens per client address and minute before further ones are slowed with 429."
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="JSON list of addresses whose X-Forwarded-For is believed; empty: nobody's.",
    )
    tls_cert_file: str = Field("", description="Certificate chain (PEM) to serve HTTPS with; empty: plain HTTP.")
    tls_key_file: str = Field("", description="Private key (PEM) of TLS_CERT_FILE.")
    request_body_timeout: Seconds = Field(30, description="Seconds within which a request's body must arrive.")
    submit_default_wait: float = Field(
        0, ge=0, allow_inf_nan=False, description="Seconds a submission waits for the job's end when it does not say."
    )
    submit_max_wait: float = Field(
        14400, ge=0, allow_inf_nan=False, description="Most seconds a submission may wait for the job's end."
    )

    @field_validator("jobs_dir", "token_key_file", mode="after")
    @classmethod
    def _below_project(cls, value: Path) -> Path:
        return (PROJECT_DIR / value.expanduser()).resolve()

    @field_validator(
        "ssh_key_file", "ssh_known_hosts", "ssh_config_file", "tls_cert_file", "tls_key_file", mode="after"
    )
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return os.path.expanduser(value) if value else value

    @field_validator("database_url", mode="after")
    @classmethod
    def _absolute_sqlite(cls, value: str) -> str:
        prefix = "sqlite:///"
        if not value.startswith(prefix):
            raise ValueError("only sqlite:///PATH is supported by this version")
        path = value[len(prefix) :]
        if not path or path.startswith(":memory:"):
            raise ValueError("a database in memory would lose jobs; give a file, such as sqlite:///database.db")
        return prefix + str((PROJECT_DIR / Path(path).expanduser()).resolve())

    @field_validator("job_command", mode="after")
    @classmethod
    def _known_words(cls, value: str) -> str:
        split_job_command(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.node_ping_timeout <= self.node_ping_interval:
            raise ValueError("NODE_PING_TIMEOUT must be larger than NODE_PING_INTERVAL")
        if self.node_lost_after <= self.node_ping_timeout + self.kill_grace:
            raise ValueError("NODE_LOST_AFTER must be larger than NODE_PING_TIMEOUT and KILL_GRACE together")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("TLS_CERT_FILE and TLS_KEY_FILE must be set together")
        for name in ("tls_cert_file", "tls_key_file"):
            path = getattr(self, name)
            if path and not os.access(path, os.R_OK):
                raise ValueError(f"{name.upper()}: {path} cannot be read")
        for address in self.trusted_proxies:
            try:
                ipaddress.ip_network(address, strict=False)
            except ValueError:
                raise ValueError(f"TRUSTED_PROXIES: {address!r} is no address or network") from None
        if self.submit_default_wait > self.submit_max_wait:
            raise ValueError("SUBMIT_DEFAULT_WAIT must not be larger than SUBMIT_MAX_WAIT")
        return self

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return Path(self.database_url.removeprefix("sqlite:///"))

    @property
    def results_dir(self) -> Path:
        """Where finished results are published."""
        return self.jobs_dir / "results"


JOB_COMMAND_WORDS = ("python", "code", "results", "job_id", "user_id", "competition_id", "project_id")


@lru_cache(maxsize=8)
def split_job_command(command: str) -> tuple[str, ...]:
    """The words of JOB_COMMAND, placeholders still in them. Raises ValueError with a sentence."""
    import shlex
    import string

    words = shlex.split(command)
    if not words:
        raise ValueError("JOB_COMMAND is empty")
    for word in words:
        for _, name, spec, conversion in string.Formatter().parse(word):
            if name is None:
                continue
            if name not in JOB_COMMAND_WORDS or spec or conversion:
                known = " ".join(f"{{{known}}}" for known in JOB_COMMAND_WORDS)
                raise ValueError(f"JOB_COMMAND has the unknown placeholder {{{name}}}; known are {known}")
    return tuple(words)


def _sentence(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"])
        name = path.split(".")[0].upper() + path[len(path.split(".")[0]) :] if path else ""
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{name}: {message}" if name else message)
    return "Wrong setting: " + "; ".join(problems) + ". See documentation/SETUP.md for all settings."


def load(**overrides: Any) -> Settings:
    """Read the settings from the environment and `.env`; `overrides` are for tests.

    Raises ConfigurationError with a sentence that names the setting.
    """
    from pydantic_settings import SettingsError

    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None
    except SettingsError as error:  # JSON of a list setting cannot be read
        name = str(error).split('"')[1].upper() if '"' in str(error) else "a list setting"
        raise ConfigurationError(f"Wrong setting: {name}: must be a JSON list.") from None


def unknown_names(env_file: Path | None = None) -> list[str]:
    """Sentences about lines in `.env` whose name is no setting but looks like one."""
    path = env_file or PROJECT_DIR / ".env"
    if not path.is_file():
        return []
    known = [name.upper() for name in Settings.model_fields]
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name = line.split("=", 1)[0].strip().removeprefix("export ").strip()
        if "=" not in line or name.startswith("#") or name.upper() in known:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        if near:
            found.append(f"{path}: {name} is no setting; did you mean {near[0]}?")
    return found


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process."""
    return load()


def settings_table() -> str:
    """The settings as a Markdown table; documentation/SETUP.md holds it, a test keeps it true."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = {"": "(empty)", "[]": "(empty list)"}.get(str(default), str(default))
        rows.append(f"| `{name.upper()}` | `{shown}` | {field.description} |")
    return "\n".join(rows) + "\n"
