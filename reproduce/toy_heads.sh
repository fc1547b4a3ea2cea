#!/usr/bin/env bash
# Heads on the features of the toy's LoFi encoders, which `./train.sh SEED` leaves: as
# configs/toy.yaml has them, with classes per segment, and without head.standardize; for each of the
# seeds data, encoder and head are drawn anew. Results are in docs/real_data.md and docs/paper.md.
#   reproduce/toy_heads.sh [SEEDS] [OUT]     default: "0 1 2 3 4" runs/toy_heads
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-0 1 2 3 4} out=${2:-runs/toy_heads} python=${PYTHON:-python}

row() {  # row NAME SEED key=value ...
    [ -e "$out/$1/$2/metrics.json" ] && return
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$2" out="$out/$1/$2" \
        'stages=[head,detect]' data.annotations="data/toy-$2/annotations.json" \
        data.features="runs/toy-$2/lofi/features" "${@:3}"
}
for seed in $seeds; do
    row video "$seed"
    row segment "$seed" classes=segment
    row unstandardized "$seed" head.standardize=false
done
columns=()
for name in video segment unstandardized; do
    columns+=("$name=$(echo "$out/$name"/* | tr ' ' ',')")
done
"$python" -m tools.compare_runs "${columns[@]}"
