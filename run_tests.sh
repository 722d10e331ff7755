#!/usr/bin/env bash
# Every check of this project: lint, format, types, known vulnerabilities, tests. Works from any folder and from a clean clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: bash run_tests.sh [--fast] [--no-install] [pytest arguments …]

  --fast        leave out the tests marked "slow"
  --no-install  install no system packages, even as root
  --help        this text

Makes .venv when missing and installs requirements-dev.lock into it. As root on Debian or Ubuntu it also installs
the system packages the tests use (openssh-server openssh-client bubblewrap iproute2 nftables curl openssl procps prometheus chromium);
otherwise it names what is missing, and the tests that need it are skipped and listed. With CI=true and as root
a skipped test is a failure. All steps run; the exit code is that of the first one that failed.
TEXT
}

fast=false
install=true
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --fast) fast=true ;;
        --no-install) install=false ;;
        *) break ;;
    esac
    shift
done

began=$SECONDS
unset PYTHONDONTWRITEBYTECODE # hundreds of servers are started: their modules are compiled once
PATH=$PATH:/usr/sbin:/sbin # where sshd, ip and nft live
. deploy/venv.sh

can_install() { [ "$install" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_updated=false
apt_install() {
    # shellcheck disable=SC2015
    [ "$apt_updated" = true ] || apt-get update -qq >/dev/null && apt_updated=true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need sshd openssh-server
need ssh-keygen openssh-client
need bwrap bubblewrap
need ip iproute2
need nft nftables
need curl curl
need openssl openssl
need ps procps
need promtool prometheus
need chromium chromium
if [ ${#missing[@]} -gt 0 ]; then
    if can_install; then
        echo "Installing ${missing[*]}"
        apt_install "${missing[@]}" || echo "apt-get could not install ${missing[*]}: tests that need them are skipped."
    else
        echo "Not installed: ${missing[*]}. Tests that need them are skipped."
    fi
fi

if ! ensure_venv requirements-dev.txt; then
    can_install || exit 1
    echo "Installing python3-venv"
    apt_install python3-venv
    ensure_venv requirements-dev.txt
fi

# tests/conftest.py turns skips into failures where nothing is missing that could be there.
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ]; then
    export GPUQ_NO_SKIPS=1
fi

code=0
summary=""
SKIPPED=77
step() {
    local name=$1 result=0
    shift
    echo "== $name"
    "$@" || result=$?
    if [ "$result" = 0 ]; then
        summary+="$name ok, "
    elif [ "$result" = "$SKIPPED" ]; then
        summary+="$name skipped, "
    else
        summary+="$name FAILED ($result), "
        [ "$code" != 0 ] || code=$result
    fi
}

# Known vulnerabilities of what is locked, from PyPI's database. It counts as reachable when it tells of an old release
# that is known to have one: a mirror may answer and know of none.
audit() {
    if ! "$VENV_PYTHON" - 2>/dev/null <<'PYTHON'; then
import json, urllib.request
with urllib.request.urlopen("https://pypi.org/pypi/requests/2.19.0/json", timeout=10) as answer:
    assert json.load(answer)["vulnerabilities"]
PYTHON
        echo "The database of known vulnerabilities is not reachable, skipped."
        return "$SKIPPED"
    fi
    "$VENV_PYTHON" -m pip_audit --progress-spinner off --disable-pip --require-hashes -r requirements-dev.lock
}

# One process more than there are processors keeps these busy; more would only starve what each test waits for.
workers=$(($(nproc) + 1))
[ "$workers" -le 4 ] || workers=4

marks=()
[ "$fast" = false ] || marks=(-m "not slow")
step "ruff check" "$VENV_PYTHON" -m ruff check .
step "ruff format" "$VENV_PYTHON" -m ruff format --check .
step "mypy" "$VENV_PYTHON" -m mypy .
step "pip-audit" audit
step "pytest" "$VENV_PYTHON" -m pytest -q -rs -n "$workers" --dist loadfile --no-loadscope-reorder ${marks[@]+"${marks[@]}"} "$@"

echo "run_tests: ${summary}$((SECONDS - began)) s"
exit "$code"
