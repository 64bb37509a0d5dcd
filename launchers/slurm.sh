#!/usr/bin/env bash
# One dpo4rec run on the nodes of a Slurm job: a Ray head on the first node, Ray workers on the others, the run, the end of both.
# Usage: sbatch --nodes=4 --gpus-per-node=8 launchers/slurm.sh [options of `dpo4rec run`], from the checkout, which all nodes see
#SBATCH --job-name=dpo4rec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

[[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is no Slurm job: sbatch launchers/slurm.sh --preset ml-1m --data DATA --run-dir RUN"
[[ " $* " =~ \ --run-dir[\ =]/ ]] || fail "--run-dir with an absolute path that all nodes see is missing"
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this script
[[ -x .venv/bin/ray ]] && PATH="$PWD/.venv/bin:$PATH"
command -v ray >/dev/null || fail "ray is not on the PATH: activate the environment where dpo4rec is installed before sbatch"

# A token for this job alone. srun hands it over in the environment; it stands in no command line and no file.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip="$(getent ahostsv4 "${nodes[0]}" | awk '{ print $1; exit }')" # of the network by which the nodes know each other
address="$ip:$((20000 + SLURM_JOB_ID % 10000))"
cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"

steps=()
step() { srun --ntasks-per-node=1 --cpus-per-task="$cpus" "$@" --num-cpus "$cpus" --disable-usage-stats --block & steps+=($!); }
trap 'kill "${steps[@]}" 2>/dev/null; wait' EXIT

step --nodes=1 --nodelist="${nodes[0]}" ray start --head --node-ip-address "$ip" --port "${address#*:}" \
  --include-dashboard false --temp-dir "/tmp/ray-$SLURM_JOB_ID"
for _ in {1..30}; do
  ray health-check --address "$address" >/dev/null 2>&1 && break
  kill -0 "${steps[0]}" 2>/dev/null || fail "the Ray head has not started: see the lines above"
  sleep 1
done
if ((${#nodes[@]} > 1)); then
  step --nodes="$((${#nodes[@]} - 1))" --exclude="${nodes[0]}" ray start --address "$address"
fi

# Nodes may still be starting: the run waits for them and says what is missing.
RAY_ADDRESS="$address" python -m dpo4rec.cli run --cluster ray "$@"
