#!/usr/bin/env bash
# Everything that needs a GPU in one go, within ten minutes and without a network:
#
#   benchmarks/gpu_check.sh [RESULTS]
#
# builds the extension for the card at hand, runs the tests on CUDA, compute-sanitizer over small cases of every kernel,
# and the benchmarks, then writes RESULTS/<device>.json and .md (default: benchmarks/results/gpu). A part that fails does
# not stop the others; the exit code is then 1. What cannot run for want of a tool is named. All of it happens in a copy
# of the tree, in build/gpu_check, where the logs stay too.
#
#   PYTHON                                          interpreter that has torch; default .venv/bin/python or python3
#   COMMIT                                          what is checked, where git cannot tell
#   SPADE_FAST_CHECK_SECONDS                        time for all; default 570
#   SPADE_FAST_TEST_DEVICE, SPADE_FAST_BENCH_DEVICE cpu: try the script out without a GPU
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
results=$(realpath -m "${1:-$root/benchmarks/results/gpu}")
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3
python=$(command -v "${PYTHON:-$python}") || { echo "no interpreter ${PYTHON:-$python}: set PYTHON" >&2; exit 2; }
python=$(realpath -s "$python")
cd "$root" || exit 2

budget=${SPADE_FAST_CHECK_SECONDS:-570}
device=${SPADE_FAST_TEST_DEVICE:-cuda}
work=$root/build/gpu_check
rm -rf "$work"
mkdir -p "$work"

# record NAME CODE SECONDS NOTE: a code of - is for what was not run.
record() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/parts.tsv"; }

# run NAME LIMIT COMMAND...: a part, at most so many seconds.
run() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  timeout -s INT -k 10 "$limit" "$@" >"$work/$name.log" 2>&1  # interrupted, pytest still writes its reports
  code=$?
  record "$name" "$code" $((SECONDS - start)) ""
  printf '%s: exit code %s after %s s\n' "$name" "$code" $((SECONDS - start))
  tail -n 3 "$work/$name.log"
  return "$code"
}

# until_percent PERCENT: seconds until so much of the time is spent, at least 20.
until_percent() {
  local seconds=$((budget * $1 / 100 - SECONDS))
  echo $((seconds > 20 ? seconds : 20))
}

# missing MODULE...: those that cannot be imported.
missing() {
  "$python" - "$@" <<'PYTHON'
import importlib.util, sys
print(", ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON
}

"$python" - "$device" <<'PYTHON' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch: set PYTHON to an interpreter that has")
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("no CUDA device: SPADE_FAST_TEST_DEVICE=cpu SPADE_FAST_BENCH_DEVICE=cpu tries this script out without one")
PYTHON
"$python" benchmarks/gpu_report.py --environment || exit 1
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null)}
export COMMIT

# What is built here stays here: the extension of whoever works in the tree is left alone.
mkdir "$work/tree"
tar -cf - --exclude=./build --exclude=./.git --exclude=./.venv --exclude='*.so' --exclude='*.egg-info' . |
  tar -xf - -C "$work/tree"
cd "$work/tree" || exit 2

# A virtual environment that sees the packages of `python`, whose own are left alone.
"$python" -m venv --without-pip "$work/venv"
packages=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sys; print("\n".join(path for path in sys.path if path.endswith("-packages")))' \
  >"$packages/outer.pth"
python=$work/venv/bin/python

with_cuda=FORCE_CUDA=1
[ "$device" = cpu ] && with_cuda=SPADE_FAST_WITH_CUDA=0
if ! run build "$(until_percent 40)" env $with_cuda "$python" -m pip install -v --no-build-isolation --no-deps --no-index -e .; then
  run build-in-place "$(until_percent 40)" env $with_cuda "$python" setup.py egg_info build_ext --inplace
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

# xunit1 holds what tests measured.
pytest=(-m pytest -q -p no:cacheprovider -o junit_family=xunit1)
# What breaks CUDA breaks it for its process: with several, the others' tests go on, and a new one takes its place.
workers=()
[ -z "$(missing xdist)" ] && workers=(-n 8 -p no:benchmark)

# tests NAME LIMIT ARGUMENTS...: a part made of tests.
tests() {
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" "$python" "${pytest[@]}" --junitxml="$work/$name.xml" "$@"
}

# sanitize TOOL LIMIT: compute-sanitizer over the small cases. Without torch's cache every allocation has its own bounds.
sanitize() {
  local tool=$1 limit=$2
  local options=(--tool "$tool" --log-file "$work/$tool.txt" --error-exitcode 9 --report-api-errors no --print-limit 1000)
  # initcheck has to see what torch's kernels write; the report leaves out what it finds in those.
  [ "$tool" = initcheck ] || options+=("$filter" kns=spade_fast)
  run "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" \
    "$python" "${pytest[@]}" --junitxml="$work/$tool.xml" tests/test_cuda.py -k test_small_cases
}

tools="memcheck racecheck initcheck synccheck"
absent=$(missing pytest hypothesis)
if [ -n "$absent" ]; then
  for name in tests operators $tools; do record "$name" - 0 "no $absent"; done
else
  export OMP_NUM_THREADS=2  # processes side by side with all cores' threads each would mostly wait for each other
  tests tests "$(until_percent 50)" "${workers[@]}" tests/test_cuda.py
  # The others do not mind each other's company.
  tests operators "$(until_percent 78)" tests/test_ops.py tests/test_augmentation.py &
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ "$device" = cpu ]; then
    for tool in $tools; do record "$tool" - 0 "the device is the CPU"; done
  elif [ -z "$sanitizer" ]; then
    for tool in $tools; do record "$tool" - 0 "no compute-sanitizer"; done
  else
    # The option has had three names.
    help=$("$sanitizer" --help)
    for filter in --kernel-name --kernel-regex --filter; do [[ $help == *"$filter "* ]] && break; done
    for tool in $tools; do sanitize "$tool" "$(until_percent 78)" & done
  fi
  wait
  unset OMP_NUM_THREADS
fi

absent=$(missing pytest pytest_benchmark timm torchvision skimage)
if [ -n "$absent" ]; then
  record benchmarks - 0 "no $absent"
else
  SPADE_FAST_BENCH_SECONDS=$(until_percent 90) tests benchmarks "$(until_percent 98)" benchmarks/bench_gpu.py \
    --benchmark-json="$work/benchmarks.json"
fi

"$python" benchmarks/gpu_report.py "$work" "$results"
