#!/usr/bin/env bash
# Makes .venv, or another folder, with what constraints.txt pins. Usage: setup.sh [EXTRA] [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${2:-.venv}
wanted="$(cat setup.cfg constraints.txt; echo "extra=${1:-}")"
if [ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$wanted" ]; then
  exit 0
fi
python=$(command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "Python 3.10 or newer is needed as python3" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing into $venv (a few minutes the first time)"
# torch first and pinned: a range in another package would pull a second one, with several GB of CUDA.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
printf '%s\n' "$wanted" > "$venv/installed"
