#!/usr/bin/env bash
# Table 1 on real pixels, from random weights: ACP on trimmed clips, ACP+, ACP+ with background, LoFi
# (long cycle), full fidelity by chunks, and the random encoder as the control, five seeds each.
#   reproduce/real_pixels.sh [DATA] [RUNS]     default: data/fight, runs/fights
# DATA holds clips/{train,val}/CLASS/, videos/ and annotations.json. Started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data/fight} runs=${2:-runs/fights} python=${PYTHON:-python}

"$python" -m tools.prepare_data --videos "$data/videos" --annotations "$data/annotations.json" \
    --out "$runs/frames" --snippets 32 --frames-per-snippet 8 --stride 2 --short-side 96 --copies 48
row() {  # row NAME SEED key=value ...
    [ -e "$runs/$1/$2/metrics.json" ] && return
    echo "== $1, seed $2"
    "$python" lofi_tal.py --cfg configs/fights.yaml --set out="$runs/$1/$2" seed="$2" \
        data.annotations="$data/annotations.json" data.frames="$runs/frames" \
        pretrain.acp.source="$data/clips" "${@:3}"
}
frozen='stages=[pretrain,features,head,detect]'
names=(random acp acp_plus acp_plus_background lofi full)
for seed in 0 1 2 3 4; do
    acp=pretrain.pretrained=$runs/acp/$seed/pretrain/encoder.pt
    row random "$seed" "$frozen" pretrain.method=none
    row acp "$seed" "$frozen"
    row acp_plus "$seed" "$frozen" pretrain.method=acp_plus "$acp"
    row acp_plus_background "$seed" "$frozen" pretrain.method=acp_plus_background "$acp"
    row lofi "$seed" "$acp"
done
for seed in 0 1 2 3 4; do  # the most expensive row comes last
    acp=pretrain.pretrained=$runs/acp/$seed/pretrain/encoder.pt
    # In the memory of T: a quarter of the snippets at once, whose BatchNorm has to be frozen.
    row full "$seed" "$acp" 'lofi.fidelities=[full]' lofi.chunk_snippets=8 lofi.batchnorm=frozen
done
columns=()
for name in "${names[@]}"; do
    columns+=("$name=$(echo "$runs/$name"/* | tr ' ' ',')")
done
"$python" -m tools.compare_runs "${columns[@]}"
