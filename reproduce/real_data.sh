#!/usr/bin/env bash
# Real videos of many classes, from features: classes per segment beside two controls, on all splits
# of 50 Salads and GTEA, three seeds each. docs/real_data.md has the results and what they rest on.
#   reproduce/real_data.sh [DATA] [RUNS]     default: data, runs/real_data
# DATA holds salads50/ and gtea/, of which either may be missing. Started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data} runs=${2:-runs/real_data} python=${PYTHON:-python}

rows() {  # rows DATA_SET ANNOTATIONS_PREFIX SPLIT ...: every row of every split, then the tables
    local set=$1 prefix=$2 split seed
    shift 2
    [ -d "$data/$set" ] || return 0
    for split in "$@"; do
        for seed in "${split}0" "${split}1" "${split}2"; do
            row "$set" segments "$prefix$split" "$seed"
            row "$set" no_scores "$prefix$split" "$seed" detect.confidence_power=0
            row "$set" videos "$prefix$split" "$seed" classes=video
        done
        table "$set" "$split" "of split $split"
    done
    table "$set" "" "of all splits"
}
row() {  # row DATA_SET NAME ANNOTATIONS SEED key=value ...
    local out=$runs/$1/$2/$4
    [ -e "$out/metrics.json" ] && return
    echo "== $out"
    "$python" lofi_tal.py --cfg "configs/$1.yaml" --set "out=$out" "seed=$4" \
        "data.annotations=$data/$1/$3.json" "data.features=$data/$1/features" "${@:5}"
}
table() {  # table DATA_SET SPLIT TITLE: means over the seeds of a split, or of all
    local columns=() name
    for name in segments no_scores videos; do
        columns+=("$name=$(echo "$runs/$1/$name/$2"* | tr ' ' ',')")
    done
    echo "$1, mean $3:"
    "$python" -m tools.compare_runs "${columns[@]}"
}
rows salads50 annotations_eval_split 1 2 3 4 5
rows gtea annotations_subject 1 2 3
