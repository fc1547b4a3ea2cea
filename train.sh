#!/usr/bin/env bash
# The default experiment: Table 1 of the paper in miniature, on toy data. ICP, ACP, ACP+ and LoFi (long
# cycle); one ACP encoder serves three rows.
#   ./train.sh [SEED]          SEED, default 0, draws the data, the encoders and the heads
#   PYTHON=python3 ./train.sh
# Data go to data/toy-SEED, runs to runs/toy-SEED. Started again it resumes where it stopped.
# Small convolutions gain half from a second thread: what does not need each other runs side by side.
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0} python=${PYTHON:-python}
data=data/toy-$seed runs=runs/toy-$seed
# Threads that spin while they wait keep other processes, and so each other, from the cores.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-20000}

"$python" -m tools.make_toy --out "$data" --seed "$seed"
row() {  # row NAME key=value ...
    echo "== $1"
    "$python" lofi_tal.py --cfg configs/toy.yaml --set seed="$seed" out="$runs/$1" \
        data.annotations="$data/annotations.json" data.frames="$data/frames" \
        pretrain.icp.source="$data/stills" pretrain.acp.source="$data/clips" "${@:2}"
}
beside() {  # the same, to run beside others: each line begins with the row's name
    row "$@" 2>&1 | (
        trap '' INT  # it shows the last words of what Ctrl-C stops
        while IFS= read -r line; do echo "$1 | $line"; done
    )
}
frozen='stages=[pretrain,features,head,detect]'
acp=pretrain.pretrained="$runs/acp/pretrain/encoder.pt"
row acp "$frozen" pretrain.method=acp

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS-$(((cores + 1) / 2))}
trap wait EXIT  # after Ctrl-C or an error: until both have saved, or ended
trap : INT
(
    trap - INT
    # An image network has never seen shifted channels.
    beside icp "$frozen" pretrain.method=icp encoder.shift_div=0
    beside acp_plus "$frozen" pretrain.method=acp_plus "$acp"
) &
first=$!
(
    trap - INT
    beside lofi "$acp"
) &
second=$!
wait "$first"
wait "$second"
"$python" -m tools.compare_runs ICP="$runs/icp" ACP="$runs/acp" ACP+="$runs/acp_plus" \
    LoFi="$runs/lofi" --json "$runs/table.json" --markdown "$runs/table.md"
