#!/usr/bin/env bash
# Trains on all NVIDIA GPUs of this machine, in one process.
#
#   launch/gpu.sh [--dry-run] --config=configs/cifar10.py --workdir=runs/cifar10 ...
#
# All arguments but --dry-run go to python -m maskconnect_jax.main. With
# CUDA_VISIBLE_DEVICES=0,1 it takes these GPUs alone. PYTHON names the
# interpreter, by default that of the active environment, else .venv's, else
# python3. JAX for CUDA: pip install '.[cuda13]'.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_dry_run "$@"
set -- "${ARGUMENTS[@]}"
need_arguments "$@"

if [[ -z $DRY_RUN ]]; then
  if ! command -v nvidia-smi >/dev/null; then
    fail 'there is no nvidia-smi, and so no NVIDIA GPU; on a CPU run python -m maskconnect_jax.main'
  fi
  nvidia-smi --list-gpus >&2
fi
# Without a GPU build of JAX the run would go on silently on the CPU.
run env JAX_PLATFORMS=cuda "$PYTHON" -m maskconnect_jax.main "$@"
