#!/usr/bin/env bash
# Trains in N processes of this machine, as if each were a host with CPUs.
#
#   launch/local_hosts.sh [--dry-run] N --config=configs/digits.py --workdir=runs/two
#
# It is for trying what several hosts do, without them. Each process has DEVICES
# devices (default 2); config.batch_size must be a multiple of N times DEVICES.
# The output of process 0 is shown, that of the others begins with their number.
# SIGTERM and Ctrl-C go to all processes. The status is that of the first
# process that failed.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
if (($# == 0)) || ! [[ $1 =~ ^[1-9][0-9]?$ ]]; then
  fail 'give the number of processes first, from 1 to 99'
fi
COUNT=$1
shift
need_arguments "$@"
DEVICES=${DEVICES:-2}

PORT=12321
if [[ -z $DRY_RUN ]]; then
  PORT=$("$PYTHON" -c 'import socket
with socket.socket() as server:
  server.bind(("localhost", 0))
  print(server.getsockname()[1])')
fi

start() { # the number of the process, then the arguments
  local number=$1
  shift
  run env JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo \
    JAX_NUM_CPU_DEVICES="$DEVICES" JAX_COORDINATOR_ADDRESS="localhost:$PORT" \
    JAX_NUM_PROCESSES="$COUNT" JAX_PROCESS_ID="$number" \
    "$PYTHON" -m maskconnect_jax.main --multihost "$@"
}

if [[ -n $DRY_RUN ]]; then
  for ((number = 0; number < COUNT; number++)); do start "$number" "$@"; done
  exit
fi

# A job in the background ignores Ctrl-C, and so does what it starts.
PIDS=()
trap 'kill -TERM "${PIDS[@]}" 2>/dev/null || true' TERM INT
RUN='exec'
for ((number = 0; number < COUNT; number++)); do
  if ((number == 0)); then
    start 0 "$@" &
  else
    start "$number" "$@" > >(sed "s/^/[$number] /") \
      2> >(sed "s/^/[$number] /" >&2) &
  fi
  PIDS+=($!)
done

STATUS=0
for pid in "${PIDS[@]}"; do
  # The trap ends `wait` early, while the process still runs.
  while true; do
    own=0
    wait "$pid" || own=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  if ((own != 0 && STATUS == 0)); then STATUS=$own; fi
done
exit "$STATUS"
