#!/usr/bin/env bash
# Runs the tests under several versions of Python and PyTorch, and writes what came of it into
# docs/matrix.md: a row per combination, the newest outcome.
#
#   scripts/matrix.sh [COMBINATION ...]        3.12+2.11.0 and default by default
#
# A COMBINATION is PYTHON+TORCH or PYTHON+TORCH+DIFFUSERS, e.g. 3.12+2.11.0 or 3.11+2.13.0+0.41.0, with
# an environment of its own in build/matrix that is made where it is missing (6 GB with CUDA libraries,
# which PyPI's PyTorch for Linux brings); or `default`, the environment that scripts/setup.sh makes.
#
# Environment:
#   PYTHON312, PYTHON313, ...   the Python of that version (default: PYTHON if it is one, python3.12,
#                               python3 if it is one, or one of pyenv's)
#   DDIT_RT_CUDA and, for `default`, PYTHON and DDIT_RT_TORCH go to scripts/setup.sh
# Exit code: 0, 1 if tests failed or could not run, 2 for bad usage.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$root/build/matrix"
combinations=("$@")
if (($# == 0)); then combinations=(3.12+2.11.0 default); fi

say() { printf '[matrix] %s\n' "$*"; }
bad_usage() { printf '[matrix] ERROR: %s\n' "$*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

split() { IFS=+ read -r python_version torch_version diffusers_version <<<"$1"; }

environment_of() {
  split "$1"
  if [[ "$1" == default ]]; then echo "$root/.venv"; return; fi
  echo "$folder/py$python_version-torch$torch_version${diffusers_version:+-diffusers$diffusers_version}"
}

is_python() {
  "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

# pyenv's own python3.12 on the path works only for versions that `pyenv global` names.
find_python() {
  local version="$1" variable="PYTHON${1//./}" candidate
  local pyenv="${PYENV_ROOT:-$HOME/.pyenv}/versions"
  if [[ -n "${!variable:-}" ]]; then
    if is_python "${!variable}" "$version"; then echo "${!variable}"; return; fi
    bad_usage "$variable=${!variable} is not a Python $version."
  fi
  for candidate in ${PYTHON:+"$PYTHON"} "python$version" python3 "$pyenv/$version".*/bin/python; do
    if is_python "$candidate" "$version"; then echo "$candidate"; return; fi
  done
  bad_usage "no Python $version found: install one, or set $variable to its path."
}

check_combination() {
  local name floor given
  if [[ "$1" == default ]]; then return; fi
  if [[ ! "$1" =~ ^3\.1[0-9](\+[0-9]+\.[0-9]+\.[0-9]+){1,2}$ ]]; then
    bad_usage "no combination '$1': give 'default', or PYTHON+TORCH with Python 3.10 or newer," \
      "such as 3.12+2.11.0, with +DIFFUSERS behind it or without."
  fi
  split "$1"
  for name in torch diffusers; do
    floor="$(sed -n "s/^ *\"$name>=\([0-9.]*\)\",\$/\1/p" "$root/pyproject.toml")"
    given="${name}_version"
    if [[ -n "${!given}" && "$(printf '%s\n' "$floor" "${!given}" | sort -V | head -n 1)" != "$floor" ]]
    then bad_usage "no combination '$1': ddit_rt needs $name $floor or newer."; fi
  done
  [[ -e "$(environment_of "$1")" ]] || find_python "$python_version" >/dev/null
}

# Made here, not by setup.sh, which would take over a PyTorch of the system's Python.
make_environment() {
  local python venv
  venv="$(environment_of "$1")"
  if [[ "$1" == default || -e "$venv" ]]; then return; fi
  python="$(find_python "$python_version")"
  say "making $venv with $python"
  mkdir -p "$folder"
  "$python" -m venv "$venv" || { rm -rf "$venv"; return 1; }
  # First torch, for the reason that scripts/setup.sh gives; what is there already stays.
  if [[ -n "$diffusers_version" ]]; then
    "$venv/bin/python" -m pip install -q "torch==$torch_version" || return 1
    "$venv/bin/python" -m pip install -q "diffusers==$diffusers_version" || return 1
  fi
}

test_one() {
  local venv report="$folder/$1.xml" code=0 torch=()
  venv="$(environment_of "$1")"
  if [[ "$1" != default ]]; then torch=("DDIT_RT_TORCH=torch==$torch_version"); fi
  make_environment "$1" || return 1
  mkdir -p "$folder"
  rm -f "$report"
  env "VENV=$venv" ${torch[@]+"${torch[@]}"} \
    "$root/scripts/test.sh" -m "not gpu" --junitxml "$report" || code=$?
  # Above 1, pytest did not get to its end; without a report it did not start.
  if ((code > 1)) || [[ ! -e "$report" ]]; then
    say "$1: no outcome, the tests did not run to their end"
    return 1
  fi
  "$venv/bin/python" "$root/scripts/matrix_table.py" --combination "$1" --junit "$report" \
    --table "$root/docs/matrix.md" || return 1
  return "$code"
}

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then usage; exit; fi
for combination in "${combinations[@]}"; do check_combination "$combination"; done
failed=()
for combination in "${combinations[@]}"; do
  say "$combination"
  test_one "$combination" || failed+=("$combination")
done
if ((${#failed[@]})); then say "failed: ${failed[*]}"; exit 1; fi
say "passed: ${combinations[*]}"
