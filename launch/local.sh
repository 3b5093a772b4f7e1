#!/usr/bin/env bash
# A run on this machine: one process over all its devices (one GPU, eight GPUs, the chips of one TPU host, or a CPU), or, on GPUs and
# CPUs, several processes that share them.
#   launch/local.sh [--dry_run] [flags of experiments.run]
# Interrupted or ended, it goes on when started again. Exit codes are those of a run (docs/quickstart.md): 0 done, 2 bad input, 75 stopped with everything saved.
set -euo pipefail

# 1. What to run.
FLAGFILE=${FLAGFILE:-finance.flags}
# 2. Where it goes. It holds the clients' secrets while the run lasts: a disk of your own.
WORKDIR=${WORKDIR:-runs/local}
# 3. CLIENTSxMODEL devices: 8x1 spreads clients over eight, 4x2 also splits the frozen model over two; auto takes all for clients.
MESH=${MESH:-auto}
# How many processes: GPUs are dealt to them evenly; on a CPU, DEVICES makes each see that many.
PROCESSES=${PROCESSES:-1}
DEVICES=${DEVICES:-}
GRACE=${GRACE:-120} # seconds that the others get to end when one has failed

fail() { echo "error: $1" >&2 && exit 2; }
dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$PROCESSES must be a whole number above 0."
[[ $DEVICES =~ ^([1-9][0-9]*)?$ ]] || fail "DEVICES=$DEVICES must be a whole number above 0, or empty."
run=(python -m experiments.run --flagfile="$FLAGFILE" --workdir="$WORKDIR" --mesh="$MESH" "$@")
settings=()
if [[ $DEVICES ]]; then
  flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
  settings=(JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
fi
gpus=()
if ((PROCESSES > 1)) && [[ ! $DEVICES ]]; then
  found() { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' | paste -sd, || true; }
  listed=${CUDA_VISIBLE_DEVICES-$(found)}
  IFS=, read -ra gpus <<<"$listed"
  ((${#gpus[@]} % PROCESSES == 0)) || fail "PROCESSES=$PROCESSES do not share ${#gpus[@]} GPUs evenly."
fi
port() { # a port that nobody listens on
  local port
  while port=$((10000 + RANDOM % 20000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}
coordinator=
((PROCESSES == 1)) || coordinator=127.0.0.1:$(port)
assemble() { # the command of process $1
  local share=$((${#gpus[@]} / PROCESSES)) mine
  command=(env "${settings[@]}")
  if ((share)); then
    mine=$(IFS=, && echo "${gpus[*]:$1 * share:share}")
    command+=("CUDA_VISIBLE_DEVICES=$mine")
  fi
  ((${#command[@]} > 1)) || command=()
  command+=("${run[@]}")
  [[ ! $coordinator ]] || command+=(--coordinator="$coordinator" --processes="$PROCESSES" --process="$1")
}

if [[ $dry_run ]]; then
  for ((i = 0; i < PROCESSES; i++)); do
    assemble "$i"
    printf '%q ' "${command[@]}"
    echo
  done
  exit
fi
if ((PROCESSES == 1)); then
  assemble 0
  exec "${command[@]}"
fi

tell() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
label() { # what comes in, each line behind its process; signals are the processes' own affair
  trap '' INT TERM
  while IFS= read -r line || [[ $line ]]; do echo "[$1] $line"; done
}
pids=()
trap 'tell TERM' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
  assemble "$i"
  "${command[@]}" > >(label "$i") 2> >(label "$i" >&2) &
  pids[i]=$!
done
code=0
deadline= signal=TERM
while ((${#pids[@]})); do
  sleep 0.2 || true
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    ended=0
    wait "${pids[i]}" || ended=$?
    unset "pids[i]"
    ((ended)) || continue
    # The first failure counts: the others end because of it. That one was stopped tells nothing if another then fails.
    if ((code == 0 || code == 75)); then code=$ended; fi
    deadline=${deadline:-$((SECONDS + GRACE))}
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    tell "$signal"
    signal=KILL # if they do not heed it in as long again
    deadline=$((SECONDS + GRACE))
  fi
done
exit "$code"
