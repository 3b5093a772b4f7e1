#!/usr/bin/env bash
# A rehearsal on this machine of a federation whose parties share none: a process for each site, its relay, and the coordinator.
#   launch/silos.sh --sites=3 --data_dir=DIR [--workdir=DIR] [--engine=mailbox|nvflare|flower] [flags of experiments.run]
# DIR/<site>/train.csv is each site's own table, DIR/test.csv the coordinator's public one. Say how they are written, as in
#   launch/silos.sh --sites=3 --data_dir=banks --text_column=text --label_column=label --flagfile=finance.flags --dataset=csv
# Started again with the same workdir, it goes on where it was. It ends with each site's epsilon and the public score.
set -euo pipefail

sites='' data_dir='' workdir=runs/silos engine=mailbox carrier='' most_epsilon=1000 settings=() columns=()
for word in "$@"; do
  case $word in
    --sites=*) sites=${word#*=} ;;
    --data_dir=*) data_dir=${word#*=} ;;
    --workdir=*) workdir=${word#*=} ;;
    --engine=*) engine=${word#*=} ;;
    --most_epsilon=*) most_epsilon=${word#*=} ;;
    --text_column=* | --label_column=* | --prompt_column=* | --answer_column=* | --encoding=* | --separator=*)
      columns+=("$word")
      ;;
    *) settings+=("$word") ;;
  esac
done
fail() { echo "error: $1" >&2 && exit 2; }
[[ $data_dir && -d $data_dir ]] || fail "--data_dir=$data_dir is no folder: give one with a folder for each site, and test.csv."
[[ $engine == mailbox || $engine == nvflare || $engine == flower ]] || fail "--engine=$engine is not mailbox, nvflare or flower."
[[ $engine != nvflare ]] || command -v "${NVFLARE_VENV:+$NVFLARE_VENV/bin/}nvflare" >/dev/null ||
  fail "--engine=nvflare needs nvflare: set NVFLARE_VENV to the folder of its environment (docs/nvflare.md)."
names=()
for folder in "$data_dir"/*/; do names+=("$(basename "$folder")"); done
[[ ! $sites || ${#names[@]} == "$sites" ]] || fail "$data_dir has ${#names[@]} folders, and --sites=$sites."
((${#names[@]} > 1)) || fail "$data_dir needs a folder for each of two or more sites."

silo() { python -m experiments.silo "$@"; }
coordinator=$workdir/coordinator
mkdir -p "$workdir"
cards=() approvals=()
for name in "${names[@]}"; do
  here=$workdir/$name
  [[ -e $here/card.json ]] ||
    silo keys --name="$name" --workdir="$here" "${settings[@]}" --data_dir="$data_dir/$name" "${columns[@]}"
  cards+=("$here/card.json")
  approvals+=("$here/approval.json")
done
join() { local IFS=,; echo "$*"; }
[[ -e $coordinator/plan.json ]] ||
  silo plan --sites="$(join "${cards[@]}")" --workdir="$coordinator" "${settings[@]}" --test_data="$data_dir/test.csv" "${columns[@]}"
plan=$coordinator/plan.json
for name in "${names[@]}"; do
  [[ -e $workdir/$name/approval.json ]] ||
    silo check "$plan" --workdir="$workdir/$name" --data_dir="$data_dir/$name" "${columns[@]}" \
      --most_epsilon="$most_epsilon" --most_delta=1 --rehearsal >"$workdir/$name/check.txt"
done

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT # each is a process of its own, no subshell
port=$((20000 + RANDOM % 20000))
engine_flags=(--listen="127.0.0.1:$port")
[[ $engine == mailbox ]] || engine_flags=(--engine=socket)
for name in "${names[@]}"; do
  python -m experiments.silo serve "$plan" --workdir="$workdir/$name" --data_dir="$data_dir/$name" "${columns[@]}" &
  pids+=($!)
  if [[ $engine == mailbox ]]; then
    python -m experiments.silo relay "$plan" --at="127.0.0.1:$port" --socket="$workdir/$name/site.sock" --relay="$workdir/$name/relay" \
      2>"$workdir/$name/relay.log" &
    pids+=($!)
  fi
done
if [[ $engine != mailbox ]]; then
  "$(dirname "$0")/silos_$engine.sh" "$plan" "$workdir" "${names[@]}" >"$workdir/$engine.log" 2>&1 &
  carrier=$!
  pids+=("$carrier")
fi
python -m experiments.silo coordinate "$plan" --workdir="$coordinator" --approvals="$(join "${approvals[@]}")" \
  "${engine_flags[@]}" --test_data="$data_dir/test.csv" "${columns[@]}" &
coordinating=$! ended='' # in the background, so that it does not outlive this script
pids+=("$coordinating")
wait -n -p ended "$coordinating" ${carrier:+"$carrier"} || exit
[[ $ended == "$coordinating" ]] || fail "the engine has ended: look into $workdir/$engine.log, and start again to go on."
for name in "${names[@]}"; do
  for _ in {1..100}; do
    [[ -e $workdir/$name/report.html ]] && break
    sleep 0.2
  done
  python -m experiments.ledger verify "$workdir/$name"
done
