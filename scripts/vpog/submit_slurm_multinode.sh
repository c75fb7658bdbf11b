#!/usr/bin/env bash
# Pose on several nodes: as submit_slurm.sh, which counts the nodes itself.
#   sbatch scripts/vpog/submit_slurm_multinode.sh [--key value ...]
#   sbatch --nodes 4 scripts/vpog/submit_slurm_multinode.sh ...
#SBATCH --job-name=vpog
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=72:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -euo pipefail

# sbatch runs a copy: the other script is found where this one was submitted
exec bash "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}/scripts/vpog/submit_slurm.sh" "$@"
