#!/usr/bin/env bash
# Sets the environment up, then runs the linter, the format check and the tests.
#
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh --fast               without the tests marked slow: under 3 minutes
#   bash scripts/test.sh -k audio -x          further arguments go to pytest, also those behind --fast
#
# What is skipped is named at the end, with its reason: no ffmpeg, no Slurm, no Chromium, no CUDA device.
set -euo pipefail
unset CDPATH  # where it is exported, cd may go elsewhere, and prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
fi
bash scripts/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -q -rs "$@"
