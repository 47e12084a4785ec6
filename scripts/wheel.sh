#!/usr/bin/env bash
# Builds the wheel with the compiled kernels into dist/, and checks it where no compiler is to be found: in a fresh
# environment for each of these versions of PyTorch. Usage: wheel.sh [VERSION ...]; default: the oldest that the kernels
# take (from PyPI: with CUDA, some 6 GB) and the one of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test

oldest=$(.venv/bin/python -c 'from cap_hf.kernels.libraries import OLDEST_TORCH; print(OLDEST_TORCH)')
pinned=$(sed -n 's/^torch==//p' constraints.txt)
if [ $# = 0 ]; then set -- "$oldest.0" "$pinned"; fi

pip="-m pip --disable-pip-version-check --quiet"
CAP_HF_BUILD_KERNELS=1 .venv/bin/python $pip wheel --no-build-isolation --no-deps --wheel-dir dist .
version=$(.venv/bin/python -c 'import cap_hf; print(cap_hf.__version__)')
wheel=$(echo "$PWD/dist/cap_hf-$version"-py3-none-linux_*.whl)
echo "Built $wheel"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for torch in "$@"; do
  venv=$folder/torch-$torch
  .venv/bin/python -m venv "$venv"
  # Not with constraints.txt: what it pins is what fits the PyTorch of the tests.
  "$venv/bin/python" $pip install "$wheel" "torch==$torch"
  # Nothing but the environment itself is on PATH; the working folder holds no cap_hf.
  (cd "$folder" && env -i HOME="$folder" PATH="$venv/bin" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1 \
    "$venv/bin/python" "$OLDPWD/scripts/wheel_check.py")
  # A source checkout compiles with the headers of this version.
  mkdir "$folder/compiled-$torch"
  "$venv/bin/python" -c 'import sys; from pathlib import Path; from cap_hf.kernels.libraries import compile_all
compile_all(Path(sys.argv[1]))' "$folder/compiled-$torch"
  echo "The kernels compile with the headers of PyTorch $torch"
done
