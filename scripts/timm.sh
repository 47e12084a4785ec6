#!/usr/bin/env bash
# Set-up of an environment with timm and PEFT, and the tests that need these; arguments go to pytest.
# It is apart because with timm comes torchvision: of PyPI's, only the Python part works beside a CPU torch (see
# tests/support/torchvision_operators.py), and transformers would use that everywhere else too.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh timm-test .venv-timm
export HF_HUB_OFFLINE=1
exec .venv-timm/bin/python -m pytest tests/families/test_timm.py tests/families/test_peft.py "$@"
