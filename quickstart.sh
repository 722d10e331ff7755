#!/usr/bin/env bash
# From a fresh clone to a finished job: makes .venv, starts the server, submits examples/solution.py, shows its result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: bash quickstart.sh            start the server if it isn't running, and run an example job on it
       bash quickstart.sh --stop     stop the server that this script started
       bash quickstart.sh --help     this text

Needs Python 3.10 or newer and curl; root is not needed. Settings come from the environment and from .env:
SERVER_PORT=8002 bash quickstart.sh takes another port. Jobs run on this machine unless GPU nodes are set.
It writes only into this folder: .venv, .server.pid, server.log, .quickstart_token and what the server keeps.
TEXT
}

ROOT=$PWD
PID_FILE=.server.pid
LOG=server.log
TOKEN_FILE=.quickstart_token
START_SECONDS=60
JOB_SECONDS=300
. deploy/venv.sh

say() { printf '%s\n' "$@"; }
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# A setting as the server will see it: the environment, then .env, then the default.
setting() {
    local name=$1 value=${!1:-}
    if [ -z "$value" ] && [ -f .env ]; then
        value=$(sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$name[[:space:]]*=[[:space:]]*//p" .env | tail -n 1)
        value=${value%%[[:space:]]#*}
        value=$(printf '%s' "$value" | tr -d "\"'\r" | sed 's/[[:space:]]*$//')
    fi
    printf '%s' "${value:-$2}"
}

PORT=$(setting SERVER_PORT 8001)
HOST=$(setting SERVER_HOST 0.0.0.0)
case $HOST in 0.0.0.0 | :: | '') HOST=localhost ;; *:*) HOST="[$HOST]" ;; esac
BASE=http://$HOST:$PORT

command_line() {
    if [ -r "/proc/$1/cmdline" ]; then
        tr '\0' ' ' <"/proc/$1/cmdline"
    else
        ps -p "$1" -o args= 2>/dev/null || true
    fi
}

# The pid of the server that this script started in this folder; nothing if it is gone or the number was reused.
our_pid() {
    local pid
    pid=$(cat "$PID_FILE" 2>/dev/null) || return 0
    case $pid in '' | *[!0-9]*) return 0 ;; esac
    case $(command_line "$pid") in "$ROOT/$VENV_PYTHON main.py"*) printf '%s' "$pid" ;; esac
}

stop_server() {
    local pid waited
    pid=$(our_pid)
    if [ -z "$pid" ]; then
        rm -f "$PID_FILE"
        say "No server of this script is running."
        return
    fi
    kill -TERM "$pid"
    for ((waited = 0; waited < 300; waited++)); do
        if [ -z "$(our_pid)" ]; then
            rm -f "$PID_FILE"
            say "The server (pid $pid) has stopped. What it keeps is still there; the next start goes on from it."
            return
        fi
        sleep 0.1
    done
    fail "The server (pid $pid) is still shutting down after 30 s; its log is $LOG. To end it at once: kill -9 $pid"
}

request() { curl --silent --show-error --max-time 30 "$@"; }
# The token goes through a file descriptor: on the command line, every user of this machine could read it.
authorized() { request -H @<(printf 'Authorization: Bearer %s' "$TOKEN") "$@"; }
http_code() { "$@" --output /dev/null --write-out '%{http_code}' 2>/dev/null || true; }

# field NAME: that member of the JSON object on standard input, or nothing.
field() {
    "$VENV_PYTHON" -c '
import json, sys
try:
    value = json.load(sys.stdin).get(sys.argv[1])
except (ValueError, AttributeError):
    value = None
print("" if value is None else value)' "$1"
}

is_our_service() { [ -n "$(request --max-time 5 "$BASE/" -H 'Accept: application/json' 2>/dev/null | field service)" ]; }
port_in_use() {
    "$VENV_PYTHON" -c 'import socket, sys; socket.create_connection((sys.argv[1].strip("[]"), int(sys.argv[2])), 2)' \
        "$HOST" "$PORT" 2>/dev/null
}

start_server() {
    local pid waited old_log=0
    if [ -z "$(our_pid)" ] && port_in_use; then
        is_our_service || fail \
            "Port $PORT is in use by another program." "Take another one: SERVER_PORT=8002 bash quickstart.sh"
        say "A server already answers at $BASE: using it."
        return
    fi
    if [ -n "$(our_pid)" ]; then
        say "The server is already running (pid $(our_pid))."
    else
        say "Starting the server at $BASE"
        [ ! -f "$LOG" ] || old_log=$(wc -l <"$LOG")
        if command -v setsid >/dev/null; then
            setsid "$ROOT/$VENV_PYTHON" main.py >>"$LOG" 2>&1 </dev/null &
        else
            nohup "$ROOT/$VENV_PYTHON" main.py >>"$LOG" 2>&1 </dev/null &
        fi
        pid=$!
        printf '%s\n' "$pid" >"$PID_FILE"
        disown "$pid"
    fi
    for ((waited = 0; waited < START_SECONDS * 10; waited++)); do
        [ "$(http_code request "$BASE/readyz")" != 200 ] || return 0
        # A moment to become the server: right after the fork it still has this script's command line.
        if [ "$waited" -gt 10 ] && [ -z "$(our_pid)" ]; then
            break
        fi
        sleep 0.1
    done
    say "The end of $LOG:" >&2
    tail -n "+$((old_log + 1))" "$LOG" | tail -n 20 >&2 || true
    if [ -z "$(our_pid)" ]; then
        rm -f "$PID_FILE"
        fail "" "The server did not start: the reason is above."
    fi
    request "$BASE/readyz" >&2 || true
    fail "The server runs (pid $(our_pid)) but is not ready at $BASE after $START_SECONDS s." \
        "If it uses another port: SERVER_PORT=… bash quickstart.sh. To stop it: bash quickstart.sh --stop"
}

get_token() {
    local output
    TOKEN=$(cat "$TOKEN_FILE" 2>/dev/null || true)
    if [ -n "$TOKEN" ] && [ "$(http_code authorized "$BASE/api/jobs?limit=1")" = 200 ]; then
        say "Using the token in $TOKEN_FILE"
        return
    fi
    output=$("$VENV_PYTHON" token_manager.py create student) || fail "$output" "No token could be made."
    TOKEN=$(printf '%s\n' "$output" | sed -n 's/^Token.*: \([^[:space:]]\{1,\}\)$/\1/p' | tail -n 1)
    [ -n "$TOKEN" ] || fail "token_manager.py printed no token."
    rm -f "$TOKEN_FILE"
    (umask 077 && printf '%s\n' "$TOKEN" >"$TOKEN_FILE")
    say "Made a token for the user \"student\"; it is in $TOKEN_FILE"
    [ "$(http_code authorized "$BASE/api/jobs?limit=1")" = 200 ] || fail \
        "The server at $BASE does not know that token: it keeps another database than this folder's." \
        "Take another port: SERVER_PORT=8002 bash quickstart.sh"
}

submit() {
    local answer reason
    answer=$(
        request -X POST "$BASE/api/submit" \
            -F "code=@examples/solution.py" \
            -F 'config_file=@-;type=application/json' <<EOF_CONFIG
{"competition_id": "demo", "project_id": "quickstart", "user_id": "student", "expected_time": 60, "token": "$TOKEN"}
EOF_CONFIG
    ) || fail "The job could not be submitted."
    JOB=$(printf '%s' "$answer" | field job_id)
    reason=$(printf '%s' "$answer" | field detail)
    [ -n "$JOB" ] || fail "The job was not accepted: ${reason:-$answer}"
    say "Submitted examples/solution.py as job $JOB"
}

await_job() {
    local answer status last="" waited
    for ((waited = 0; waited < JOB_SECONDS * 2; waited++)); do
        answer=$(authorized "$BASE/api/status/$JOB" || true)
        status=$(printf '%s' "$answer" | field status)
        if [ "$status" != "$last" ]; then
            say "  status: ${status:-$answer}"
            last=$status
        fi
        case $status in completed | failed | cancelled) return ;; esac
        sleep 0.5
    done
    fail "The job has not ended after $JOB_SECONDS s. See $BASE/api/events/$JOB (with the token) and $LOG"
}

case ${1:-} in
    '') ;;
    --help | -h) usage; exit 0 ;;
    --stop) stop_server; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

command -v curl >/dev/null || fail "curl is needed: on Debian and Ubuntu, apt-get install curl"
ensure_venv requirements.txt || exit 1
start_server
get_token
submit
await_job
say "" "The result (GET /api/results/$JOB):"
authorized "$BASE/api/results/$JOB" | "$VENV_PYTHON" -m json.tool --no-ensure-ascii
cat <<TEXT

The server:    $BASE
Its dashboard: $BASE/ in a browser; sign in with the token
Its interface: $BASE/docs
Its log:       $ROOT/$LOG
Your token:    $ROOT/$TOKEN_FILE
To stop it:    bash quickstart.sh --stop
TEXT
[ "$(authorized "$BASE/api/status/$JOB" | field status)" = completed ] || fail "" "The job did not complete: see above."
