#!/usr/bin/env bash
# SoLa on features of real videos: a linear probe before and after, heads of both kinds behind it.
# docs/real_data.md has the results; reproduce/real_data.sh trains the heads without SoLa.
#   reproduce/real_sola.sh [DATA] [RUNS] [FIGHTS]     default: data, runs/real_sola, runs/fights
# DATA holds salads50/, gtea/ and fight/; FIGHTS is what reproduce/real_pixels.sh leaves, of which the
# features of seed 0 are taken. What is missing is left out. Started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data} runs=${2:-runs/real_sola} fights=${3:-runs/fights} python=${PYTHON:-python}

row() {  # row CONFIG ANNOTATIONS FEATURES OUT SEED key=value ...
    [ -e "$4/metrics.json" ] || [ -e "$4/sola/features/features.json" ] && return
    echo "== $4"
    "$python" lofi_tal.py --cfg "configs/$1.yaml" --set "data.annotations=$2" "data.features=$3" \
        "out=$4" "seed=$5" "${@:6}"
}
rows() {  # rows NAME CONFIG ANNOTATIONS FEATURES SEED SUBSEQUENCES
    local out=$runs/$1 seed classes
    [ -e "$3" ] && [ -e "$4" ] || return 0
    # 150 epochs are 1,200 steps on GTEA and 2,400 elsewhere: many subsequences of few videos.
    row "$2" "$3" "$4" "$out/sola" "$5" 'stages=[sola]' sola.standardize=true \
        sola.subsequences_per_video="$6"
    "$python" -m tools.probe_sola "$out/sola"
    for seed in "${5}0" "${5}1" "${5}2"; do
        for classes in segment video; do
            row "$2" "$3" "$out/sola/sola/features" "$out/$classes/$seed" "$seed" \
                'stages=[head,detect]' "classes=$classes"
        done
    done
    "$python" -m tools.compare_runs segment="$(echo "$out"/segment/* | tr ' ' ',')" \
        video="$(echo "$out"/video/* | tr ' ' ',')"
}
for split in 1 2 3; do
    rows "salads50_$split" salads50 "$data/salads50/annotations_eval_split$split.json" \
        "$data/salads50/features" "$split" 100
done
rows gtea_1 gtea "$data/gtea/annotations_subject1.json" "$data/gtea/features" 1 100
for encoder in random acp lofi; do
    rows "fights_$encoder" fights "$data/fight/annotations.json" "$fights/$encoder/0/features" 0 40
done
