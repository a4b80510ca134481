#!/usr/bin/env bash
# All checks that need a GPU, in one call of under ten minutes: build, tests, compute-sanitizer, benchmarks, and whole
# models.
#
#     bench/gpu_check.sh OUTDIR
#
# Writes to OUTDIR a log per section, the benchmarks' rows and plot, and summary.txt, which is also printed last. Installs
# the package into the environment of python3, which must have torch, pytest, cmake and ninja; queries no package index.
# Exit status: 0 all passed, 1 a section failed, 2 wrong use, 3 no GPU, 4 the reference would be timed, not the compiled
# library (with the section build: the sections bench and models fail instead).
#
#     STS_CHECK_SECTIONS   some of "build tests sanitize bench models", default: all. Without build, tests use the installed
#                          package; bench and models use the checkout, which must have its library
#     STS_CHECK_SECONDS    time for all sections, default: 560. A section that exceeds its share is stopped; the others run
#     STS_CHECK_QUICK=1    few samples, only the main shapes, only memcheck
#     STS_CHECK_COMMIT     commit to record if there is no git checkout
#     TORCH_CUDA_ARCH_LIST as for every build; 9.0 alone saves time on an H100 or H200
set -euo pipefail
exec </dev/null
declare -A WEIGHT=([build]=16 [tests]=15 [sanitize]=14 [bench]=13 [models]=22)  # shares of the time

if [ $# -ne 1 ]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
read -ra sections <<<"${STS_CHECK_SECTIONS:-build tests sanitize bench models}"
total=0
for name in "${sections[@]}"; do
  if [ -z "${WEIGHT[$name]:-}" ]; then
    echo "STS_CHECK_SECTIONS: expected build, tests, sanitize, bench or models, got '$name'" >&2
    exit 2
  fi
  total=$((total + WEIGHT[$name]))
done
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
if ! python3 -c 'import sys, torch
found = torch.cuda.is_available()
print("GPU:", torch.cuda.get_device_name() if found else f"none: torch {torch.__version__} sees no CUDA GPU")
sys.exit(not found)'; then
  echo "gpu_check.sh checks what needs a GPU; .ci/run checks the rest." >&2
  exit 3
fi
if [[ " ${sections[*]} " != *" build "* && " ${sections[*]} " =~ \ (bench|models)\  ]]; then
  python3 -m bench.backends --device cuda
fi
BUILD=$PWD/build/gpu_check
mkdir -p "$BUILD"
export OUT BUILD OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

build() {
  # The smoke program and the library are compiled in parallel: each mostly waits for one long nvcc.
  { cmake -S python_tests/emulator -B "$BUILD" -G Ninja -DSTS_KERNELS_CUDA=1 && cmake --build "$BUILD"; } >"$BUILD.log" 2>&1 &
  local status=0
  python3 -m pip install --no-build-isolation --no-deps --force-reinstall . || status=1
  wait $! || status=1
  cat "$BUILD.log"
  python3 -P -m sts_kernels info
  return $status
}

tests() {
  # -P: imports the installed package, not the checkout's. Four OpenMP threads: pytest's workers share the cores.
  export STS_KERNELS_TEST_REQUIRE=cuda,native OMP_NUM_THREADS=4
  local workers=() status=0
  if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  python3 -P -m pytest python_tests "${workers[@]}" -q || status=1
  python3 -P -m pytest -m slow python_tests/test_large.py -q || status=1
  return $status
}

sanitize() {
  local end=$((SECONDS + SECONDS_LEFT - 15)) status=0 runs=(none memcheck synccheck initcheck racecheck)
  if [ -n "${STS_CHECK_QUICK:-}" ]; then runs=(none memcheck); fi
  local left=${#runs[@]} tool log under calls verdicts=()
  for tool in "${runs[@]}"; do
    log=$BUILD/$tool.log under= calls=()
    if [ "$tool" != none ]; then
      under="compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 --log-file $log"
      calls=(--work 2e4) # a fifth of all calls
    fi
    # racecheck did not finish those calls in 40 s on an H200. It gets one call per kernel and algorithm, of several warps.
    if [ "$tool" = racecheck ]; then calls=(--work 6e4 --per-kernel 1); fi
    printf '\n==== %s\n' "${under:-no tool}"
    : >"$log"
    # The last run gets a double share of the time: racecheck is slow. Unused time goes to the runs that follow.
    timeout -k 5 $(((end - SECONDS) / (left + (left > 1)) + 1)) python3 -m python_tests.emulator.smoke \
      --binary "$BUILD/sts_kernels_smoke" --out "$BUILD/run" "${calls[@]}" --under "$under" &&
      verdicts+=("$tool ok") || { verdicts+=("$tool FAILED"); status=1; }
    tail -c 1000000 "$log"
    left=$((left - 1))
  done
  printf '\n%s\n' "${verdicts[*]}"
  return $status
}

kernels() { # time of each kernel of two main shapes
  python3 - <<'PY'
import torch, sts_kernels
for tokens, picks in ((576, 192), (2880, 480)):
    x = torch.randn(1, tokens, 1024, device="cuda", dtype=torch.bfloat16)
    sts_kernels.repulsion_select(x, picks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(50):
            sts_kernels.repulsion_select(x, picks)
        torch.cuda.synchronize()
    print(f"repulsion_select {tokens} / {picks}, bfloat16, 50 calls:")
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=12))
PY
}

bench() {
  local end=$((SECONDS + SECONDS_LEFT - 20)) status=0 common=(--csv "$OUT/bench.csv")
  if [ -n "${STS_CHECK_COMMIT:-}" ]; then common+=(--commit "$STS_CHECK_COMMIT"); fi
  python3 -m bench.backends --device cuda || return 1
  python3 -m bench.overhead "${common[@]}" || status=1
  local device=(--device cuda)
  if [ -n "${STS_CHECK_QUICK:-}" ]; then device+=(--quick); fi
  measure() { # PERCENT ARGUMENT...: measures for PERCENT of the time left
    local seconds=$(((end - SECONDS) * $1 / 100))
    shift
    if [ "$seconds" -lt 1 ]; then
      echo "left out, no time: $*"
    else
      python3 -m bench "${common[@]}" "${device[@]}" --seconds "$seconds" "$@" || status=1
    fi
  }
  kernels || status=1
  STS_KERNELS_LOOKAHEAD=1 kernels || status=1 # the plain loop
  measure 60 --op repulsion_select --shapes main smooth batch qwen video
  measure 35 --op last_query_scores
  if [ -z "${STS_CHECK_QUICK:-}" ]; then
    measure 50 --shapes main batch varlen video --op pairwise_sqdist repulsion_step_ repulsion_select_varlen
    measure 70 --op repulsion_select --shapes sweep-K sweep-N sweep-B --providers native "gram loop" "matvec loop"
    measure 100 --op repulsion_select --shapes main N=576 K=192 --compile
  fi
  python3 -m bench --plot "$OUT/bench.png" --csv "$OUT/bench.csv" || status=1
  return $status
}

models() { # bench.decode_plans, which compares cuDNN attention on and off; full-size models with random weights
  if ! python3 -c 'import transformers' 2>/dev/null; then
    echo "left out: transformers is not installed"
    return
  fi
  python3 -m bench.backends --device cuda || return 1
  local end=$((SECONDS + SECONDS_LEFT - 40)) status=0
  timeout 80 python3 -m bench.decode_plans || status=1
  local options=() left=$((end - SECONDS))
  if [ -n "${STS_CHECK_COMMIT:-}" ]; then options+=(--commit "$STS_CHECK_COMMIT"); fi
  if [ -n "${STS_CHECK_QUICK:-}" ]; then options+=(--model llava-1.5-7b --samples 5); fi
  python3 -m bench.prefill --csv "$OUT/prefill.csv" --seconds $((left / 3)) "${options[@]}" || status=1
  python3 -m bench.ways --csv "$OUT/ways.csv" --seconds $((end - SECONDS)) "${options[@]}" || status=1
  return $status
}

key_timings() { # the most important rows, for the summary
  python3 - "$OUT/bench.csv" <<'PY'
import csv, sys
wanted = {("1", "576", "192"), ("1", "2880", "480"), ("64", "576", "192"), ("1", "131072", "4096")}
for row in csv.DictReader(open(sys.argv[1], newline="")):
    shape = row["B"], row["N"], row["K"]
    if row["op"] == "repulsion_select" and shape in wanted and row["dtype"] == "bfloat16" and row["mode"] == "graph":
        if row["provider"] in ("native", "gram loop", "matvec loop"):
            cold = "cold" if row["cold_l2"] == "1" else "warm"
            print(f"{'x'.join(shape):<14} {row['data']:<9}{row['provider']:<12}{cold} {float(row['p50_us']):12.1f} us")
PY
}

export -f build tests sanitize kernels bench models
budget=${STS_CHECK_SECONDS:-560} deadline=0 failed=0 summary=()
for name in "${sections[@]}"; do
  deadline=$((deadline + budget * WEIGHT[$name] / total)) # unused time goes to the sections that follow
  left=$((deadline - SECONDS)) start=$SECONDS verdict=PASS
  if [ $left -lt 5 ]; then left=5; fi
  printf '\n######## %s, at most %d s\n' "$name" $left
  SECONDS_LEFT=$left timeout -k 10 $left bash -euo pipefail -c "$name" 2>&1 | tee "$OUT/$name.log" || {
    status=${PIPESTATUS[0]} verdict=FAIL failed=1
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then echo "stopped after $left s" | tee -a "$OUT/$name.log"; fi
  }
  summary+=("$(printf '%s %4d s  %-9s %s' $verdict $((SECONDS - start)) "$name" "$(tail -n 1 "$OUT/$name.log" | cut -c1-150)")")
  if [ "$(stat -c %s "$OUT/$name.log")" -gt 8000000 ]; then
    tail -c 8000000 "$OUT/$name.log" >"$OUT/cut" && mv "$OUT/cut" "$OUT/$name.log"
  fi
done
{
  printf '\n######## %s\n' "$([ $failed = 0 ] && echo 'all passed' || echo FAILED)"
  if [ -s "$OUT/bench.csv" ]; then key_timings || true; fi
  printf '%s\n' "${summary[@]}"
} | tee "$OUT/summary.txt"
exit $failed
