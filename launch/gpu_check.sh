#!/usr/bin/env bash
# What only a GPU can show, in at most eight minutes on one GPU of 80 GB, without the hub or any weights:
#   launch/gpu_check.sh [--small] [--out=gpu_check.json]
# Install first: pip install -e '.[cuda13]' (Python 3.12, CUDA 13, JAX 0.11), and torch and peft where PEFT is to be timed beside.
# Each part that has ended is in the JSON file, whatever becomes of the others. --small rehearses it on a CPU in two minutes.
# Exit codes: 0 every check passed, 1 not so, 2 bad input (docs/machines.md).
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m experiments.gpu_check "$@"
