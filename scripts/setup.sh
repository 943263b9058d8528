#!/usr/bin/env bash
# Makes a Python environment of this checkout ready, .venv: PyTorch, the other dependencies, and
# this package with its compiled parts. Safe to run again: it does only what is missing, and takes a
# second when nothing changed.
#
#   scripts/setup.sh [EXTRAS]     EXTRAS of pyproject.toml, comma-separated; default: test
#
# Environment:
#   VENV            the environment's folder, relative to the checkout (default: .venv)
#   PYTHON          the Python to make it with (default: the first python3 that is 3.10 or newer)
#   DDIT_RT_TORCH   what to install where there is no PyTorch yet (default: torch==2.13.0)
#   DDIT_RT_CUDA    AUTO (default), ON or OFF: whether to build the CUDA kernels
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-.venv}"
if [[ "$venv" != /* ]]; then venv="$root/$venv"; fi
extras="${1:-test}"
torch_spec="${DDIT_RT_TORCH:-torch==2.13.0}"
export DDIT_RT_CUDA="${DDIT_RT_CUDA:-AUTO}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] ERROR: %s\n' "$*" >&2; exit 1; }

is_recent_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    if is_recent_python "$candidate"; then command -v "$candidate"; return; fi
    if [[ -n "${PYTHON:-}" ]]; then fail "PYTHON=$PYTHON is not a Python 3.10 or newer."; fi
  done
  fail "no Python 3.10 or newer found. Install one (Debian, Ubuntu: apt install python3 python3-dev
  python3-venv), or set PYTHON to its path."
}

# Prints the version of the PyTorch that a Python sees, nothing if there is none. Does not import it.
torch_version() {
  "$1" -c 'import importlib.metadata as m
try: print(m.version("torch"))
except m.PackageNotFoundError: pass'
}

check_compiler() {
  local compiler
  for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
    if command -v "$compiler" >/dev/null; then return; fi
  done
  fail "no C++ compiler found. Install one (Debian, Ubuntu: apt install g++), or set CXX to its path."
}

check_headers() {
  "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || fail \
    "$1 has no C headers (Python.h). Install them (Debian, Ubuntu: apt install python3-dev)."
}

# PyTorch with CUDA needs about 6 GB, everything else less than 2 GB.
check_disk() {
  local needed_gb=2 free_gb
  if [[ -z "$(torch_version "$1")" ]]; then needed_gb=8; fi
  free_gb=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  if ((free_gb < needed_gb)); then
    fail "$root has $free_gb GB of free disk space and the set-up needs up to $needed_gb GB. Free
  some, or install PyTorch 2.11 or newer in the system's Python, which is used where it is found."
  fi
}

make_venv() {
  local python="$1" options=()
  # A PyTorch that is already there was chosen for this machine's GPU and driver: keep it.
  if [[ -n "$(torch_version "$python")" ]]; then
    say "using PyTorch $(torch_version "$python") of $python"
    options=(--system-site-packages)
  fi
  say "making $venv with $python"
  "$python" -m venv ${options[@]+"${options[@]}"} "$venv" || {
    rm -rf "$venv"
    fail "$python cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)."
  }
}

# Everything that the installed package depends on: if it is unchanged, so is the package.
fingerprint() {
  (
    cd "$root"
    find csrc cmake CMakeLists.txt pyproject.toml -type f | LC_ALL=C sort | xargs sha256sum
    "$venv/bin/python" -VV
    torch_version "$venv/bin/python"
    echo "$DDIT_RT_CUDA $root"
    command -v nvcc || true
  ) | sha256sum | cut -d' ' -f1
}

stamp_of() { echo "$venv/ddit_rt-${1//[^a-z]/-}.stamp"; }

# Whether these extras, or ones that include them, were installed from what is here now.
is_installed() {
  local wanted=("$extras") current one
  if [[ "$extras" == demo ]]; then wanted+=(test); fi
  if [[ "$extras" != *dev* ]]; then wanted+=(test,dev); fi
  [[ -x "$venv/bin/python" ]] || return 1
  current="$(fingerprint)"
  for one in "${wanted[@]}"; do
    if [[ "$(cat "$(stamp_of "$one")" 2>/dev/null)" == "$current" ]]; then return 0; fi
  done
  return 1
}

install_package() {
  local python="$venv/bin/python" constraints="$venv/ddit_rt-constraints.txt"
  # First and alone: a resolver that sees several packages at once may choose another PyTorch, and
  # bring several GB of it.
  if [[ -z "$(torch_version "$python")" ]]; then
    say "installing $torch_spec"
    "$python" -m pip install -q "$torch_spec"
  fi
  echo "torch==$(torch_version "$python")" >"$constraints"
  say "installing build tools"
  "$python" -m pip install -q -c "$constraints" \
    'scikit-build-core>=0.10' 'pybind11>=3' 'cmake>=3.25' ninja
  say "building and installing ddit_rt[$extras] (one to three minutes)"
  # Editable, so that an edited Python file takes effect at once. Tests import the package through
  # the import hook of that install, which comes before any path: the checkout, which has no
  # compiled modules, cannot shadow it.
  "$python" -m pip install -q -c "$constraints" --no-build-isolation \
    -C "cmake.define.DDIT_RT_CUDA=$DDIT_RT_CUDA" -e "$root[$extras]"
}

main() {
  local python
  if is_recent_python "$venv/bin/python"; then
    python="$venv/bin/python"
  else
    if [[ -e "$venv" ]]; then fail "$venv is not a working environment of Python 3.10 or newer.
  Remove it and start again."; fi
    python="$(find_python)"
  fi
  if is_installed; then return; fi
  check_compiler
  check_headers "$python"
  check_disk "$python"
  if [[ ! -e "$venv" ]]; then make_venv "$python"; fi
  install_package
  fingerprint >"$(stamp_of "$extras")"
  say "ready: $venv"
}

main
