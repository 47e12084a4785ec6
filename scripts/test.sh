#!/usr/bin/env bash
# Set-up and all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
# Nothing in the suite may need a hub.
export HF_HUB_OFFLINE=1
# Two processes, each with a core: most tests use one. Those of a file stay together, since they share what they make.
# If one crashes the run ends and names the test: with a new one in its place it may wait for ever.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "$@"
