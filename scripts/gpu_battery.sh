#!/usr/bin/env bash
# Everything that a machine with a CUDA device can tell about this checkout, without network.
#
#   OUT=dir bash scripts/gpu_battery.sh [--dry-run] [STAGE ...]        all stages by default
#
# Stages, each with a time limit of its own; one that fails does not stop the next:
#   info       driver, GPU, versions and tools                                   -> info.json
#   build      a wheel beside the PyTorch that is there, installed into a scratch folder; what an
#              earlier call built from the same sources is used again
#   tests      pytest -m gpu, then tests/ops, tests/executor and tests/runtime
#   sanitize   compute-sanitizer memcheck and racecheck on the GPU tests of SANITIZE_TESTS
#   ops        benchmarks/bench_ops.py                                           -> ops.json
#   profile    scripts/profile.py on the demo model, with nsys too where it is -> profile.json
#   flux       benchmarks/bench_flux.py, all sections; one of them: flux-buckets, flux-loops,
#              flux-memory, flux-compile, flux-overhead                          -> flux.json
#   wan        benchmarks/bench_wan.py likewise: wan-buckets, wan-loops          -> wan.json
#   summary    one page from all that is in OUT, on any machine                  -> summary.md
# Outcomes stand in stages.json, output in logs.txt, reports of tools in artifacts.tar.gz. Results
# that an earlier call left in the scratch folder for the same sources are put into OUT as well.
#
# Environment:
#   OUT          folder for results (default: gpu_battery_out)
#   SCRATCH      folder for builds (default: build/gpu_battery)
#   PYTHON       Python with PyTorch, pip and the build tools (default: python3)
#   WHEELS       folder with wheels of missing packages, installed into the scratch folder
#   LIMIT, LIMIT_BUILD, LIMIT_FLUX_LOOPS, ...   seconds for every stage, or for one
#   FLUX_ARGS    more arguments for bench_flux.py, e.g. "--height 1024 --batch 1 --steps 28"
#   WAN_ARGS     more arguments for bench_wan.py, e.g. "--videos 480x832x33 --steps 20"
#   SANITIZE_TESTS   files or folders in this checkout (default: tests/ops tests/runtime)
# All of it takes over an hour. Where a device is lent for minutes, name stages, what matters most
# first: build tests flux-buckets ops wan-buckets, each in a call of its own if need be.
# Exit code: 0, 1 if a stage failed, 2 for bad usage.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export OUT SCRATCH PYTHON DRY_RUN
OUT="$(realpath -m "${OUT:-gpu_battery_out}")"
SCRATCH="$(realpath -m "${SCRATCH:-$root/build/gpu_battery}")"
PYTHON="${PYTHON:-python3}"
DRY_RUN="${DRY_RUN:-}"
flux_stages=(flux-buckets flux-loops flux-memory flux-compile flux-overhead)
wan_stages=(wan-buckets wan-loops)
stages=(info build tests sanitize ops profile "${flux_stages[@]}" "${wan_stages[@]}" summary)
skipped_code=77

declare -A limits=(
  [info]=60 [build]=400 [tests]=560 [sanitize]=560 [ops]=300 [profile]=400 [flux-buckets]=560
  [flux-loops]=580 [flux-memory]=400 [flux-compile]=500 [flux-overhead]=560 [wan-buckets]=300
  [wan-loops]=900 [summary]=60)

say() { printf '[battery] %s\n' "$*"; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
report() { "$PYTHON" "$root/scripts/gpu_battery_report.py" "$@"; }

# Runs a command, or only shows it.
run() {
  printf '+ %s\n' "${*@Q}"
  [[ -n "$DRY_RUN" ]] || "$@"
}

# Why a stage did not do its work; goes into stages.json.
reason() {
  say "$*"
  [[ -n "$DRY_RUN" ]] || printf '%s' "$*" >"$SCRATCH/reason"
}

find_tool() { command -v "$1" || PATH=/usr/local/cuda/bin command -v "$1"; }

# All that the built package depends on.
fingerprint() {
  (
    cd "$root"
    find CMakeLists.txt pyproject.toml cmake csrc ddit_rt -type f \
      -not -name '*.so' -not -path '*/__pycache__/*' | LC_ALL=C sort | xargs -d '\n' sha256sum
    "$PYTHON" -VV
    "$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>&1 || true
  ) | sha256sum | cut -d' ' -f1
}

use_site() {
  export PYTHONPATH="$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}" DDIT_RT_HOME="$SCRATCH/home"
}

# Makes the build what Python imports, and checks that it is.
use_build() {
  local code='import sys, ddit_rt; sys.exit(not ddit_rt.__file__.startswith(sys.argv[1]))'
  use_site
  # Python puts the current folder first: here it holds no package that lacks its compiled parts.
  run mkdir -p "$SCRATCH/run"
  run cd "$SCRATCH/run"
  if [[ -n "$DRY_RUN" ]]; then return; fi
  if [[ ! -d "$SCRATCH/site/ddit_rt" ]]; then
    reason "nothing is built in $SCRATCH: run the stage build first"
    return 1
  fi
  if ! "$PYTHON" -c "$code" "$SCRATCH/site/"; then
    reason "$PYTHON does not import the ddit_rt in $SCRATCH/site; an editable install comes before" \
      "it: set PYTHON to one without"
    return 1
  fi
}

pip_target() {
  run "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SCRATCH/site" "$@"
}

stage_info() {
  use_site
  run report info --out "$OUT"
}

stage_build() {
  if [[ -n "${WHEELS:-}" ]]; then
    local wheels=("$WHEELS"/*.whl)
    if [[ ! -e "${wheels[0]}" ]]; then reason "no wheels in WHEELS=$WHEELS"; return 1; fi
    pip_target "${wheels[@]}"
  fi
  local wanted
  wanted="$(fingerprint)"
  if [[ "$(cat "$SCRATCH/build.stamp" 2>/dev/null)" == "$wanted" ]]; then
    say "using what an earlier call built from the same sources"
  else
    run rm -rf "$SCRATCH/wheel" "$SCRATCH"/site/ddit_rt*
    run "$PYTHON" -m pip wheel --quiet --no-index --no-build-isolation --no-deps \
      -C "build-dir=$SCRATCH/cmake" -C cmake.define.DDIT_RT_CUDA=ON \
      --wheel-dir "$SCRATCH/wheel" "$root"
    pip_target --find-links "$SCRATCH/wheel" ddit_rt
    if [[ -z "$DRY_RUN" ]]; then printf '%s' "$wanted" >"$SCRATCH/build.stamp"; fi
  fi
  # Again, with what was built; whether there is a device is for the stage info to say.
  use_site
  run report info --out "$OUT" || true
}

# The beginning of every pytest command; NAME.xml gets the results.
pytest_command() {
  command=("$PYTHON" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q
    --junitxml "$SCRATCH/bundle/$1.xml")
}

need_pytest() {
  if [[ -z "$DRY_RUN" ]] && ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
    reason "$PYTHON has no pytest: put its wheel and those of pluggy and iniconfig into WHEELS"
    return 1
  fi
}

stage_tests() {
  local status=0 command
  use_build && need_pytest || return 1
  run rm -f "$SCRATCH"/bundle/tests-*.xml
  pytest_command tests-gpu
  run "${command[@]}" -m gpu "$root/tests" || status=1
  pytest_command tests-native
  run "${command[@]}" -m 'not gpu' \
    "$root/tests/ops" "$root/tests/executor" "$root/tests/runtime" || status=1
  run report tests --out "$OUT" "$SCRATCH"/bundle/tests-*.xml || status=1
  if ((status)); then reason "tests failed; summary.md names them"; fi
  return "$status"
}

stage_sanitize() {
  local status=0 tool sanitizer command folders
  if ! sanitizer="$(find_tool compute-sanitizer)"; then
    reason "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    return "$skipped_code"
  fi
  read -ra folders <<<"${SANITIZE_TESTS:-tests/ops tests/runtime}"
  use_build && need_pytest || return 1
  for tool in memcheck racecheck; do
    pytest_command "sanitize-$tool"
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds are checked.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 86 \
      --log-file "$SCRATCH/bundle/sanitize-$tool.log" \
      "${command[@]}" -m gpu "${folders[@]/#/$root/}" || status=1
  done
  run report sanitize --out "$OUT" "$SCRATCH"/bundle/sanitize-*.log || status=1
  if ((status)); then reason "errors, or tests that failed; artifacts.tar.gz holds the logs"; fi
  return "$status"
}

stage_ops() {
  use_build || return 1
  run "$PYTHON" "$root/benchmarks/bench_ops.py" --device cuda --out "$OUT/ops.json"
}

stage_profile() {
  local status=0 nsys=1 profile=("$PYTHON" "$root/scripts/profile.py" demo)
  use_build || return 1
  if ! find_tool nsys >/dev/null; then
    nsys=0
    say "nsys is not installed: torch.profiler alone"
  fi
  run "${profile[@]}" --tool torch --executor loop --out "$SCRATCH/bundle" \
    --json "$OUT/profile.json" || status=1
  if ((nsys)); then
    run "${profile[@]}" --tool nsys --out "$SCRATCH/bundle" --json "$SCRATCH/bundle/nsys.json" \
      || status=1
  fi
  return "$status"
}

# real_size FAMILY SECTION LIMIT [ARGUMENT ...]: one section of a benchmark of a model at its real
# size.
real_size() {
  use_build || return 1
  run "$PYTHON" "$root/benchmarks/bench_$1.py" --device cuda --sections "$2" \
    --budget-s "$(($3 > 120 ? $3 - 60 : $3 / 2))" --artifact "$SCRATCH/$1.ddit" \
    --out "$OUT/$1.json" "${@:4}"
}

stage_summary() {
  run report summary --out "$OUT"
}

limit_of() {
  local name="LIMIT_${1^^}"
  name="${name//-/_}"
  printf '%s' "${!name:-${LIMIT:-${limits[$1]}}}"
}

# The body of one stage; runs in a process of its own, which can be stopped.
run_body() {
  local more=()
  case "$1" in
    flux-*) read -ra more <<<"${FLUX_ARGS:-}" ;;
    wan-*) read -ra more <<<"${WAN_ARGS:-}" ;;
  esac
  case "$1" in
    flux-* | wan-*) real_size "${1%%-*}" "${1#*-}" "$(limit_of "$1")" "${more[@]}" ;;
    *) "stage_$1" ;;
  esac
}

# Runs a stage under its limit and notes how it went. Returns 1 if it failed.
run_stage() {
  local stage="$1" limit log code=0 outcome why started=$SECONDS
  limit="$(limit_of "$stage")"
  log="$SCRATCH/logs/$stage.log"
  if [[ -n "$DRY_RUN" ]]; then
    say "$stage (limit $limit s)"
    (run_body "$stage") || code=$?
    ((code == 0 || code == skipped_code))
    return
  fi
  rm -f "$SCRATCH/reason"
  report record --out "$OUT" --stage "$stage" --outcome started --limit "$limit"
  timeout --kill-after=15 "$limit" bash "${BASH_SOURCE[0]}" --body "$stage" >"$log" 2>&1 || code=$?
  case "$code" in
    0) outcome=passed ;;
    "$skipped_code") outcome=skipped ;;
    124 | 137) outcome="timed out" ;;
    *) outcome=failed ;;
  esac
  why="$(cat "$SCRATCH/reason" 2>/dev/null || true)"
  if [[ "$outcome" == failed && -z "$why" ]]; then
    why="$(grep -vE '^( *$|\+ )' "$log" | tail -n 1 || true)"
  fi
  if [[ "$outcome" == failed || "$outcome" == "timed out" ]]; then tail -n 25 "$log"; fi
  if [[ "$stage" == info || "$stage" == summary ]] && ((code == 0)); then cat "$log"; fi
  say "$stage: $outcome in $((SECONDS - started)) s (limit $limit s)${why:+: $why}"
  report record --out "$OUT" --stage "$stage" --outcome "$outcome" \
    --seconds "$((SECONDS - started))" --limit "$limit" --reason "$why"
  { printf '\n===== %s: %s\n' "$stage" "$outcome"; cat "$log"; } >>"$OUT/logs.txt"
  keep_results
  [[ "$outcome" == passed || "$outcome" == skipped ]]
}

# Puts results of earlier calls on the same sources into an OUT that lacks them.
carry_results() {
  local wanted file
  wanted="$(fingerprint)"
  if [[ "$(cat "$SCRATCH/results/stamp" 2>/dev/null)" != "$wanted" ]]; then
    rm -rf "$SCRATCH/results" "$SCRATCH/bundle"
    mkdir -p "$SCRATCH/results" "$SCRATCH/bundle"
    printf '%s' "$wanted" >"$SCRATCH/results/stamp"
  fi
  for file in "$SCRATCH"/results/*.json; do
    if [[ -e "$file" && ! -e "$OUT/${file##*/}" ]]; then cp "$file" "$OUT"; fi
  done
}

# After every stage: the whole battery may be stopped before its end.
keep_results() {
  local file
  for file in "$OUT"/*.json; do
    if [[ -e "$file" ]]; then cp "$file" "$SCRATCH/results"; fi
  done
  if [[ -n "$(ls -A "$SCRATCH/bundle")" ]]; then
    tar -czf "$OUT/artifacts.tar.gz" -C "$SCRATCH/bundle" .
  fi
}

# Prints the stages that the arguments name.
expand() {
  local stage
  for stage in "$@"; do
    if [[ "$stage" == flux ]]; then
      printf '%s\n' "${flux_stages[@]}"
    elif [[ "$stage" == wan ]]; then
      printf '%s\n' "${wan_stages[@]}"
    elif [[ -n "${limits[$stage]:-}" ]]; then
      printf '%s\n' "$stage"
    else
      printf "[battery] there is no stage '%s'; the stages are: %s; flux and wan stand for their own\n" \
        "$stage" "${stages[*]}" >&2
      return 2
    fi
  done
}

main() {
  local arguments=() argument chosen stage failed=0
  for argument in "$@"; do
    case "$argument" in
      -h | --help) usage; return 0 ;;
      --dry-run) DRY_RUN=1 ;;
      *) arguments+=("$argument") ;;
    esac
  done
  if ((${#arguments[@]} == 0)); then arguments=("${stages[@]}"); fi
  chosen="$(expand "${arguments[@]}")" || return 2
  if [[ -z "$DRY_RUN" ]]; then
    mkdir -p "$OUT" "$SCRATCH/logs" "$SCRATCH/bundle"
    carry_results
  fi
  while read -r stage; do
    run_stage "$stage" </dev/null || failed=1
  done <<<"$chosen"
  return "$failed"
}

if [[ "${1:-}" == --body ]]; then
  run_body "$2"
else
  main "$@"
fi
