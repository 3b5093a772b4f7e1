#!/usr/bin/env bash
# Flower as the engine of a rehearsal: a SuperLink and a SuperNode for each site, on 127.0.0.1 alone, until it is stopped.
#   launch/silos_flower.sh PLAN WORKDIR NAME...    as launch/silos.sh --engine=flower calls it; the names in the plan's order
# FLOWER_VENV is the folder of an environment with flwr and this package (pip install --no-deps -e .); default: the current one.
# A SuperNode that ends is started again. Flower's own files and logs are in WORKDIR/flower.
set -euo pipefail

workdir=$(realpath "$2")
names=("${@:3}")
app=$(realpath "$(dirname "$0")/flower")
[[ ! ${FLOWER_VENV:-} ]] || export PATH=$FLOWER_VENV/bin:$PATH
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 # neither reports to Flower's makers
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2               # seconds; the default is 1
command -v flower-superlink >/dev/null || { echo "error: flwr is missing: set FLOWER_VENV." >&2 && exit 2; }

umask 077
here=$workdir/flower
mkdir -p "$here"
port=$((20000 + RANDOM % 10000))
link=''
declare -A nodes=()
stop() { # the SuperNodes first, which take their leave of the SuperLink
  trap - EXIT
  kill "${nodes[@]}" 2>/dev/null || true
  for pid in "${nodes[@]}"; do wait "$pid" || true; done
  kill "$link" 2>/dev/null || true
  wait
}
trap stop EXIT
trap 'exit 0' TERM INT
pause() { sleep "$1" & wait $!; } # a signal ends it

# The SuperLink's certificate, which is the authority that the others trust.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=127.0.0.1 \
  -addext subjectAltName=IP:127.0.0.1 -keyout "$here/link.key" -out "$here/link.pem" 2>/dev/null
export FLWR_HOME=$here/coordinator
mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' \
  "$port" "$here/link.pem" >"$FLWR_HOME/config.toml"
flower-superlink --host=127.0.0.1 --port=$port --ssl-certfile="$here/link.pem" --ssl-keyfile="$here/link.key" \
  --ssl-ca-certfile="$here/link.pem" --enable-supernode-auth --disable-runtime-dependency-installation \
  >"$here/superlink.log" 2>&1 &
link=$!

# The coordinator registers each site's key under the site's name.
until (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "$link" 2>/dev/null || exit 69
  pause 0.2
done
for name in "${names[@]}"; do
  [[ -e $here/$name.key ]] || ssh-keygen -q -t ecdsa -b 384 -N '' -C '' -f "$here/$name.key"
  flwr supernode register "$here/$name.key.pub" --name="$name"
done

start() { # the SuperNode of the site whose name and number are given
  FLWR_HOME=$here/$1 flower-supernode --superlink="127.0.0.1:$port" --root-certificates="$here/link.pem" \
    --auth-supernode-private-key="$here/$1.key" --host=127.0.0.1 --port=$((port + 1 + $2)) \
    --node-config="socket=\"$workdir/$1/site.sock\"" >>"$here/$1.log" 2>&1 &
  nodes[$1]=$!
  echo $! >"$here/$1.pid"
}
for number in "${!names[@]}"; do start "${names[number]}" "$number"; done
flwr run "$app" --run-config="office=\"$workdir/coordinator/office.sock\" sites=\"$(IFS=, && echo "${names[*]}")\""
while kill -0 "$link" 2>/dev/null; do
  for number in "${!names[@]}"; do
    kill -0 "${nodes[${names[number]}]}" 2>/dev/null || start "${names[number]}" "$number"
  done
  pause 2
done
exit 69
