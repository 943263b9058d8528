#!/usr/bin/env bash
# What a GPU that is there for minutes can tell of this checkout: one call, at most nine minutes, no
# network. What matters most comes first, every figure is written down as it is measured, and what
# refuses to run gives way to the next best thing.
#
#   bash scripts/gpu_battery.sh pack     before, with network: gathers in .whl what must travel with
#                                        the checkout, and checks the size of both
#   OUT=dir bash scripts/gpu_battery.sh  on the machine; a second call goes on where the first ended
#
# OUT gets log.txt, steps.jsonl (what ran, and how it ended), flux_CARD.json, flux-fp8_CARD.json,
# wan_CARD.json, demo.json and summary.md. FROM=dir goes on from the OUT of a call on another machine.
#
# Environment: PYTHON (with PyTorch), DEVICE=cpu PRESET=tiny for a rehearsal, END (seconds after which
# nothing goes on), ONLY (an expression that the names of steps match, for a part of them), WHEELS
# (.whl), SCRATCH (build/gpu_battery). For pack: MAX_MIB, and WHEEL, a wheel of this checkout that is
# built already; otherwise PYTHON builds one, which should be the machine's version: a wheel that
# does not fit is built again there.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${PRESET:=flux-dev}" "${END:=520}" "${WHEELS:=$root/.whl}"
work="$(realpath -m "${SCRATCH:-$root/build/gpu_battery}")"
pace=1
[[ $DEVICE == cuda ]] || pace=4 # limits are a GPU's
visit=("$PYTHON" "$root/scripts/gpu_visit.py")
install=("$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site")

if [[ "${1:-}" == pack ]]; then
  set -e
  rm -rf "$WHEELS" && mkdir -p "$WHEELS"
  # What the machine lacks: diffusers, in the version that the tests ran with, and what it needs.
  diffusers="$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("diffusers"))')"
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -d "$WHEELS" \
    "diffusers==$diffusers" importlib_metadata zipp "torchao>=0.18"
  if [[ -n "${WHEEL:-}" ]]; then cp "$WHEEL" "$WHEELS"; else
    "$PYTHON" -m pip wheel -q --no-build-isolation --no-deps -w "$WHEELS" "$root"
  fi
  # FLUX's blocks, lowered here: what is timed there if no compile ends. Needs a CUDA build of torch.
  mkdir -p "$work/lib" && g++ -shared -xc++ /dev/null -Wl,-soname,libcuda.so.1 -o "$work/lib/libcuda.so"
  "${install[@]}" "$WHEELS"/ddit_rt-*.whl
  LIBRARY_PATH="$work/lib" CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" PYTHONPATH="$work/site" "$PYTHON" \
    "$root/benchmarks/bench_lowering.py" --out "$work/lowered.json" --keep "$WHEELS/lowered" \
    --blocks FluxTransformerBlock FluxSingleTransformerBlock || echo "no lowered blocks travel"
  exec "${visit[@]}" size "$WHEELS" --limit-mib "${MAX_MIB:-64}"
elif (($#)); then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  [[ "$1" == --help || "$1" == -h ]] && exit 0 || exit 2
fi

out="$(realpath -m "${OUT:-gpu_battery_out}")"
key="$(cd "$root" && find csrc ddit_rt benchmarks -name __pycache__ -prune -o \
  '(' -name '*.py' -o -name '*.[ch]*' ')' -print | LC_ALL=C sort |
  xargs sha256sum | sha256sum | cut -c1-16) $(nvidia-smi -L 2>/dev/null | cut -d'(' -f1 | head -1)"
mkdir -p "$out" "$work/lib" "$work/site" "$work/out"
cd "$work" || exit 1
# Earlier records are of use only if the sources and the card are the same.
if grep -qsF "\"key\": \"$key\"" "${FROM:-$work/out}/steps.jsonl"; then
  cp "${FROM:-$work/out}"/*.json* "$out"
else rm -f "$work"/out/*; fi
exec > >(tee -a "$out/log.txt") 2>&1

# AOTInductor finds cuda.h by CUDA_HOME (a shim of nvcc elsewhere on PATH misleads torch), and links
# -lcuda, which ld finds by that name only, in LIBRARY_PATH.
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" PATH="/usr/local/cuda/bin:$PATH"
driver="$(ldconfig -p 2>/dev/null | awk '/libcuda\.so\.1 /{print $NF; exit}')"
ln -sf "${driver:-/usr/local/nvidia/lib64/libcuda.so.1}" lib/libcuda.so
export LIBRARY_PATH="$work/lib:$CUDA_HOME/lib64/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" DDIT_RT_HOME="$work/home"
export DDIT_RT_STALL_SECONDS="${DDIT_RT_STALL_SECONDS:-30}" # a loop that hangs must not eat the visit

note() { echo "{$1}" | tee -a "$out/steps.jsonl" && cp "$out"/*.json* "$work/out"; }
finished() { grep -qsF "\"step\": \"$1\", \"code\": 0," "$out/steps.jsonl"; }
step() { # step NAME LIMIT COMMAND...: never past END, and not again what an earlier call finished
  local name=$1 limit=$(($2 * pace)) left=$((END - SECONDS)) code=0 from=$SECONDS
  shift 2
  [[ $name =~ ^("wheel "|build$) || $name =~ ^(${ONLY:-.*})$ ]] || return 1
  if [[ -z "${again:-}" ]] && finished "$name"; then
    echo "=== $name: an earlier call has done it"
    return
  fi
  ((limit = limit < left ? limit : left, limit > 5)) ||
    { note "\"step\": \"$name\", \"code\": \"no time\", \"from\": $from, \"seconds\": 0"; return 1; }
  echo "=== $name at $SECONDS s (limit $limit s): ${*@Q}"
  timeout --kill-after=5 "$limit" "$@" || code=$?
  note "\"step\": \"$name\", \"code\": $code, \"from\": $from, \"seconds\": $((SECONDS - from))"
  return $code
}
budget() { # what a benchmark may take of its limit: it has to start, and to end by itself
  local limit=$(($1 * pace)) left=$((END - SECONDS))
  ((left = left < limit ? left : limit))
  echo $((left > 60 ? left - 20 : left / 2))
}
bench() { # bench NAME LIMIT MODEL ARGUMENT...: a benchmark that stops by itself and has a good row
  local preset=$PRESET model=${3%%-*} kind=()
  [[ $model == flux || $PRESET == tiny ]] || preset=wan-1.3b
  [[ $model == "$3" ]] || kind=(--quantization "${3#*-}")
  [[ $3 != flux ]] || kind=(${lowered[@]+"${lowered[@]}"}) # what travels is of plain FLUX alone
  step "$1" "$2" "${visit[@]}" bench "$out/${3}_$card.json" --model "$model" --device "$DEVICE" \
    --preset "$preset" --artifact "$work/$3.ddit" --repeats 3 --warm-up-limit-s $((70 * pace)) \
    --budget-s $(budget "$2") ${kind[@]+"${kind[@]}"} "${@:4}"
}
tests() { # tests NAME LIMIT PYTEST-ARGUMENT...: those for a GPU; on a CPU all of them are skipped
  step "$1" "$2" "$PYTHON" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
    -q -o filterwarnings=default --timeout 40 -m gpu --junitxml "$work/$1.xml" "${@:3}"
}

note "\"step\": \"start\", \"key\": \"$key\""
if ! "$PYTHON" -c 'import ddit_rt._runtime, diffusers'; then
  for wheel in "$WHEELS"/*.whl; do again=1 step "wheel ${wheel##*/}" 60 "${install[@]}" "$wheel"; done
fi
"$PYTHON" -c 'import ddit_rt._runtime' || again=1 step build 150 "${install[@]}" --no-build-isolation \
  -C cmake.define.DDIT_RT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real "$root"
card="$("${visit[@]}" card)" || { note '"step": "import", "code": 1, "from": 0, "seconds": 0'; exit 1; }
size=() video=() lowered=() eight=fp8
if [[ $PRESET == flux-dev ]]; then size=(--height 1024 --batch 1) video=(--videos 480x832x33); fi
[[ $DEVICE == cuda ]] || eight=int8 # the product in 8 bits that a CPU has

# The blocks compile on idle cores while the device's own rules are tried; those say what may run.
# More compiles at once take so much longer that none ends in time, and this one takes minutes there.
compiling=""
if [[ ! -d flux.ddit ]]; then
  again=1 bench compile 300 flux --sections compile "${size[@]}" --steps 8 &
  compiling=$!
fi
tests rules 110 "$root/tests/runtime/test_step_gpu.py" -k "not emulator"
form="$("${visit[@]}" form "$out/steps.jsonl" --junit "$work/rules.xml" --device "$DEVICE")"
# There is no second time for a compile.
if [[ -n "$compiling" ]] && ! wait "$compiling" && [[ ! -d flux.ddit ]]; then
  if [[ -d $WHEELS/lowered ]]; then lowered=(--lowered "$WHEELS/lowered"); else form=eager; fi
fi

# The form that passed; where it refuses all the same, the host picks; at last, blocks as torch runs
# them. What an earlier call found stays.
for try in $form host eager; do finished "buckets-$try" && form=$try; done
for try in $form host eager; do
  case "$try" in
    eager) how=(--executors host --backend eager) ;;
    *) how=(--executors "$try") ;;
  esac
  [[ $DEVICE == cuda ]] || how=(--executors auto)
  bench "buckets-$try" 130 flux --sections buckets blocks kernels "${size[@]}" "${how[@]}" && break
done

loops() { # loops NAME LIMIT MODEL ARGUMENT...: ours at their best setting beside diffusers'
  bench "$1" "$2" "$3" --sections loops "${how[@]}" "${@:4}"
}
ours=("ddit_rt_*_fine" "ddit_rt_*_paper_2*" "ddit_rt_*_paper_3*" "ddit_rt_*_dynamic")
few=(--steps 28) many=(--steps 50) wan=(--steps 30)
[[ $PRESET != tiny ]] || few=(--steps 8) many=(--steps 10) wan=(--steps 4)
loops loops 200 flux "${size[@]}" "${few[@]}" --methods "${ours[@]}" compile_regional
bench "buckets-$eight" 200 "flux-$eight" --sections buckets blocks "${size[@]}" "${how[@]}"
bench wan-buckets 200 wan --sections buckets blocks "${video[@]}" "${wan[@]}" "${how[@]}"
loops loops-50 150 flux "${size[@]}" "${many[@]}" --methods "${ours[@]}"
if [[ $PRESET == flux-dev ]]; then
  bench buckets-512 90 flux --sections buckets --height 512 --batch 1 "${how[@]}"
  bench buckets-batch-4 120 flux --sections buckets --height 1024 --batch 4 "${how[@]}"
fi
loops wan-loops 150 wan "${video[@]}" "${wan[@]}" --methods "${ours[@]}" compile_regional
tests ops 60 "$root/tests/ops/test_pack_kernels.py" "$root/tests/benchmarks/test_ops_cuda.py"
# Its cache would hide what is out of bounds, and without it nothing can be captured: ops alone.
if [[ $DEVICE == cuda ]] && command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitize 90 compute-sanitizer --tool memcheck \
    --error-exitcode 86 "$PYTHON" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q \
    -p no:cacheprovider -o filterwarnings=default -m gpu "$root/tests/ops/test_pack_kernels.py"
fi
step demo 120 "$PYTHON" -m ddit_rt.cli demo --device "$DEVICE" --out demo && cp demo/report.json "$out/demo.json"
"${visit[@]}" summary "$out"
