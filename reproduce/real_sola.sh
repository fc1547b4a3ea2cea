#!/usr/bin/env bash
# SoLa on features of real videos: a linear probe before and after, heads of both kinds behind it.
# docs/real_data.md has the results; reproduce/real_data.sh trains the heads without SoLa.
#   reproduce/real_sola.sh [DATA] [RUNS]     default: data, runs/real_sola
# DATA holds salads50/ and gtea/, of which either may be missing. Started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data} runs=${2:-runs/real_sola} python=${PYTHON:-python}

row() {  # row DATA_SET ANNOTATIONS NAME SEED FEATURES key=value ...
    local out=$runs/$1/$3/$4
    [ -e "$out/metrics.json" ] || [ -e "$out/sola/features/features.json" ] && return
    echo "== $out"
    "$python" lofi_tal.py --cfg "configs/$1.yaml" --set "out=$out" "seed=$4" \
        "data.annotations=$data/$1/$2.json" "data.features=$5" "${@:6}"
}
rows() {  # rows DATA_SET ANNOTATIONS_PREFIX SPLIT ...
    local set=$1 prefix=$2 split seed
    shift 2
    [ -d "$data/$set" ] || return 0
    for split in "$@"; do
        # 2,400 steps on few videos: 100 subsequences of each in an epoch.
        row "$set" "$prefix$split" sola "$split" "$data/$set/features" 'stages=[sola]' \
            sola.standardize=true sola.subsequences_per_video=100
        "$python" -m tools.probe_sola "$runs/$set/sola/$split"
        for seed in "${split}0" "${split}1" "${split}2"; do
            for classes in segment video; do
                row "$set" "$prefix$split" "$classes" "$seed" \
                    "$runs/$set/sola/$split/sola/features" "classes=$classes"
            done
        done
    done
    "$python" -m tools.compare_runs segment="$(echo "$runs/$set"/segment/* | tr ' ' ',')" \
        video="$(echo "$runs/$set"/video/* | tr ' ' ',')"
}
rows salads50 annotations_eval_split 1 2 3
rows gtea annotations_subject 1
