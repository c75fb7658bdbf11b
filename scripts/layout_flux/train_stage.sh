#!/usr/bin/env bash
# A later stage; train_stage2.sh and train_stage3.sh call it. Continues where an earlier start of it has stopped; else it
# starts from CHECKPOINT, or from the newest intact checkpoint of the stage before.
#   scripts/layout_flux/train_stage.sh STAGE [CHECKPOINT] [--key value ...]
# ACCELERATE_CONFIG: a preset of accelerate_configs/. CONFIG: another configuration.
set -euo pipefail

stage=$1
shift
start=()
if [[ $# -gt 0 && $1 != --* ]]; then
    start=(--init_from "$(realpath --canonicalize-missing "$1")")
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec accelerate launch -q --config_file "${ACCELERATE_CONFIG:-accelerate_configs/h100x8_ddp.yaml}" \
    trainers/train_layout_flux.py --config "${CONFIG:-configs/layout_flux/stage$stage.yaml}" \
    --resume_from_checkpoint auto "${start[@]}" "$@"
