#!/usr/bin/env bash
# A run on a Cloud TPU slice, from your own machine: launch/tpu_pod.sh [--dry_run] [flags of experiments.run]
# It copies the project's last commit (nothing else: no run, no secrets, no data), installs it and runs in the foreground; if the
# line breaks, start it again and the run goes on. experiments.run does not join processes yet, so a slice of more than one host
# (v5litepod-16 and up) is refused; a host of eight v5e chips is one process.
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. The slice.
TPU=${TPU:-dplora}
ZONE=${ZONE:-us-west4-a}
# 2. What to run, and over which chips (CLIENTSxMODEL).
FLAGS=(--flagfile="${FLAGFILE:-finance.flags}" --mesh="${MESH:-8x1}")
# 3. Where it goes, on the worker's disk. It holds the clients' secrets while the run lasts.
WORKDIR=${WORKDIR:-dplora_runs/tpu}

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
tpu=(gcloud compute tpus tpu-vm)
run=$(printf '%q ' python3 -m experiments.run "${FLAGS[@]}" --workdir="../$WORKDIR" "$@")
remote="mkdir -p dplora_jax && tar xzf dplora_jax.tar.gz -C dplora_jax && cd dplora_jax && pip install -q -e '.[tpu]' && $run"
commands() { # calls "$1" on each command of the launch
  "$1" git archive --output="$archive" HEAD
  "$1" "${tpu[@]}" scp --zone="$ZONE" --worker=all "$archive" "$TPU:dplora_jax.tar.gz"
  "$1" "${tpu[@]}" ssh "$TPU" --zone="$ZONE" --worker=all --command="$remote"
}
show() { printf '%q ' "$@" && echo; }
if [[ $dry_run ]]; then
  archive=dplora_jax.tar.gz
  commands show
  exit
fi
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
archive=$folder/dplora_jax.tar.gz
hosts=$("${tpu[@]}" describe "$TPU" --zone="$ZONE" --format='value(networkEndpoints.len())')
if ((hosts != 1)); then
  echo "error: $TPU has $hosts hosts, and experiments.run works on one: take a slice of one host, as v5litepod-8." >&2
  exit 2
fi
commands command
