#!/usr/bin/env bash
# The default experiment: Table 1 of the paper in miniature, on toy data. ICP, ACP, ACP+ and LoFi (long
# cycle); one ACP encoder serves three rows.
#   ./train.sh [SEED]          SEED, default 0, draws the data, the encoders and the heads
#   PYTHON=python3 ./train.sh
# Data go to data/toy-SEED, runs to runs/toy-SEED. Started again it resumes where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0} python=${PYTHON:-python}
data=data/toy-$seed runs=runs/toy-$seed

"$python" -m tools.make_toy --out "$data" --seed "$seed"
row() {  # row NAME key=value ...
    echo "== $1"
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$seed" out="$runs/$1" \
        data.annotations="$data/annotations.json" data.frames="$data/frames" \
        pretrain.icp.source="$data/stills" pretrain.acp.source="$data/clips" "${@:2}"
}
frozen='stages=[pretrain,features,head,detect]'
acp=pretrain.pretrained="$runs/acp/pretrain/encoder.pt"
# An image network has never seen shifted channels.
row icp "$frozen" pretrain.method=icp encoder.shift_div=0
row acp "$frozen" pretrain.method=acp
row acp_plus "$frozen" pretrain.method=acp_plus "$acp"
row lofi "$acp"
"$python" -m tools.compare_runs ICP="$runs/icp" ACP="$runs/acp" ACP+="$runs/acp_plus" \
    LoFi="$runs/lofi" --json "$runs/table.json" --markdown "$runs/table.md"
