#!/usr/bin/env bash
# Stage 3: the feedback bridge. Continues where an earlier start of it has stopped; else it starts from CHECKPOINT, or from the
# newest intact checkpoint of stage 2.
#   scripts/layout_flux/train_stage3.sh [CHECKPOINT] [--key value ...]
# ACCELERATE_CONFIG: a preset of accelerate_configs/. CONFIG: another configuration.
set -euo pipefail

start=()
if [[ $# -gt 0 && $1 != --* ]]; then
    start=(--init_from "$(realpath --canonicalize-missing "$1")")
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec accelerate launch -q --config_file "${ACCELERATE_CONFIG:-accelerate_configs/h100x8_ddp.yaml}" \
    trainers/train_layout_flux.py --config "${CONFIG:-configs/layout_flux/stage3.yaml}" \
    --resume_from_checkpoint auto "${start[@]}" "$@"
