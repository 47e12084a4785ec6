#!/usr/bin/env bash
# Set-up and the main job on the embedded digits.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh demo
exec .venv/bin/cap-hf demo "$@"
