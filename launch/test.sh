#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
exec python -m pytest -q -n 2 --dist loadgroup --max-worker-restart=0 "$@"
