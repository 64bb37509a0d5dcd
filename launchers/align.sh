#!/usr/bin/env bash
# Aligns one round with the DeepSpeed launcher: the same trainer as in the driver, on the GPUs (or CPU processes) of one or more machines.
# An adapter that is there is never replaced: the round's texts and scores came from it. Align again into another folder with --out.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launchers/align.sh ROUND_FOLDER [--num-processes N | --hostfile FILE] [--zero 0|1|2|3] [--out FOLDER]
                          [--tracking NAME]
  ROUND_FOLDER       has alignment.json, for instance runs/demo/round-0; all machines see it under this path
  --num-processes N  processes on this machine, one a GPU (default 1)
  --hostfile FILE    machines and their processes, a line each: worker-0 slots=8. Needs pdsh, and ssh without a password to each of them;
                     the first one leads. Code and Python lie under the same paths on all
  --zero STAGE       ZeRO stage instead of the configured one
  --out FOLDER       where to write instead of ROUND_FOLDER/adapter; it must not exist
  --tracking NAME    tensorboard, mlflow or wandb beside the log (default none)
EOF
}

fail() { echo "error: $1" >&2; usage >&2; exit 2; }

round="" processes="" hostfile="" arguments=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --num-processes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--num-processes needs a number"; processes="$2"; shift 2 ;;
    --hostfile) [[ -f "${2:-}" ]] || fail "--hostfile needs a file"; hostfile="$2"; shift 2 ;;
    --zero) [[ "${2:-}" =~ ^[0-3]$ ]] || fail "--zero needs 0, 1, 2 or 3"; arguments+=(--zero "$2"); shift 2 ;;
    --out) [[ -n "${2:-}" ]] || fail "--out needs a folder"; arguments+=(--out "$2"); shift 2 ;;
    --tracking) [[ -n "${2:-}" ]] || fail "--tracking needs a name"; arguments+=(--tracking "$2"); shift 2 ;;
    -*) fail "unknown option $1" ;;
    *) [[ -z "$round" ]] || fail "more than one round folder"; round="$1"; shift ;;
  esac
done
[[ -n "$round" ]] || fail "no round folder is given"
[[ -z "$processes" || -z "$hostfile" ]] || fail "--num-processes and --hostfile exclude each other: the file says how many"
[[ -f "$round/alignment.json" ]] || fail "$round/alignment.json is missing: run the stages before alignment first"

venv="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
[[ -x "$venv/bin/deepspeed" ]] && export PATH="$venv/bin:$PATH"
command -v deepspeed >/dev/null || fail "deepspeed is not on the PATH: activate the environment where dpo4rec is installed"

leader=127.0.0.1 where=(--hostfile /dev/null --num_accelerators "${processes:-1}") # else DeepSpeed would read a /job/hostfile
if [[ -n "$hostfile" ]]; then
  mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$hostfile")
  ((${#lines[@]})) || fail "$hostfile names no machine: write lines like worker-0 slots=8"
  for line in "${lines[@]}"; do
    [[ "$line" =~ ^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$ ]] || fail "$hostfile: not a line like worker-0 slots=8: $line"
  done
  where=(--hostfile "$hostfile")
  if [[ "${lines[*]}" =~ ^(localhost|127\.0\.0\.1)[[:space:]][^[:space:]]*$ ]]; then # this machine alone
    where+=(--no_ssh_check)
  else
    command -v pdsh >/dev/null || fail "pdsh is not on the PATH: DeepSpeed starts the processes of other machines with it"
    leader="${lines[0]%%[[:space:]]*}" where+=(--force_multi) # without it DeepSpeed takes a single machine for this one
  fi
fi

port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
exec deepspeed "${where[@]}" --master_addr "$leader" --master_port "$port" --no_local_rank \
  --module dpo4rec.alignment "$round" "${arguments[@]}"
