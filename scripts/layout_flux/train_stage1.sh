#!/usr/bin/env bash
# Stage 1: objects in their boxes. Continues where an earlier start of it has stopped.
#   scripts/layout_flux/train_stage1.sh [--key value ...]
# ACCELERATE_CONFIG: a preset of accelerate_configs/. CONFIG: another configuration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec accelerate launch -q --config_file "${ACCELERATE_CONFIG:-accelerate_configs/h100x8_ddp.yaml}" \
    trainers/train_layout_flux.py --config "${CONFIG:-configs/layout_flux/stage1.yaml}" \
    --resume_from_checkpoint auto "$@"
