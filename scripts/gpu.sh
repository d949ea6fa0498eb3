#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU, then the CPU suite under this Python and torch, then times the kernels; the outcomes go to the folder
# given first. Usage: scripts/gpu.sh FOLDER [DTYPE…]
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
failed=0
python3 -m pytest -m gpu -p no:cacheprovider --record "$out/tests.json" tests || failed=1
# The pictures need Chromium, which a GPU machine seldom has; every other test runs.
python3 -m pytest -n "$(nproc)" -p no:cacheprovider --ignore tests/test_report_page.py --record "$out/tests-cpu-suite.json" tests || failed=1
for dtype in "${@:-bf16}"; do
  python3 -m twofour measure gemm --dtype "$dtype" --out "$out/gemm.json" || failed=1
done
exit $failed
