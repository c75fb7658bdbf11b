#!/usr/bin/env bash
# Stage 3: the feedback bridge; see train_stage.sh.
#   scripts/layout_flux/train_stage3.sh [CHECKPOINT] [--key value ...]
exec "$(dirname "${BASH_SOURCE[0]}")/train_stage.sh" 3 "$@"
