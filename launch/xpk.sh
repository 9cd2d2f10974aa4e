#!/usr/bin/env bash
# Trains on a cluster of Google Kubernetes Engine with xpk, on TPUs or GPUs.
#
#   CLUSTER=mine TPU=v5litepod-16 launch/xpk.sh [--dry-run] NAME \
#       --config=configs/imagenet.py --workdir=DIR ...
#   CLUSTER=mine GPU=h100-80gb-8 NODES=2 launch/xpk.sh NAME ...
#
# DIR is an address such as gs://BUCKET/FOLDER, or a folder that all pods see.
# Variables:
#
#   CLUSTER   the cluster, required
#   TPU, GPU  the type of the slice or of a node; one of them is required
#   NODES     nodes of GPUs; default 1
#   SLICES    slices of TPUs; default 1
#   IMAGE     the base image, which has Python 3.11 or newer; default python:3.12
#   RESTARTS  how often a workload goes on after a preemption; default 100
#
# Project and zone are those of `gcloud config`.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
if (($# == 0)) || [[ $1 == -* ]]; then fail 'give the name of the workload first'; fi
NAME=$1
shift
need_arguments "$@"
[[ -n ${CLUSTER:-} ]] || fail 'set CLUSTER, the name of the cluster'
[[ -n $DRY_RUN ]] || command -v xpk >/dev/null || fail 'there is no xpk; pip install xpk'

if [[ -n ${TPU:-} ]]; then
  EXTRA=tpu
  WHERE=(--tpu-type="$TPU" --num-slices="${SLICES:-1}")
elif [[ -n ${GPU:-} ]]; then
  EXTRA=cuda12
  WHERE=(--device-type="$GPU" --num-nodes="${NODES:-1}")
else
  fail 'set TPU, such as TPU=v5litepod-16, or GPU, such as GPU=h100-80gb-8'
fi
printf -v TRAIN '%q ' python -m maskconnect_jax.main --multihost "$@"
run xpk workload create --cluster="$CLUSTER" --workload="$NAME" "${WHERE[@]}" \
  --max-restarts="${RESTARTS:-100}" --base-docker-image="${IMAGE:-python:3.12}" \
  --script-dir="$ROOT" \
  --command="pip install --quiet '.[$EXTRA,k8s,opencv$(extras_of "$@")]' && ${TRAIN% }"
