#!/usr/bin/env bash
# Nsight Compute on our tuned 2:4 kernel beside cuSPARSELt's: scripts/gpu/ncu.sh FOLDER DTYPE writes the report, its raw values, its
# details and a short table.
set -euo pipefail
here=$(dirname "$0") name=$1/ncu-$2
ncu --profile-from-start off --clock-control none --target-processes application-only --set full --import-source no -f -o "$name" \
  python3 "$here/ncu_launches.py" "$2" "8192^3" "8B.down t512" "2048^3" "bertL.ff2 32x128"
ncu -i "$name.ncu-rep" --csv --page raw --print-units base >"$name-raw.csv"
ncu -i "$name.ncu-rep" --page details >"$name-details.txt"
python3 "$here/ncu_table.py" "$name-raw.csv" | tee "$name-table.txt"
