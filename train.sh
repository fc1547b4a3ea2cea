#!/usr/bin/env bash
# The default experiment: the paper's Table 1 in miniature, on the toy data. ICP, ACP, ACP+ and LoFi (long cycle); one ACP encoder serves three rows.
#   ./train.sh [seed]         SEED, default 0, draws the data, the encoders and the heads
#   PYTHON=python3 ./train.sh
# Data go to data/toy-SEED, runs to runs/toy-SEED; started again, it goes on where it stopped and skips what is done.
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0} python=${PYTHON:-python}
data=data/toy-$seed runs=runs/toy-$seed

"$python" toy.py --out "$data" --seed "$seed"
row() {  # row NAME key=value ...
    echo "== $1"
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$seed" out="$runs/$1" data.annotations="$data/annotations.json" data.frames="$data/frames" \
        pretrain.icp.source="$data/stills" pretrain.acp.source="$data/clips" "${@:2}"
}
frozen='stages=[pretrain,features,head,detect]'
row icp "$frozen" pretrain.method=icp encoder.shift_div=0   # an image network has never seen shifted channels
row acp "$frozen" pretrain.method=acp
row acp_plus "$frozen" pretrain.method=acp_plus pretrain.checkpoint="$runs/acp/pretrain/encoder.pt"
row lofi pretrain.checkpoint="$runs/acp/pretrain/encoder.pt"
"$python" evaluate.py --compare ICP="$runs/icp" ACP="$runs/acp" ACP+="$runs/acp_plus" LoFi="$runs/lofi" --json "$runs/table.json" --markdown "$runs/table.md"
