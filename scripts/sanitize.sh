#!/usr/bin/env bash
# Builds the CPU ops with AddressSanitizer and UndefinedBehaviorSanitizer, and runs their tests under
# them: a few minutes, of which SECONDS_MOST (600) at most are the tests'. Arguments go to pytest.
# DDIT_RT_EXAMPLES=1000 draws as many shapes for each test. VENV names another environment than .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$(realpath "${VENV:-.venv}")"
export PATH="$venv/bin:$PATH"
build="$root/build/sanitize"
scratch="$(mktemp)"
trap 'rm -f "$scratch"' EXIT

version="$(python -c 'from importlib.metadata import version; print(version("ddit_rt"))')"
cmake -S . -B "$build" -G Ninja -Wno-dev \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDDIT_RT_CUDA=OFF -DSKBUILD_PROJECT_VERSION_FULL="$version" \
  -DPython_EXECUTABLE="$venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
  >"$scratch" 2>&1 || { cat "$scratch"; exit 1; }
cmake --build "$build"

# A package of the checkout's Python and these libraries, which no installed one may go before.
site="$build/site"
rm -rf "$site"
mkdir -p "$site/ddit_rt"
ln -s "$root"/ddit_rt/* "$site/ddit_rt/"
ln -sf "$build"/_ops.so "$build"/_runtime*.so "$site/ddit_rt/"
cat >"$site/sitecustomize.py" <<'PYTHON'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
PYTHON

# Python itself is not built so: the runtime has to be there before it, and its leaks are none of ours.
library() { "${CXX:-c++}" -print-file-name="$1"; }
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
(cd "$build" && python -c "import ddit_rt.ops._library as o; d = o._directory(); assert str(d) == '$site/ddit_rt', d")
timeout --signal=INT "${SECONDS_MOST:-600}" pytest -q -p no:cacheprovider \
  tests/ops/test_{products,pack,scores,solver,decide,reuse,drawn}.py "$@"
