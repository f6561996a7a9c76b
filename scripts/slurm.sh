#!/usr/bin/env bash
# A run on a Slurm cluster: one launcher a node, requeued before the time limit, resumed from the newest checkpoint.
#
#   sbatch --nodes=4 --time=12:00:00 scripts/slurm.sh --config FILE [--section.key VALUE ...]
#
# Submit it from the repository, on a file system that all nodes share; options of sbatch win over the lines below.
# docs/clusters.md explains it. Read from the environment:
#   TITANARCH_HOME   the repository (default: the folder that sbatch was called in)
#   NGPU             processes a node (default: the GPUs that Slurm gives on a node, or what run_train.sh finds)
#   MAX_RESTARTS     how many times the processes start again inside this job after one broke (default: 2)
#   MAX_REQUEUES     how many times the job may be queued again (default: 100)
#SBATCH --job-name=titanarch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

say() { printf 'titanarch: %s\n' "$*" >&2; }

cd "${TITANARCH_HOME:-$SLURM_SUBMIT_DIR}"
if [[ ! -x run_train.sh ]]; then
  say "no run_train.sh in $PWD: submit from the repository, or set TITANARCH_HOME to it"
  exit 2
fi

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES="$SLURM_JOB_NUM_NODES"
export RDZV_ENDPOINT="$first:$((20000 + SLURM_JOB_ID % 10000))"
export MAX_RESTARTS="${MAX_RESTARTS:-2}"
if [[ -z "${NGPU:-}" && -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
  export NGPU="$SLURM_GPUS_ON_NODE"
fi

# The environment is made once, here, rather than by every node at the same time.
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
choose_python run
TITANARCH_PYTHON="$(command -v "$PYTHON_BIN")"
export TITANARCH_PYTHON

limit_is_near=0
trap 'limit_is_near=1' USR1

# One task a node; SLURM_NODEID, from 0, is set in each. A launcher that fails takes the others along.
# shellcheck disable=SC2016 # expanded on the node
srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
  bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run_train "$@" &
step=$!

status=0
wait "$step" || status=$?
if ((limit_is_near)) && kill -0 "$step" 2>/dev/null; then # wait was interrupted by the signal, the step still runs
  say "the time limit is near: the processes save and end"
  kill -USR1 "$step" # srun hands it on to the tasks; at SIGTERM it kills them
  status=0
  wait "$step" || status=$?
fi
# 138 and 143: the processes saved and ended at SIGUSR1 or SIGTERM, before the time limit or a preemption
if (((limit_is_near && status != 0) || status == 138 || status == 143)); then
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
    say "queued again ${SLURM_RESTART_COUNT} times already, which MAX_REQUEUES allows no more"
    exit 1
  fi
  say "queueing the job again; it goes on from the newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
