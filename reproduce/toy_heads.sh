#!/usr/bin/env bash
# Heads on the features of the toy's LoFi encoder, which ./train.sh leaves, five seeds each: as
# configs/toy.yaml has them, with classes per segment, and without head.standardize. Results are in
# docs/real_data.md and docs/paper.md.
#   reproduce/toy_heads.sh [DATA] [RUN] [OUT]     default: data/toy-0 runs/toy-0/lofi runs/toy_heads
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data/toy-0} run=${2:-runs/toy-0/lofi} out=${3:-runs/toy_heads} python=${PYTHON:-python}

row() {  # row NAME SEED key=value ...
    [ -e "$out/$1/$2/metrics.json" ] && return
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$2" out="$out/$1/$2" \
        'stages=[head,detect]' data.annotations="$data/annotations.json" \
        data.features="$run/features" "${@:3}"
}
for seed in 0 1 2 3 4; do
    row video "$seed"
    row segment "$seed" classes=segment
    row unstandardized "$seed" head.standardize=false
done
columns=()
for name in video segment unstandardized; do
    columns+=("$name=$(echo "$out/$name"/* | tr ' ' ',')")
done
"$python" -m tools.compare_runs "${columns[@]}"
