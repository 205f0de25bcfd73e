#!/usr/bin/env bash
# Makes the virtual environment .venv in the project's folder and installs what the project needs.
#
#   bash scripts/setup.sh          what the scripts need: requirements.txt
#   bash scripts/setup.sh --dev    and what the checks need: requirements-dev.txt
#
# Needs Python >= 3.10 (PYTHON=/path/to/python chooses one). Nothing is done twice: while the requirement
# files stay as they are, a second call returns at once.
#
# On Linux the plain torch wheel brings CUDA along, several gigabytes that are of no use without an NVIDIA
# GPU. To avoid them, set PIP_EXTRA_INDEX_URL before the first call, to the index of CPU wheels that
# PyTorch's own installation page names.
set -euo pipefail
unset CDPATH  # where it is exported, cd may go elsewhere, and prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 1
}

find_python() {
  local candidate candidates=(python3 python python3.13 python3.12 python3.11 python3.10)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python >= 3.10 among ${candidates[*]}; install one, or name it:" \
    "PYTHON=/path/to/python bash scripts/setup.sh"
}

make_environment() {
  .venv/bin/python -c "import pip" 2>/dev/null && return
  local python
  python=$(find_python)
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv ||
    fail "the venv module of $python does not work (on Debian and Ubuntu: apt-get install python3-venv)"
}

install_requirements() {
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "${PIP_EXTRA_INDEX_URL:-}" ]
  then
    echo "no NVIDIA GPU here: should pip start to download CUDA wheels," \
      "the head of scripts/setup.sh says how to avoid them"
  fi
  .venv/bin/python -m pip install --disable-pip-version-check -r "$1" -c constraints.txt ||
    fail "pip could not install $1. Without a network, point PIP_FIND_LINKS at a folder of wheels." \
      "The same command goes on from here."
}

requirements="requirements.txt"
case "${1:-}" in
  "") ;;
  --dev) requirements="requirements-dev.txt" ;;
  *) fail "usage: setup.sh [--dev]" ;;
esac

make_environment
hash=$(cat requirements.txt requirements-dev.txt constraints.txt | cksum)
if [ "$(cat ".venv/installed-$requirements" 2>/dev/null)" != "$hash" ]; then
  install_requirements "$requirements"
  # requirements-dev.txt includes requirements.txt
  for installed in requirements.txt "$requirements"; do echo "$hash" >".venv/installed-$installed"; done
fi

if command -v ffmpeg >/dev/null; then
  echo "environment ready; ffmpeg found"
else
  echo "environment ready; no ffmpeg on PATH: only m4a, aac, wma, rarer formats, surround and some damaged files need it"
fi
