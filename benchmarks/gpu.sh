#!/usr/bin/env bash
# What there is to run on a machine with an NVIDIA GPU, the most valuable first. Each part takes less than nine and
# a half minutes, writes what it has as it goes, and does not do again what it has done:
#
#   benchmarks/gpu.sh first      `effseg doctor`; one 128^3 step by Triton's kernels beside the same by ATen
#   benchmarks/gpu.sh steps      training steps on 512x512x256 and 512^3, bf16: ours, then others; seconds, memory
#   benchmarks/gpu.sh check      every kernel on volumes of real size against ATen, bf16
#   benchmarks/gpu.sh tune       measure configurations, bf16; kept in kernels/tuned
#   benchmarks/gpu.sh again      our steps once more, with what was tuned
#   benchmarks/gpu.sh tests      the kernels' tests
#   benchmarks/gpu.sh accuracy   Dice of whole volumes and of patches after the same training time
#   benchmarks/gpu.sh more       operators, inferences and all other contenders, bf16, then fp32
#   benchmarks/gpu.sh all        each in turn, also after one that failed; several may be named, too
#
# Runs from this checkout, which need not be installed, and needs no network. What needs a package that is not
# there is skipped, and said so. PYTHON names the interpreter (default: python3). OUT is the folder for results
# (default: benchmarks/results); they are kept in runs/gpu, too, from where the next run goes on, and RESUME
# names a folder of earlier results to go on from where that has none. MINUTES is how long all of it may take:
# call it again to go on. Exit code 1 if a part failed, 2 without a GPU or for an unknown part.
# shellcheck disable=SC2329 # parts are called by their names
set -euo pipefail

all=(first steps check tune again tests accuracy more)
parts=("$@")
if [[ "$*" == all ]]; then
  parts=("${all[@]}")
fi
for part in "${parts[@]:-}"; do
  if [[ -z $part || " ${all[*]} " != *" $part "* ]]; then
    echo "gpu.sh: expected all, or some of ${all[*]}; got '$*'" >&2
    exit 2
  fi
done
if [[ -n ${RESUME:-} && ! -d $RESUME ]]; then
  echo "gpu.sh: RESUME: expected a folder of earlier results, got '$RESUME'" >&2
  exit 2
fi
if [[ ! ${MINUTES:-60} =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu.sh: MINUTES: expected a whole number of minutes, got '$MINUTES'" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}" || true)
if [[ $python == */* && $python != /* ]]; then
  python=$PWD/$python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

find_gpu='
import torch
from effseg.kernels.tuned import gpu_slug
print(gpu_slug(torch.cuda.get_device_name()))
'
if ! gpu=$("$python" -c "$find_gpu" 2>/dev/null); then
  echo "gpu.sh: needs an NVIDIA GPU and a torch that sees it; ${PYTHON:-python3} finds none" >&2
  exit 2
fi

mkdir -p "${OUT:-$root/benchmarks/results}" "$root/runs/gpu"
out=$(cd "${OUT:-$root/benchmarks/results}" && pwd)
resume=${RESUME:+$(cd "$RESUME" && pwd)}
state=$root/runs/gpu
cd "$root"

rows=$gpu.json tuned_rows=$gpu-tuned.json configurations=$gpu-configurations.json
for name in "$rows" "$tuned_rows" "$configurations" real-size.json accuracy.json; do
  if [[ -n $resume && -f $resume/$name && ! -f $state/$name ]]; then
    cp "$resume/$name" "$state/$name"
  fi
done
# Tuned configurations are found there by everything that runs here.
export XDG_CACHE_HOME=$state/cache
tuned=$XDG_CACHE_HOME/effseg/tuned/$gpu.json shipped=kernels/tuned/$gpu.json
mkdir -p "${tuned%/*}"
for file in "$state/$configurations" "$shipped"; do
  if [[ -f $file && ! -f $tuned ]]; then
    cp "$file" "$tuned"
  fi
done

# deliver: results as they are now, each file whole.
deliver() {
  local file
  if [[ -f $tuned ]]; then
    cp "$tuned" "$state/.copy-$BASHPID" && mv "$state/.copy-$BASHPID" "$state/$configurations"
  fi
  for file in "$state"/*.json "$state"/*.log; do
    if [[ -f $file ]]; then
      cp "$file" "$out/.copy-$BASHPID" && mv "$out/.copy-$BASHPID" "$out/${file##*/}"
    fi
  done
}

# Also of a run that is killed.
(
  while sleep 2 && kill -0 $$ 2>/dev/null; do
    deliver
  done
) >/dev/null 2>&1 &
courier=$!
finish() {
  kill "$courier" 2>/dev/null || true
  wait "$courier" 2>/dev/null || true
  rm -f "$state"/.copy-* "$out"/.copy-* # of one that was ended in the middle
  deliver
}
trap finish EXIT

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

# minutes SECONDS: as the commands take them, with time left to write.
minutes() {
  local seconds=$(($1 > 60 ? $1 - 30 : $1 / 2))
  printf '%d.%02d\n' $((seconds / 60)) $((seconds % 60 * 100 / 60))
}

first() {
  limit "$1" "$python" -m benchmarks.gpu_steps first --minutes "$(minutes "$1")" --output "$state/$rows"
}

steps() {
  limit "$1" "$python" -m benchmarks.gpu_steps steps --minutes "$(minutes "$1")" --output "$state/$rows"
}

check() {
  limit "$1" "$python" -m benchmarks.real_size --dtype bf16 --minutes "$(minutes "$1")" \
    --problems benchmarks/problems.json --json "$state/real-size.json" --resume
}

tune() {
  local code=0
  limit "$1" "$python" -m effseg tune --dtype bf16 --minutes "$(minutes "$1")" \
    --problems benchmarks/problems.json || code=$?
  if [[ -f $tuned ]]; then # also of a run that was ended: it is written after every problem
    mkdir -p "${shipped%/*}"
    cp "$tuned" "$shipped"
  fi
  return "$code"
}

again() {
  if [[ ! -f $tuned ]]; then
    echo "skipped: our steps once more: nothing is tuned"
    return 0
  fi
  limit "$1" "$python" -m benchmarks.gpu_steps again --minutes "$(minutes "$1")" --output "$state/$tuned_rows"
}

# All but the ahead-of-time compiles of test_inspect.py, which need no GPU.
tests() {
  local module workers=()
  if [[ -f $state/.tests-passed ]]; then
    echo "passed in an earlier run"
    return 0
  fi
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
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 limit "$1" "$python" -m pytest --gpu --minutes "$(minutes "$1")" -v \
    -p no:cacheprovider "${workers[@]}" tests/kernels tests/algorithms --ignore=tests/inspection/test_inspect.py &&
    touch "$state/.tests-passed"
}

accuracy() {
  limit "$1" "$python" -m benchmarks.accuracy --minutes "$(minutes "$1")" --output "$state" --resume
}

more() {
  local file=$rows
  if [[ -f $tuned ]]; then
    file=$tuned_rows
  fi
  limit "$1" "$python" -m effseg bench --full --suite kernels throughput --minutes "$(minutes "$1")" \
    --output "$state/$file" --resume
}

declare -A seconds=(
  [first]=540 [steps]=540 [check]=300 [tune]=540 [again]=400 [tests]=240 [accuracy]=540 [more]=540
)
least=60 # seconds, for which a part is begun
failed=0
summary=()
for part in "${parts[@]}"; do
  given=${seconds[$part]}
  left=$((${MINUTES:-1440} * 60 - SECONDS - 15))
  if ((left < given)); then
    given=$left
  fi
  if ((given < least)); then
    summary+=("$part: not begun: call it again")
    continue
  fi
  code=0
  echo "== $part"
  rm -f "$state/.$part.log"
  "$part" "$given" 2>&1 | tee -a "$state/gpu.log" "$state/.$part.log" || code=$?
  deliver
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
  done < <(grep '^skipped: ' "$state/.$part.log" || true)
done

echo "== $gpu, results in $out"
printf '%s\n' "${summary[@]}"
exit "$failed"
