#!/usr/bin/env bash
# Classes of a whole video beside classes per segment, on the toy, whose videos have one class each:
# a LoFi encoder a seed, and two heads on its features. docs/real_data.md has the results.
#   reproduce/toy_classes.sh [RUNS]     default: runs/toy_classes. Started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/toy_classes} python=${PYTHON:-python}

row() {  # row NAME SEED key=value ...
    [ -e "$runs/$1/$2/metrics.json" ] && return
    echo "== $1, seed $2"
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$2" out="$runs/$1/$2" \
        data.annotations="$runs/data/$2/annotations.json" data.frames="$runs/data/$2/frames" \
        pretrain.acp.source="$runs/data/$2/clips" "${@:3}"
}
for seed in 0 1 2 3 4; do
    "$python" -m tools.make_toy --out "$runs/data/$seed" --seed "$seed"
    row video "$seed"
    row segment "$seed" classes=segment 'stages=[head,detect]' \
        data.features="$runs/video/$seed/features"
done
"$python" -m tools.compare_runs video="$(echo "$runs"/video/* | tr ' ' ',')" \
    segment="$(echo "$runs"/segment/* | tr ' ' ',')"
