#!/usr/bin/env bash
# All of a GPU's rows, in three parts of some minutes each, correctness first.
#
#   bash benchmarks/gpu.sh 1|2|3 [--quick]
#
# Results go to $OUT (runs/benchmarks), as JSON and as tables in PART.md. Each
# part stands alone; where compiled programs are kept ($OUT/xla), what an earlier
# part has compiled is read. A measurement that fails is named at the end. Part
# 3 needs torch and timm.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?usage: gpu.sh 1|2|3 [--quick]}
shift
export OUT=${OUT:-runs/benchmarks} XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=$OUT/xla
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=()

measure() {  # PROGRAM NAME ARGUMENTS...: a table, and NAME.json
  local program=$1 name=$2 began=$SECONDS
  shift 2
  printf '\n## %s: %s %s\n\n' "$name" "$program" "$*"
  $PYTHON "benchmarks/$program.py" "$@" --json="$OUT/$name.json" ||
    failed+=("$name")
  echo "$name: $((SECONDS - began)) s" >&2
}

first() {  # Is it right? Then: learned ÷ Fixed-Random, ÷ Fixed-Prev, dispatch
  JAX_PLATFORMS= $PYTHON - <<'PYTHON' || failed+=(gradients)
import runpy, sys
import jax, numpy as np
sys.path.insert(0, 'tests')
tests = runpy.run_path('tests/method/test_aggregate.py')
with jax.enable_x64(True):
  for count, batch in ((1, 4), (2, 3), (7, 4)):
    tests['test_gradients_are_those_of_autodiff'](count, batch)
print('float64 gradients equal autodiff on', jax.devices()[0].device_kind)
PYTHON
  measure torch_port check --check --models=resnet20 "$@"
  measure step_time step38 --models=resnet38 --steps=5 "${compared[@]}" "$@"
  measure step_time step110 --models=resnet110 --batches=128 --fan_in=10 \
    --steps=5 "${compared[@]}" "$@"
}

second() {  # Deep and wide, the bound, memory, inference, compiling
  measure step_time step110_1024 --models=resnet110 --batches=1024 \
    --fan_in=10 --steps=3 "${compared[@]}" "$@"
  measure roofline roofline --models=resnet38 --batches=1024 --steps=3 \
    --rules=learned,fixed_prev "$@"
  measure memory memory --models=resnet38,resnet110 --batches=1024 \
    --rules=learned,fixed_random,fixed_all "$@"
  measure step_time inference --inference --models=resnet38 --fan_in=10 "$@"
  # The goal is for two cores.
  JAX_COMPILATION_CACHE_DIR='' PYTHON="taskset -c 0,1 $PYTHON" \
    measure compile_time compile --models=resnet110 "$@"
}

third() {  # PyTorch, timm; busy from memory and from photographs
  measure torch_port torch38 --models=resnet38,resnet110 --steps=5 "$@"
  measure torch_port timm50 --models=resnet50 --batches=256 \
    --rules=fixed_prev --steps=3 --rounds=10 "$@"
  measure step_time busy --data=memory --models=resnet38 --batches=128 \
    --rules=learned --fan_in=10 --steps=5 "$@"
  $PYTHON benchmarks/imagenet_folder.py "$OUT/photographs" --train=2
  measure step_time busy50 --data="$OUT/photographs" --models=resnet50 \
    --batches=256 --rules=learned --fan_in=10 --steps=5 --rounds=10 "$@"
}

compared=(--rules=learned,fixed_random,fixed_prev)
case $part in
  1) first "$@" ;;
  2) second "$@" ;;
  3) third "$@" ;;
  *) echo "part $part is none of 1, 2, 3" >&2; exit 2 ;;
esac > >(tee "$OUT/part$part.md")
wait
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
