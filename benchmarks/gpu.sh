#!/usr/bin/env bash
# What there is to run on a machine with an NVIDIA GPU, in parts of less than nine minutes:
#
#   benchmarks/gpu.sh check      are the kernels right: volumes of real size against ATen, the kernels' tests
#   benchmarks/gpu.sh tune       measure configurations; kept in kernels/tuned, a run goes on from the last one
#   benchmarks/gpu.sh bench      time and memory beside other networks
#   benchmarks/gpu.sh accuracy   Dice of whole volumes and of patches after the same training time
#   benchmarks/gpu.sh all        each in turn, also after one that failed
#
# Runs from this checkout, which need not be installed, and needs no network. What needs a package that is not
# there is skipped, and said so. PYTHON names the interpreter (default: python3), OUT the folder for results
# (default: benchmarks/results). Exit code 1 if a part failed, 2 without a GPU or for an unknown part.
# shellcheck disable=SC2329 # parts are called by their names
set -euo pipefail

parts=(check tune bench accuracy)
case "$#:${1:-}" in
  1:check | 1:tune | 1:bench | 1:accuracy) parts=("$1") ;;
  1:all) ;;
  *)
    echo "gpu.sh: expected one of check, tune, bench, accuracy, all; got '$*'" >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}" || true)
if [[ $python == */* && $python != /* ]]; then
  python=$PWD/$python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

find_gpu='
import torch
from effseg.kernels.config import gpu_slug
print(gpu_slug(torch.cuda.get_device_name()))
'
if ! gpu=$("$python" -c "$find_gpu" 2>/dev/null); then
  echo "gpu.sh: needs an NVIDIA GPU and a torch that sees it; ${PYTHON:-python3} finds none" >&2
  exit 2
fi

mkdir -p "${OUT:-$root/benchmarks/results}"
out=$(cd "${OUT:-$root/benchmarks/results}" && pwd)
cd "$root"

# limit SECONDS COMMAND...: interrupted, not killed, with what it has started, so that it writes what it has.
limit() {
  timeout --signal=INT --kill-after=10 "$@" &
  local child=$!
  trap 'kill -INT "$child"' INT # of the terminal, where timeout's own group is not asked
  wait "$child"
}

has() {
  "$python" -c "import $1" 2>/dev/null
}

check() {
  local code=0
  limit 270 "$python" -m effseg.benchmarking.real_size --minutes 4 --json "$out/real-size.json" || code=1
  kernel_tests || code=1
  return "$code"
}

# All but the ahead-of-time compiles of test_inspect.py, which need no GPU.
kernel_tests() {
  local module workers=()
  for module in pytest hypothesis; do
    if ! has "$module"; then
      echo "skipped: the tests: $module is not installed"
      return 0
    fi
  done
  if has xdist; then
    workers=(-p xdist.plugin -n auto)
  fi
  # Plugins that happen to be there may warn, which would be an error.
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 limit 235 "$python" -m pytest --gpu --minutes 3.5 -p no:cacheprovider \
    "${workers[@]}" tests/kernels tests/algorithms --ignore=tests/kernels/test_inspect.py
}

tune() {
  local code=0 file="kernels/tuned/$gpu.json"
  limit 520 "$python" -m effseg tune --minutes 8 --ship || code=$?
  if [[ -f $file ]]; then # also of a run that was ended: it is written after every problem
    cp "$file" "$out/$gpu.tuned.json"
  fi
  return "$code"
}

bench() {
  limit 520 "$python" -m effseg bench --full --minutes 8 --output "$out/$gpu.json"
}

accuracy() {
  limit 520 "$python" -m effseg.benchmarking.accuracy --minutes 8 --output "$out"
}

failed=0
summary=()
for part in "${parts[@]}"; do
  code=0
  echo "== $part"
  "$part" 2>&1 | tee "$out/gpu-$part.log" || code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="failed: not done in time" ;;
    *) verdict="failed: exit code $code" ;;
  esac
  if ((code)); then
    failed=1
  fi
  summary+=("$part: $verdict")
  while IFS= read -r line; do
    summary+=("  $line")
  done < <(grep '^skipped: ' "$out/gpu-$part.log" || true)
done

echo "== $gpu, results in $out"
printf '%s\n' "${summary[@]}"
exit "$failed"
