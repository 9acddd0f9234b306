#!/bin/sh
# Checks and measures a checkout on an NVIDIA card in 9 minutes or less: scripts/gpu_check.py says how.
# It runs with .venv's Python, or with $PYTHON.
root=$(cd "$(dirname "$0")/.." && pwd)
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python
exec "$python" "$root/scripts/gpu_check.py" "$@"
