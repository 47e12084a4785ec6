#!/usr/bin/env bash
# Set-up and all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
# Nothing in the suite may need a hub.
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest "$@"
