#!/usr/bin/env bash
# One command for a borrowed GPU machine: build, check and measure within nine minutes, no network needed.
#
#   benchmarks/gpu_check.sh [--dry-run] [--stages "0 1 4"] [--seconds 530] [OUT]
#
# OUT (first argument, else $OUT, else ./gpu_check) gets one tar a stage and summary.txt: at most eight files.
#   0  the whole test suite as it runs without a GPU, in the background, under this torch and Triton
#   1  pytest -m gpu
#   2  compute-sanitizer (memcheck, racecheck) on the CUDA LSTM tests
#   3  every 8-warp Triton config against the shipped one
#   4  stock baselines and our rows -> JSON
#   5  what the machine itself can do: copies, products, launches, what a recurrent step is made of
# GPU stages run one after another, the most telling first: 1 3 2 4 5. A stage that fails or runs out of time
# stops nothing: what it had written is packed, and the table at the end says so.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
dry=0 stages="0 1 2 3 4 5" total=530 out=""
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --stages) stages=${2:?--stages needs a list such as \"0 1\"}; shift ;;
    --seconds) total=${2:?--seconds needs a number}; shift ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) echo "gpu_check: unknown option $1" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
out=${out:-${OUT:-gpu_check}}
py=${PYTHON:-python3}
begin=$SECONDS
summary=""

say() { printf '%s %4ds  %s\n' "$(date +%H:%M:%S)" $((SECONDS - begin)) "$*"; }
left() { echo $((total - SECONDS + begin)); }
wanted() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
note() { summary+="$(printf '%-6s %-12s %5s  %s' "$1" "$2" "$3" "$4")"$'\n'; }
have() { "$py" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [ $dry = 0 ]; then
  mkdir -p "$out" || exit 1
  out=$(cd "$out" && pwd)
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
else
  work="\$WORK"
fi

# limited SECONDS COMMAND...: interrupted at the limit, so that pytest still writes its JSON; killed 15 s later.
limited() { local limit=$1; shift; timeout -s INT -k 15 "$limit" "$@"; }

# stage NUMBER SECONDS FUNCTION: runs it with its own folder and log, packs the folder, notes the outcome.
stage() {
  local number=$1 limit=$2 run=$3 start=$SECONDS rest rc log state
  rest=$(left)
  [ "$limit" -gt "$rest" ] && limit=$rest
  if [ $dry = 1 ]; then
    echo "stage $number, at most ${limit}s:"
    "$run" "$limit" "$work/stage$number"
    return
  fi
  if [ "$limit" -lt 10 ]; then
    printf 'not run\t0\tno time left\n' >"$work/stage$number.result"
    return
  fi
  mkdir -p "$work/stage$number"
  log="$work/stage$number/log.txt"
  "$run" "$limit" "$work/stage$number" >"$log" 2>&1
  rc=$?
  case $rc in
    0) state=ok ;;
    77) state=skipped ;;
    124 | 130 | 137) state="out of time" ;;
    *) state="failed ($rc)" ;;
  esac
  tar -C "$work" -czf "$out/stage$number.tar.gz" "stage$number"
  log=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c1-110)
  printf '%s\t%s\t%s\n' "$state" "$((SECONDS - start))" "$log" >"$work/stage$number.result"
}
collect() { # NUMBER
  local state seconds last
  [ -f "$work/stage$1.result" ] || return 0
  IFS=$'\t' read -r state seconds last <"$work/stage$1.result"
  note "$1" "$state" "${seconds}s" "$last"
  say "stage $1: $state, $last"
}
foreground() { # NUMBER SECONDS FUNCTION
  wanted "$1" || return 0
  stage "$@"
  [ $dry = 1 ] || collect "$1"
}
do_() { if [ $dry = 1 ]; then printf '    '; printf '%q ' "$@"; echo; else "$@"; fi; }
skip() { echo "skipped: $*"; [ $dry = 1 ] || return 77; }

gpu=0
"$py" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null && gpu=1
need_gpu() { [ $gpu = 1 ] || [ $dry = 1 ] || skip "torch sees no CUDA device"; }
need() { # MODULE
  [ $dry = 1 ] || have "$1" || skip "$1 is not installed in $py"
}

build() { # SECONDS FOLDER
  local archs=""
  [ $gpu = 1 ] && archs=$("$py" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))')
  export SORA_CUDA_ARCHS=${SORA_CUDA_ARCHS:-$archs}
  do_ limited "$1" "$py" -m pip install -q --no-build-isolation --no-deps -e . && return
  echo "pip could not install the tree; building in place"
  do_ limited "$1" "$py" setup.py -q build_ext --inplace
}
stage0() {
  need pytest || return
  local parallel=()
  have xdist && parallel=(-n 6 --dist loadfile)
  # A background job of a shell ignores SIGINT; pytest must heed it to print what it has when time is up.
  local heed='import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'
  do_ env CUDA_VISIBLE_DEVICES= nice -n 10 timeout -s INT -k 15 "$1" "$py" -c "$heed" -q \
    --continue-on-collection-errors -p no:cacheprovider --durations=15 "${parallel[@]}" tests
}
stage1() {
  need_gpu || return
  need pytest || return
  do_ limited "$1" "$py" -m pytest -q -m gpu --require-gpu --require-native \
    --continue-on-collection-errors -p no:cacheprovider tests
}
stage2() {
  need_gpu || return
  need pytest || return
  local tool checker failed=0 half=$(($1 / 2))
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  [ -n "$checker" ] || [ $dry = 1 ] || { skip "compute-sanitizer is not on PATH"; return; }
  for tool in memcheck racecheck; do
    # Without torch's caching allocator an access past a tensor is an access past an allocation.
    do_ env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 15 "$half" "${checker:-compute-sanitizer}" \
      --tool "$tool" --error-exitcode 86 --kernel-regex kns=lstm "$py" -m pytest -q -x -m gpu \
      -p no:cacheprovider tests/ops/test_lstm_gpu.py || { failed=$?; echo "$tool: exit status $failed"; }
  done
  return $failed
}
stage3() {
  need_gpu || return
  do_ limited "$1" "$py" -m sora_kernels.tune conv3d_bn_act --check \
    --where num_warps=8 ITERATIONS=4 BLOCK_M=64,1024 --shapes r3d_18.layer1 r2plus1d_18.stem.spatial
}
stage4() {
  need_gpu || return
  need pytest_benchmark || return
  need yaml || return
  local failed=0 until=$((SECONDS + $1)) name files select
  # Most telling first; each writes a file of its own.
  while IFS='|' read -r name files select; do
    [ $((until - SECONDS)) -ge 10 ] || [ $dry = 1 ] || { echo "$name: not run, no time left"; continue; }
    # shellcheck disable=SC2086  # files is a list
    do_ limited $((until - SECONDS)) "$py" -m pytest -q -p no:cacheprovider $files -k "$select" --device cuda --rounds 20 \
      --benchmark-json="$2/$name.json" --benchmark-columns=median,iqr,rounds || failed=$?
  done <<LIST
host_overhead|benchmarks/test_bench_host_overhead.py|cuda
conv3d_bn_act|benchmarks/test_bench_conv3d_bn_act.py|channels_last and bf16
window_attention3d|benchmarks/test_bench_window_attention.py|bf16 and (swin_t16.stage1.shifted or swin_t32.stage3.shifted or n98.shifted or test_model)
lstm|benchmarks/test_bench_lstm.py|test_lstm and cuda and not packed
gru_packed|benchmarks/test_bench_lstm.py|cuda and (test_gru or packed)
pyramid_pool3d|benchmarks/test_bench_pyramid_pool.py|bf16 and not maxavg
models|benchmarks/test_bench_models.py|cuda
stacks|benchmarks/test_bench_stacks.py|channels_last and bf16
conv3d_bn_act_rest|benchmarks/test_bench_conv3d_bn_act.py|not (channels_last and bf16)
rnn|benchmarks/test_bench_lstm.py|test_rnn and cuda and not packed
neighborhood_attention3d|benchmarks/test_bench_neighborhood_attention.py|bf16
window_attention3d_rest|benchmarks/test_bench_window_attention.py|not (swin_t16.stage1.shifted or swin_t32.stage3.shifted or n98.shifted or test_model) and bf16
window_attention3d_fp32|benchmarks/test_bench_window_attention.py|fp32
stacks_rest|benchmarks/test_bench_stacks.py|not (channels_last and bf16)
pyramid_pool3d_rest|benchmarks/test_bench_pyramid_pool.py|not (bf16 and not maxavg)
LIST
  return $failed
}
stage5() {
  need_gpu || return
  do_ limited "$1" "$py" -m benchmarks.micro --json "$2/micro.json"
}

say "gpu_check: $("$py" --version 2>&1), stages $stages, ${total}s"
"$py" - <<'INFO' || true
import importlib
names = "torch triton numpy pybind11 setuptools ninja pytest pytest_benchmark hypothesis yaml av safetensors"
for name in names.split():
    try:
        print(f"  {name} {getattr(importlib.import_module(name), '__version__', '')}")
    except Exception as error:
        print(f"  {name}: missing ({type(error).__name__}); what needs it is skipped or fails to import")
INFO
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET SORA_BACKEND
if [ $dry = 1 ]; then
  echo "build, at most 120s:"
  build 120 "$work"
else
  start=$SECONDS
  mkdir -p "$work/build"
  build "$(left | awk '{ print ($1 < 120 ? $1 : 120) }')" "$work/build" >"$work/build/log.txt" 2>&1
  rc=$?
  "$py" -m sora_kernels.info >>"$work/build/log.txt" 2>&1
  tar -C "$work" -czf "$out/build.tar.gz" build
  state=ok
  [ $rc = 0 ] || state="failed ($rc)"
  note build "$state" "$((SECONDS - start))s" "$(grep -m1 'sora_kernels._C' "$work/build/log.txt" | tr -s ' ' | cut -c1-110)"
  say "build: exit status $rc"
fi

background=""
if wanted 0; then
  # Timings want a quiet machine: the tests end before stages 4 and 5 begin.
  limit=$(left)
  if wanted 4 || wanted 5; then limit=$((limit - 215)); fi
  [ "$limit" -gt 300 ] && limit=300
  if [ $dry = 1 ]; then stage 0 "$limit" stage0; else stage 0 "$limit" stage0 & background=$!; fi
fi
foreground 1 190 stage1
foreground 3 80 stage3
foreground 2 80 stage2
if [ -n "$background" ]; then
  wait "$background"
  collect 0
fi
foreground 4 160 stage4
foreground 5 60 stage5

[ $dry = 1 ] && exit 0
printf '\nstage  outcome       time  last line\n%s' "$summary" | tee "$out/summary.txt"
say "written to $out"
case $summary in *failed* | *"out of time"*) exit 1 ;; esac
