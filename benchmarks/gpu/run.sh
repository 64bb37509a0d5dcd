#!/usr/bin/env bash
# One part of the GPU benchmarks on a machine that need not have a package index: only PyTorch, transformers, accelerate and what
# they bring. The results come to lie in $OUT, where an earlier result file is continued.
set -euo pipefail

usage() {
  cat <<'EOT'
usage: benchmarks/gpu/run.sh PART [OPTIONS]
  PART     lora8b, lora1b, qlora, zero3 (benchmarks/gpu/dpo.py); sampling8b, sampling1b (benchmarks/gpu/sampling.py)
  OPTIONS  of the script, for instance --minutes 8, or --micro
variables:
  WHEELS   folder of wheels to install first, without their dependencies, into a folder that is removed at the end: those of dpo4rec
           that the machine lacks (deepspeed, trl, datasets, bitsandbytes, pydantic and so on)
  OUT      folder of the result file (default benchmarks/results)
  COMMIT   what was checked out, for the result file, where there is no git history
  PYTHON   the interpreter (default python3)
  TMPDIR   where models are written: 16 GB for 8b (default /tmp)
EOT
}

[[ $# -ge 1 && "$1" != -h && "$1" != --help ]] || { usage; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
part="$1" python="${PYTHON:-python3}"
shift
case "$part" in
  lora8b | lora1b | qlora | zero3) module=benchmarks.gpu.dpo ;;
  sampling8b | sampling1b) module=benchmarks.gpu.sampling part="${part#sampling}" ;;
  *) echo "error: there is no part $part" >&2; usage >&2; exit 2 ;;
esac
paths="$PWD"
if [[ -n "${WHEELS:-}" ]]; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
  paths="$PWD:$site"
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -m "$module" --part "$part" --out "${OUT:-benchmarks/results}" "$@"
