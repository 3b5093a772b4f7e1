#!/usr/bin/env bash
# NVFLARE as the engine of launch/silos.sh, all on 127.0.0.1: a server, a client for each site, and the job, submitted again
# whenever it has ended. It runs until it is killed, and stops all that it started.
#   launch/silos_nvflare.sh PLAN WORKDIR NAME...
# NVFLARE_VENV is the folder of the environment that has nvflare and this package (docs/nvflare.md); default: the current one.
set -euo pipefail

plan=$(realpath "$1") workdir=$(realpath "$2") names=("${@:3}")
files=${NVFLARE_FILES:-$(realpath "$(dirname "$0")")/nvflare} # other files than the ones here: for rehearsals of a refusal
home=$workdir/nvflare kits=$workdir/nvflare/made/dplora_jax/prod_00
admin=(--startup-kit "$kits/admin@coordinator.example")
[[ ${NVFLARE_VENV:-} ]] && export PATH=$NVFLARE_VENV/bin:$PATH
export DPLORA_COORDINATOR; DPLORA_COORDINATOR=$(dirname "$plan")

provision() {
  local port=$((20000 + RANDOM % 20000))
  rm -rf "$home" && mkdir -p "$home"
  sed "s/8002/$port/" "$files/project.yml" >"$home/project.yml"
  for name in "${names[@]}"; do
    printf '  - {name: %s, type: client, org: %s}\n' "$name" "$name" >>"$home/project.yml"
  done
  nvflare provision -p "$home/project.yml" -w "$home/made"
  for name in "${names[@]}"; do cp "$files"/site/*.json "$kits/$name/local"; done
  cp "$files/server/authorization.json" "$kits/localhost/local"
  sed "s|STORE|$home/store|g" "$files/server/resources.json" >"$kits/localhost/local/resources.json"
  cp -r "$files/job" "$home/job"
  sed -i "s/SITES/${#names[@]}/" "$home/job/meta.json"
}

family() { # a process's descendants: that of a job leads a session of its own
  local child
  for child in $(pgrep -P "$1"); do
    family "$child"
    echo "$child"
  done
}
stop() {
  trap '' TERM
  local all
  mapfile -t all < <(family $$)
  kill "${all[@]}" 2>/dev/null || true
  sleep 1
  kill -KILL "${all[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
waiting() { "$@" & wait $!; } # so that a signal is heard meanwhile

provision
for name in localhost "${names[@]}"; do
  DPLORA_SITE_SOCKET=$workdir/$name/site.sock "$kits/$name/startup/sub_start.sh" &
done
while true; do
  waiting sleep 2
  [[ -S $DPLORA_COORDINATOR/office.sock ]] || continue
  waiting nvflare --format json job submit -j "$home/job" "${admin[@]}" >"$home/submitted.json" || continue
  job=$(sed -n 's/.*"job_id": *"\([^"]*\)".*/\1/p' "$home/submitted.json" | head -1)
  waiting nvflare job wait "$job" "${admin[@]}" || true
done
