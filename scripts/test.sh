#!/usr/bin/env bash
# Sets the environment up if needed, then runs the tests but for those that are marked slow and, where
# there is no GPU, those that are marked gpu: under ten minutes on two cores. Arguments go to pytest:
#   scripts/test.sh tests/ops
#   scripts/test.sh -m slow         the rest: long compiles, whole demos, training
#   scripts/test.sh -m 'not gpu'    all that a CPU can run
# VENV names another environment than .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh" "${DDIT_RT_EXTRAS:-test}"
cd "$root"
# A worker a core and one more, since compilers and servers are waited for, each with whole files, whose
# fixtures compile; torch would take all cores for each, and a worker takes about a GB.
workers=$(($(env -u OMP_NUM_THREADS nproc) + 1))  # nproc goes by that variable
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Modules are parsed once for all processes, and tests rewritten once for all workers.
export PYTHONDONTWRITEBYTECODE=
exec "${VENV:-.venv}/bin/python" -m pytest -n "$workers" --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder -m "not slow" "$@"
