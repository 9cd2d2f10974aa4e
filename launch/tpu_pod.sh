#!/usr/bin/env bash
# Trains on a slice of TPUs of Google Cloud: creates or reuses the slice, installs
# this checkout on all workers, trains, goes on after a preemption, and deletes
# the slice at the end.
#
#   ZONE=us-east5-b TYPE=v5litepod-16 launch/tpu_pod.sh [--dry-run] NAME \
#       --config=configs/imagenet.py --workdir=DIR ...
#
# DIR is an address such as gs://BUCKET/FOLDER, or a folder that all workers see
# and that outlives the slice. Variables:
#
#   ZONE      the zone, required
#   TYPE      the accelerator type, required
#   VERSION   the runtime; default v2-alpha-tpuv5-lite
#   SPOT      yes: a slice that may be preempted, at a lower price
#   RESTARTS  how often it goes on after a preemption; default 100
#   KEEP      yes: the slice is not deleted at the end
#
# The project is that of `gcloud config`.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
if (($# == 0)) || [[ $1 == -* ]]; then fail 'give the name of the slice first'; fi
NAME=$1
shift
need_arguments "$@"
[[ -n ${ZONE:-} ]] || fail 'set ZONE, such as ZONE=us-east5-b'
[[ -n ${TYPE:-} ]] || fail 'set TYPE, such as TYPE=v5litepod-16'
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
RESTARTS=${RESTARTS:-100}
[[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || fail 'there is no gcloud; install the Google Cloud CLI'

tpu() { # the verb, then its options
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" "$@"
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" \
    --format='value(state)' 2>/dev/null || echo ABSENT
}

# Quoted for the shell of the workers.
printf -v TRAIN '%q ' python -m maskconnect_jax.main --multihost "$@"
ARCHIVE=$(mktemp -d)/maskconnect_jax.tar.gz
trap 'rm -rf "$(dirname "$ARCHIVE")"' EXIT

create() {
  local options=(--accelerator-type="$TYPE" --version="$VERSION")
  if [[ ${SPOT:-} == yes ]]; then options+=(--spot); fi
  tpu create "${options[@]}"
}

install() {
  run git -C "$ROOT" archive --format=tar.gz --output="$ARCHIVE" HEAD
  run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:maskconnect_jax.tar.gz" \
    --zone="$ZONE" --worker=all
  # The workers' own Python is 3.10; uv brings one that is new enough.
  tpu ssh --worker=all --command="rm -rf maskconnect_jax && mkdir maskconnect_jax && tar -xzf maskconnect_jax.tar.gz -C maskconnect_jax && python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 maskconnect_env && python3 -m uv pip install --quiet --python maskconnect_env/bin/python './maskconnect_jax[tpu,opencv$(extras_of "$@")]'"
}

# shellcheck disable=SC2016 # the workers expand it
train() { tpu ssh --worker=all --command='cd maskconnect_jax && PATH=$HOME/maskconnect_env/bin:$PATH '"${TRAIN% }"; }

if [[ -n $DRY_RUN ]]; then
  create
  install "$@"
  train
else
  for ((attempt = 0; ; attempt++)); do
    case $(state) in
      READY) ;;
      ABSENT) create ;;
      *) # preempted, or failed: it cannot be used again
        tpu delete --quiet
        create
        ;;
    esac
    status=0
    { install "$@" && train; } || status=$?
    if ((status == 0)) || [[ $(state) == READY ]]; then break; fi
    if ((attempt >= RESTARTS)); then
      echo "error: the slice was lost $((attempt + 1)) times" >&2
      break
    fi
    echo "the slice is lost; going on with a new one" >&2
  done
fi
if [[ ${KEEP:-} != yes ]]; then tpu delete --quiet; fi
exit "${status:-0}"
