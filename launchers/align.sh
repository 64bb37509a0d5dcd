#!/usr/bin/env bash
# Aligns one round with the DeepSpeed launcher: the same trainer as in the driver, on the GPUs (or CPU processes) of this machine.
# An adapter that is there is never replaced: the round's texts and scores came from it. Align again into another folder with --out.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launchers/align.sh ROUND_FOLDER [--num-processes N] [--zero 0|1|2|3] [--out FOLDER] [--tracking NAME]
  ROUND_FOLDER       has alignment.json, for instance runs/demo/round-0
  --num-processes N  processes on this machine, one a GPU (default 1)
  --zero STAGE       ZeRO stage instead of the configured one
  --out FOLDER       where to write instead of ROUND_FOLDER/adapter; it must not exist
  --tracking NAME    tensorboard, mlflow or wandb beside the log (default none)
EOF
}

fail() { echo "error: $1" >&2; usage >&2; exit 2; }

round="" processes=1 arguments=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --num-processes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--num-processes needs a number"; processes="$2"; shift 2 ;;
    --zero) [[ "${2:-}" =~ ^[0-3]$ ]] || fail "--zero needs 0, 1, 2 or 3"; arguments+=(--zero "$2"); shift 2 ;;
    --out) [[ -n "${2:-}" ]] || fail "--out needs a folder"; arguments+=(--out "$2"); shift 2 ;;
    --tracking) [[ -n "${2:-}" ]] || fail "--tracking needs a name"; arguments+=(--tracking "$2"); shift 2 ;;
    -*) fail "unknown option $1" ;;
    *) [[ -z "$round" ]] || fail "more than one round folder"; round="$1"; shift ;;
  esac
done
[[ -n "$round" ]] || fail "no round folder is given"
[[ -f "$round/alignment.json" ]] || fail "$round/alignment.json is missing: run the stages before alignment first"

venv="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
[[ -x "$venv/bin/deepspeed" ]] && export PATH="$venv/bin:$PATH"
command -v deepspeed >/dev/null || fail "deepspeed is not on the PATH: activate the environment where dpo4rec is installed"

port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
exec deepspeed --num_accelerators "$processes" --master_addr 127.0.0.1 --master_port "$port" --no_local_rank \
  --module dpo4rec.alignment "$round" "${arguments[@]}"
