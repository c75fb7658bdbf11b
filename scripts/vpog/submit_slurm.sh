#!/usr/bin/env bash
# Pose on the GPUs of one node, through SLURM: submitted again, it goes on from its newest checkpoint.
#   sbatch scripts/vpog/submit_slurm.sh [--key value ...]
# ACCELERATE_CONFIG: a preset of accelerate_configs/. CONFIG: another configuration. Both are read from the environment.
#SBATCH --job-name=vpog
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
# one task per node, and in it one launcher for all GPUs of the node
nodes=${SLURM_JOB_NUM_NODES:-1}
processes=$((nodes * ${SLURM_GPUS_ON_NODE:?is not set: ask for GPUs}))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not `| head -n 1`, which can end scontrol by a signal
first=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))
launch=(accelerate launch -q --config_file "${ACCELERATE_CONFIG:-accelerate_configs/a100x8_ddp.yaml}"
    --num_machines "$nodes" --num_processes "$processes" --main_process_ip "$first" --main_process_port "$port")
train=(trainers/train_vpog.py --config "${CONFIG:-configs/vpog/croco_large.yaml}" --resume_from_checkpoint auto "$@")

status=0
# SLURM_NODEID is known in the task only
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'split=$1; shift
    exec "${@:1:split}" --machine_rank "$SLURM_NODEID" "${@:split+1}"' \
    launch "${#launch[@]}" "${launch[@]}" "${train[@]}" || status=$?
if [[ $status -eq 75 ]]; then # stopped with a checkpoint, its time being over: once more from there
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
