#!/usr/bin/env bash
# A run on a Cloud TPU slice, on all its hosts, from your own machine: launch/tpu_pod.sh [--dry_run] [flags of experiments.run]
# It copies the project's last commit (nothing else: no run, no secrets, no data), installs it and runs in the foreground; if the
# line breaks, or a host is preempted, start it again and the run goes on. To stop it, saved:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command='pkill -TERM -f experiments.run'
# The hosts do not ask each other who they are, nor encrypt: let a firewall keep others off the slice's network.
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. The slice.
TPU=${TPU:-dplora}
ZONE=${ZONE:-us-west4-a}
# 2. What to run, and over which chips (CLIENTSxMODEL).
FLAGS=(--flagfile="${FLAGFILE:-finance.flags}" --mesh="${MESH:-8x1}")
# 3. Where it goes; it holds the clients' secrets while the run lasts. On a slice of one host (v5litepod-8 and smaller), a folder on
# its disk. On several, an absolute path below a file system that all of them have mounted, as Filestore (NFS): a gs:// bucket is
# no folder, and through gcsfuse the hosts do not see each other's locks.
WORKDIR=${WORKDIR:-dplora_runs/tpu}

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
tpu=(gcloud compute tpus tpu-vm)
[[ $WORKDIR == /* ]] && place=$WORKDIR || place=../$WORKDIR # seen from the project's folder there
run=$(printf '%q ' python3 -m experiments.run "${FLAGS[@]}" --workdir="$place" --coordinator=auto "$@")
remote="mkdir -p dplora_jax && tar xzf dplora_jax.tar.gz -C dplora_jax && cd dplora_jax && pip install -q -e '.[tpu]' && $run"
commands() { # calls "$1" on each command of the launch
  "$1" git archive --output="$archive" HEAD
  "$1" "${tpu[@]}" scp --zone="$ZONE" --worker=all "$archive" "$TPU:dplora_jax.tar.gz"
  "$1" "${tpu[@]}" ssh "$TPU" --zone="$ZONE" --worker=all --command="$remote"
}
show() { printf '%q ' "$@" && echo; }
if [[ $WORKDIR == *://* ]]; then
  echo "error: WORKDIR=$WORKDIR is no folder: give a path on the hosts, on several below a file system that all have mounted." >&2
  exit 2
fi
if [[ $dry_run ]]; then
  archive=dplora_jax.tar.gz
  commands show
  exit
fi
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
archive=$folder/dplora_jax.tar.gz
hosts=$("${tpu[@]}" describe "$TPU" --zone="$ZONE" --format='value(networkEndpoints.len())')
if ((hosts > 1)) && [[ $WORKDIR != /* ]]; then
  echo "error: $TPU has $hosts hosts, each with its own WORKDIR=$WORKDIR: give an absolute path that all of them have mounted." >&2
  exit 2
fi
commands command
