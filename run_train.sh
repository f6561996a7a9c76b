#!/usr/bin/env bash
# Trains what a TOML file describes, on this machine or as one node of several.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./run_train.sh --config FILE [--section.key VALUE ...]

Makes .venv on a machine that has no environment, checks the configuration, then trains.

environment variables:
  NGPU             processes on this node (default: the GPUs seen, or 1)
  NNODES           nodes of the run (default: 1)
  NODE_RANK        number of this node, from 0: node 0 holds the meeting place; unset, the node that RDZV_ENDPOINT names does.
                   Which ranks a node gets, the nodes agree on among themselves
  RDZV_ENDPOINT    host:port of node 0, where the nodes meet (required for several nodes)
  LOCAL_ADDR       address by which the other nodes reach this one (default: what its name resolves to)
  MAX_RESTARTS     how many times all processes start again, from the newest checkpoint, after one broke (default: 0)
  LOG_RANK         the local processes that print, as in 0,3 (default: 0)
  TORCH_INDEX_URL  package index to take torch from, such as a CPU-only or ROCm one (default: pip's own)
  PYTHON           interpreter that makes .venv (default: python3)
  TITANARCH_PYTHON interpreter to use instead of .venv
  OMP_NUM_THREADS  threads a process (default for several processes: cores / NGPU)

exit status: 0 trained; 2 wrong configuration or command, before anything is launched; 128 and its number after a signal
(SIGTERM and SIGUSR1: the run has saved, and the same command goes on);
1 where the run broke: the last lines name the process, its error and its last step.
TEXT
}

wrong() {
  printf 'titanarch: %s\n' "$*" >&2
  exit 2
}

require_count() { # name, value, least
  if [[ ! "$2" =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
    wrong "$1=$2: a whole number of at least $3 is needed"
  fi
}

# Devices named by a variable such as CUDA_VISIBLE_DEVICES=0,2
listed_devices() {
  local devices
  IFS=, read -ra devices <<<"$1"
  echo "${#devices[@]}"
}

visible_gpus() {
  if [[ -n "${HIP_VISIBLE_DEVICES+set}" ]] && ! command -v nvidia-smi >/dev/null; then
    listed_devices "$HIP_VISIBLE_DEVICES"
  elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    listed_devices "$CUDA_VISIBLE_DEVICES"
  elif [[ -n "${ROCR_VISIBLE_DEVICES+set}" ]] && ! command -v nvidia-smi >/dev/null; then
    listed_devices "$ROCR_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    { nvidia-smi -L 2>/dev/null || true; } | awk '/^GPU /{n++} END {print n + 0}'
  elif command -v rocm-smi >/dev/null; then
    { rocm-smi --showid 2>/dev/null || true; } | awk -F: '/^GPU\[/ && !seen[$1]++ {n++} END {print n + 0}'
  else
    echo 0
  fi
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  usage
  exit 0
fi
if [[ " $* " != *" --config"[\ =]* && " $* " != *" --job.config_file"[\ =]* ]]; then
  usage >&2
  wrong "no --config FILE given"
fi

if [[ -z "${NGPU:-}" ]]; then
  NGPU="$(visible_gpus)"
  ((NGPU > 0)) || NGPU=1
fi
NNODES="${NNODES:-1}"
LOG_RANK="${LOG_RANK:-0}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
require_count NGPU "$NGPU" 1
require_count NNODES "$NNODES" 1
require_count NODE_RANK "${NODE_RANK:-0}" 0
require_count MAX_RESTARTS "$MAX_RESTARTS" 0
[[ "$LOG_RANK" =~ ^[0-9]+(,[0-9]+)*$ ]] || wrong "LOG_RANK=$LOG_RANK: numbers of local processes are needed, as in 0 or 0,3"
if ((NNODES > 1)); then
  [[ -n "${RDZV_ENDPOINT:-}" ]] || wrong "NNODES=$NNODES needs RDZV_ENDPOINT, the host:port of node 0"
  [[ "$RDZV_ENDPOINT" =~ :[0-9]+$ ]] || wrong "RDZV_ENDPOINT=$RDZV_ENDPOINT: host:port is needed, as in node0:29400"
  ((${NODE_RANK:-0} < NNODES)) || wrong "NODE_RANK=$NODE_RANK: nodes are numbered from 0 to $((NNODES - 1))"
elif ((${NODE_RANK:-0} > 0)); then
  wrong "NODE_RANK=$NODE_RANK, but NNODES=1: set NNODES to the number of nodes"
fi

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
choose_python run

# Of an outer launcher; they would place these processes in its group.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
unset SLURM_PROCID OMPI_COMM_WORLD_RANK PMI_RANK "${!PET_@}" # PET_: options that torchrun takes from the environment

if ((NGPU == 1 && NNODES == 1 && MAX_RESTARTS == 0)); then
  # One process needs no torchrun, and train itself checks the configuration first: this saves two imports of torch.
  exec "$PYTHON_BIN" -m titanarch train "$@"
fi

# WORLD_SIZE tells the check how many processes there will be. Results belong on stdout, so its own words go to stderr.
WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON_BIN" -m titanarch config check "$@" >&2

if [[ -z "${OMP_NUM_THREADS:-}" ]] && ((NGPU > 1)); then
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
fi
rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="${RDZV_ENDPOINT:-localhost:0}")
if [[ -n "${NODE_RANK:-}" ]] && ((NNODES > 1)); then
  rendezvous+=(--rdzv-conf="is_host=$((NODE_RANK == 0))") # else torchrun compares names, which proxies and aliases mislead
fi
if [[ -n "${LOCAL_ADDR:-}" ]]; then
  rendezvous+=(--local-addr="$LOCAL_ADDR")
fi
# shellcheck disable=SC2016 # torchrun fills in the number of the process in the whole run; its own choice is the one on the node
prefix='[rank${rank}]:'
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-$prefix}"
logs="$(mktemp -d "${TMPDIR:-/tmp}/titanarch-logs-XXXXXX")"
say "shown: local process $LOG_RANK of $NGPU; the output of all is kept in $logs"
exec "$PYTHON_BIN" -m titanarch.train.torchrun \
  --nnodes="$NNODES" --nproc-per-node="$NGPU" --max-restarts="$MAX_RESTARTS" "${rendezvous[@]}" \
  --tee 3 --local-ranks-filter="$LOG_RANK" --log-dir="$logs" \
  -m titanarch train "$@"
