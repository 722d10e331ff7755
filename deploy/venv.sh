# shellcheck shell=bash
# The project's Python environment. Sourced by quickstart.sh and run_tests.sh, from the project's folder:
#
#     ensure_venv requirements.txt      makes .venv if need be and installs what that file names, as its lock has it
#
# It needs Python 3.10 or newer and changes nothing outside .venv. On failure it says what to install.

VENV=.venv
VENV_PYTHON=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# The interpreters to try, best first, one path a line.
python_candidates() {
    local name path
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        "$path" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && printf '%s\n' "$path"
    done
    return 0
}

# Debian and Ubuntu ship venv without ensurepip until python3-venv is installed; the system's pip will do, too.
make_venv() {
    local python=$1
    "$python" -m venv --clear "$VENV" && return
    "$python" -m venv --clear --without-pip "$VENV" &&
        "$python" -m pip --python "$VENV_PYTHON" install --quiet pip && return
    "$python" -m virtualenv --clear --quiet "$VENV"
}

# What is wanted in the environment: the locked packages and the interpreter they are installed for.
wanted_stamp() {
    "$VENV_PYTHON" - "$@" <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version, sys.prefix)).encode())
for name in sys.argv[1:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PYTHON
}

ensure_venv() {
    local requirements=$1 lock=${1%.txt}.lock python candidates log stamp=$VENV/.installed-$1 wanted

    if ! "$VENV_PYTHON" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        candidates=$(python_candidates)
        if [ -z "$candidates" ]; then
            echo "Python 3.10 or newer is needed; found: $( (python3 --version || echo none) 2>/dev/null)." >&2
            return 1
        fi
        log=$(mktemp)
        while read -r python; do
            echo "Making $VENV with $("$python" --version) ($python)"
            make_venv "$python" >>"$log" 2>&1 && break
            rm -rf "$VENV"
        done <<<"$candidates"
        if [ ! -x "$VENV_PYTHON" ]; then
            tail -n 15 "$log" >&2
            python=${candidates%%$'\n'*}
            echo "$python cannot make an environment. On Debian and Ubuntu, install this package and try again:" >&2
            echo "    apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2
            rm -f "$log"
            return 1
        fi
        rm -f "$log"
    fi

    wanted=$(wanted_stamp "$lock")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    echo "Installing $requirements into $VENV"
    # Every package is in the lock with the hashes of its files: nothing is left to find out, and nothing else gets in.
    if ! "$VENV_PYTHON" -m pip install --quiet --no-deps --require-hashes -r "$lock"; then
        echo "pip could not install $lock: see above. Is the package index within reach?" >&2
        return 1
    fi
    printf '%s\n' "$wanted" >"$stamp"
    # Test requirements include those of the server.
    wanted_stamp requirements.lock >"$VENV/.installed-requirements.txt"
}
