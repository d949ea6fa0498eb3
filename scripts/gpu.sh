#!/usr/bin/env bash
# Tests and measures on a machine with Hopper GPUs, with or without a package registry: `scripts/gpu.sh --list` prints the parts and the
# schedule, `scripts/gpu.sh --help` the options; scripts/gpu/run.py says how they run.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/run.py" "$@"
