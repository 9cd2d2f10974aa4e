# Sourced by the launchers: --dry-run, messages, the interpreter.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An active environment comes first: that of `make demo` has JAX for the CPU.
# Conda's base is active in most shells, and nobody's choice.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  ACTIVE=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [[ ${VIRTUAL_ENV:-}${CONDA_DEFAULT_ENV:-} == base ]]; then ACTIVE=''; fi
  if [[ -n $ACTIVE && -x $ACTIVE/bin/python ]]; then
    PYTHON=$ACTIVE/bin/python
  elif [[ -x $ROOT/.venv/bin/python ]]; then
    PYTHON=$ROOT/.venv/bin/python
  fi
fi
DRY_RUN=''
ARGUMENTS=()

# Prints one line that says what is wrong, and ends with status 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Takes --dry-run out of the arguments; ARGUMENTS holds the others.
take_dry_run() {
  local argument
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then
      DRY_RUN=yes
    else
      ARGUMENTS+=("$argument")
    fi
  done
}

# Refuses forms of --workdir that the program takes and the launchers overlook.
need_arguments() {
  local argument
  if (($# == 0)); then
    fail "give the arguments of the run, such as --config=configs/cifar10.py --workdir=runs/cifar10"
  fi
  for argument in "$@"; do
    case $argument in
      --workdir | -workdir | -workdir=*)
        fail "give the workdir as one argument, --workdir=DIR, not as $argument"
        ;;
    esac
  done
}

# Prints the extras that a workdir in a bucket needs, each after a comma.
extras_of() {
  local argument
  for argument in "$@"; do
    case $argument in
      --workdir=gs://*) printf ',gcs' ;;
      --workdir=s3://*) printf ',s3' ;;
    esac
  done
}

# Runs a command; with --dry-run it is printed, as a shell would read it. With
# RUN=exec the command takes the place of the shell.
RUN=''
run() {
  if [[ -n $DRY_RUN ]]; then
    show "$@"
  else
    $RUN "$@"
  fi
}

show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}
