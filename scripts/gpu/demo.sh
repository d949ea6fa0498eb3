#!/usr/bin/env bash
# `make demo` as a user's, in this copy of the code: a fresh environment that sees the machine's packages, its torch above all, behind what
# make installs. Usage, in the copy: scripts/gpu/demo.sh WHEELS, a folder of wheels where there is no registry, else an empty word.
set -euo pipefail
wheels=$1
unset PYTHONPATH TWOFOUR_CACHE_DIR
if ! command -v make >/dev/null; then
  deb=$(find "$wheels" -name 'make_*.deb' | head -n 1)
  [ -n "$deb" ] || { echo "demo: there is no make; install it, or put Debian's package of it beside the wheels" >&2; exit 2; }
  dpkg -x "$deb" runs/make
  PATH="$PWD/runs/make/usr/bin:$PATH"
fi
machine=$(python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
python3 -m venv --without-pip .venv
echo "$machine" >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/machine.pth"
if [ -n "$wheels" ]; then
  export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels $wheels/build"
fi
# The pins name another torch than the machine's, so they are left out.
make demo PIP='python3 -m pip --python .venv/bin/python install --quiet --disable-pip-version-check'
for file in report.json report.html; do cp "runs/demo/$file" "kept/demo-$file"; done
