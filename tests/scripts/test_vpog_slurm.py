"""scripts/vpog on a machine without SLURM: srun, scontrol and accelerate are small programs that tell what they got."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
PROGRAMS = {
    # as SLURM does it: the same command on every node, which only learns there which one it is
    "srun": 'shift; for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" || exit; done',
    "scontrol": 'if [[ $1 == show ]]; then printf "node-a\\nnode-b\\n"; else echo "$*"; fi',
    "accelerate": 'printf "<%s>" "$@"; echo; exit "${ENDS_WITH:-0}"',
}


@pytest.fixture
def submit(tmp_path):
    for name, body in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        program.chmod(0o755)

    def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        slurm = {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_ID": "4711",
        }
        copy = shutil.copy(ROOT / "scripts" / "vpog" / script, tmp_path / "slurm_script")  # what sbatch runs
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | slurm | environment
        return subprocess.run(["bash", copy, *arguments], env=given, capture_output=True, text=True)

    return run


def words(line: str) -> list[str]:
    return line.removeprefix("<").removesuffix(">").split("><")


def test_one_node_launches_all_of_its_gpus(submit):
    ended = submit("submit_slurm.sh", "--max_train_steps", "7", "--prompt", "two words")
    assert ended.returncode == 0, ended.stderr
    given = words(ended.stdout.strip())
    start = given.index("trainers/train_vpog.py")
    assert given[:4] == ["launch", "-q", "--config_file", "accelerate_configs/a100x8_ddp.yaml"]
    options = dict(zip(given[4:start:2], given[5:start:2], strict=True))
    assert options == {
        "--num_machines": "1",
        "--num_processes": "4",
        "--main_process_ip": "node-a",
        "--main_process_port": "24711",
        "--machine_rank": "0",
    }
    assert given[start + 1 :] == [
        *("--config", "configs/vpog/croco_large.yaml", "--resume_from_checkpoint", "auto"),
        *("--max_train_steps", "7", "--prompt", "two words"),
    ]


def test_every_node_has_its_rank_and_all_meet_at_the_first(submit):
    ended = submit("submit_slurm_multinode.sh", SLURM_JOB_NUM_NODES="2")
    assert ended.returncode == 0, ended.stderr
    nodes = [words(line) for line in ended.stdout.splitlines()]
    value = [{name: node[node.index(name) + 1] for name in node if name.startswith("--m")} for node in nodes]
    assert [each.pop("--machine_rank") for each in value] == ["0", "1"]
    assert value[0] == value[1]
    assert all(node[node.index("--num_processes") + 1] == "8" for node in nodes)


def test_a_job_that_stopped_with_a_checkpoint_is_queued_again(submit):
    stopped = submit("submit_slurm.sh", ENDS_WITH="75")
    assert stopped.returncode == 75
    assert stopped.stdout.splitlines()[-1] == "requeue 4711"
    wrong = submit("submit_slurm.sh", ENDS_WITH="2")
    assert wrong.returncode == 2
    assert "requeue" not in wrong.stdout


def test_outside_slurm_it_says_what_is_missing(submit):
    ended = submit("submit_slurm.sh", SLURM_SUBMIT_DIR="")
    assert ended.returncode != 0
    assert "sbatch" in ended.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
