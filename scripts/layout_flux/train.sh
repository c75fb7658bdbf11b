#!/usr/bin/env bash
# All three stages, one after another; each begins when the one before it has finished.
#   scripts/layout_flux/train.sh [--key value ...]
# ACCELERATE_CONFIG: a preset of accelerate_configs/. CONFIGS: a folder of other stage1.yaml, stage2.yaml, stage3.yaml.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

for stage in 1 2 3; do
    CONFIG="${CONFIGS:-configs/layout_flux}/stage$stage.yaml" "$here/train_stage$stage.sh" "$@"
done
