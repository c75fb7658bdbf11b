#!/usr/bin/env bash
# Stage 2: identity; see train_stage.sh.
#   scripts/layout_flux/train_stage2.sh [CHECKPOINT] [--key value ...]
exec "$(dirname "${BASH_SOURCE[0]}")/train_stage.sh" 2 "$@"
