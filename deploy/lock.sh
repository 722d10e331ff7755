#!/usr/bin/env bash
# Writes requirements.lock and requirements-dev.lock anew: every package that requirements.txt and requirements-dev.txt
# bring along, for each Python from 3.10 on, with the hashes of its files. Run it after a change of those two.
#
#     bash deploy/lock.sh             what is locked already stays as it is, where it still fits
#     bash deploy/lock.sh --upgrade   takes the newest releases that fit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV=0.13.9
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV"

compile() {
    "$folder/bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes --annotation-style line \
        --no-emit-index-url --no-emit-find-links --custom-compile-command "bash deploy/lock.sh" "$@"
}
compile requirements.txt --output-file requirements.lock "$@"
# What the server runs with in production is what is tested.
compile requirements-dev.txt --constraint requirements.lock --output-file requirements-dev.lock "$@"
