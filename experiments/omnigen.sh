#!/usr/bin/env bash
# The paper's run: OmniGen-v1 fine-tuned with MAgD at 1024 pixels, 3,200 steps of 128 samples, half of them
# edits. The paper used 4 A100s.
#
#   bash experiments/omnigen.sh GPUS OMNIGEN_FOLDER DATA.jsonl
set -euo pipefail
gpus=$1
omnigen=$2
data=$3
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True                # less memory is lost between lengths
python -m tools.pairs check "$data"
torchrun --nproc-per-node "$gpus" -m pretrained.latents "$data" --init "omnigen:$omnigen" --size 1024
torchrun --nproc-per-node "$gpus" train.py --preset omnigen --init "omnigen:$omnigen" --data "$data" \
    --out out/omnigen --p-magd 0.5 --tau 0.7 --r-mask 0.25 --mask-token learned
# the baseline at equal compute: the same with --p-magd 0 --out out/omnigen-plain
