#!/usr/bin/env bash
# One process, no Ray, no DeepSpeed: breakpoints work. Usage: launchers/debug.sh [options of `dpo4rec run`]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
exec python -m dpo4rec.cli run --cluster debug "$@"
