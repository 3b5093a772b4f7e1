#!/usr/bin/env bash
# A run on this machine: one process over all its devices (one GPU, eight GPUs, the chips of one TPU host, or a CPU).
#   launch/local.sh [--dry_run] [flags of experiments.run]
# Interrupted, it goes on when started again. experiments.run does not join processes yet: one machine, one process.
set -euo pipefail

# 1. What to run.
FLAGFILE=${FLAGFILE:-finance.flags}
# 2. Where it goes. It holds the clients' secrets while the run lasts: a disk of your own.
WORKDIR=${WORKDIR:-runs/local}
# 3. CLIENTSxMODEL devices: 8x1 spreads clients over eight, 4x2 also splits the frozen model over two; auto takes all for clients.
MESH=${MESH:-auto}

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
command=(python -m experiments.run --flagfile="$FLAGFILE" --workdir="$WORKDIR" --mesh="$MESH" "$@")
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
