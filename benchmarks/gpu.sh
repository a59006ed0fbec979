#!/usr/bin/env bash
# All checks on one GPU, from a bare checkout: benchmarks/gpu.sh [--small] [--check NAME]... Writes docs/gpu.json.
# Packages that the environment lacks come from wheels/ (`make wheels`), into a temporary directory.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mapfile -t wheels < <("$PYTHON" -m benchmarks.gpu.wheels "${WHEELS:-wheels}" | sed '/^$/d')
if ((${#wheels[@]})); then
  packages=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$packages" "${wheels[@]}"
  export PYTHONPATH="$PYTHONPATH:$packages"
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
