#!/usr/bin/env bash
# The larger toy on one GPU: the two presets to the end, then their scores by task and complexity.
set -euo pipefail
cd "$(dirname "$0")/.."
python train.py --out out/toy_gpu
python train.py --preset shapes64 --out out/shapes64
python metrics.py toy --ckpt out/shapes64/last.pt
