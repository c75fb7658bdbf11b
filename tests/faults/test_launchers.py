"""Signals as they arrive in practice: at `accelerate launch`, the script, the process group; and launchers killed.

Whoever is signalled, the run ends in a checkpoint, says so in exit.json, and leaves no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import runs

from trainers.common import checkpoints

PROGRAM = Path(__file__).parent / "slow_program.py"
MARK = "TEST_LAUNCH"
PRESETS = {1: "cpu.yaml", 2: "cpu_2proc.yaml"}
SETTINGS = {"max_train_steps": 600, "logging_steps": 2, "checkpointing_steps": 1000}
STARTS_WITHIN = 120
"""Seconds to import everything, twice, on a machine that has other work."""


class Launched:
    """`accelerate launch` of the slow program, and every process that comes of it."""

    def __init__(self, folder: Path, processes: int, place: str, *others: str, **training):
        self.folder, self.place, self.processes = folder, place, processes
        self.run_dir, self.log, self.mark = folder / "run", folder / "log", uuid.uuid4().hex
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(runs.ROOT / "accelerate_configs" / PRESETS[processes]), str(PROGRAM), str(folder), place]
        command += runs.command_line(self.run_dir, *others, **SETTINGS | training)
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT), MARK: self.mark}
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                command, cwd=runs.ROOT, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def alive(self) -> list[int]:
        """Processes of this launch, the launcher among them, wherever they hang in the tree of processes."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # of another user, or just ended
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def scripts(self) -> list[int]:
        """The processes that train (a launcher's command line names the program, too)."""
        return [pid for pid in self.alive() if pid != self.launcher.pid and self._is_script(pid)]

    def _is_script(self, pid: int) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3] in (
                [b"-u", str(PROGRAM).encode()],
                [str(PROGRAM).encode(), str(self.folder).encode()],
            )
        return False

    def wait_until_there(self, *ranks: int) -> None:
        """Until these ranks (all by default) are in the slow place."""
        self.wait_for(*(self.folder / f"{self.place}-{rank}" for rank in ranks or range(self.processes)))

    def wait_for(self, *files: Path) -> None:
        """Until these files exist."""
        give_up = time.monotonic() + STARTS_WITHIN
        while not all(file.exists() for file in files):
            # asked first: a process that is just being started shows no environment for a moment
            assert self.launcher.poll() is None or self.alive(), self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)

    def wait_until_gone(self, seconds: float) -> float:
        """Until no process is left; how long that took."""
        began = time.monotonic()
        while self.launcher.poll() is None or self.alive():
            assert time.monotonic() < began + seconds, f"{self.alive()} are left\n{self.log.read_text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def exit_code(self) -> int | None:
        """What exit.json says."""
        path = self.run_dir / "exit.json"
        return json.loads(path.read_text())["code"] if path.exists() else None

    def check_stopped(self) -> int:
        """One checkpoint, verified, exit code 75; returns the step."""
        assert self.exit_code() == 75, self.log.read_text()
        found = checkpoints.list_checkpoints(self.run_dir)
        assert found, self.log.read_text()
        assert checkpoints.verify(found[0]) == []
        assert not list(self.run_dir.glob("*.tmp"))
        return checkpoints.step_of(found[0])


FAST = {
    (1, "updates", "SIGTERM", "launcher"),
    (1, "start-up", "SIGUSR1", "launcher"),
    (1, "updates", "SIGUSR1", "group"),
    (2, "updates", "SIGTERM", "launcher"),
    (2, "start-up", "SIGUSR1", "launcher"),
}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(map(str, case)))
    for case in [
        (processes, place, number, target)
        for processes in (1, 2)
        for place in ("updates", "start-up")
        for number in ("SIGTERM", "SIGUSR1")
        for target in ("launcher", "script", "group")
    ]
]


@pytest.mark.parametrize(("processes", "place", "number", "target"), CASES)
def test_a_signal_ends_in_a_checkpoint_and_leaves_no_process(tmp_path, processes, place, number, target):
    """Promised for SIGTERM and SIGUSR1, to the launcher, its process group or the scripts, in start-up and training."""
    number = getattr(signal, number)
    with Launched(tmp_path, processes, place) as launched:
        launched.wait_until_there()
        if target == "launcher":
            os.kill(launched.launcher.pid, number)
        elif target == "group":
            os.killpg(launched.launcher.pid, number)
        else:
            for pid in launched.scripts():
                os.kill(pid, number)
        launched.wait_until_gone(60)
        step = launched.check_stopped()
        assert (step <= 2) if place == "start-up" else (4 <= step < 600)


def test_a_launcher_that_is_killed_leaves_no_orphan(tmp_path):
    """SIGKILL cannot be noticed by the launcher; its two processes save and end all the same."""
    with Launched(tmp_path, 2, "updates") as launched:
        launched.wait_until_there()
        launched.launcher.kill()
        launched.wait_until_gone(60)
        assert launched.check_stopped() >= 4


def test_a_stop_does_not_wait_for_a_loader_that_hangs(tmp_path):
    """One of two ranks waits for data for ever, the other for its gradients: both leave long before they are killed."""
    with Launched(tmp_path, 2, "loader") as launched:
        launched.wait_until_there(1)
        time.sleep(0.5)
        launched.launcher.terminate()
        assert launched.wait_until_gone(60) < 25
        assert launched.check_stopped() == 3  # eight samples each; item 30 belongs to the fourth update


def test_a_run_started_again_waits_for_the_one_that_is_still_saving(tmp_path):
    """A scheduler may start the next job while the last one writes its checkpoint; that one then goes on."""
    with Launched(tmp_path, 1, "save", max_train_steps=40) as first:
        first.wait_for(first.run_dir / "metrics.jsonl")
        first.launcher.terminate()
        first.wait_for(tmp_path / "save-0")
        arguments = runs.command_line(
            first.run_dir, **SETTINGS | {"max_train_steps": 40, "resume_from_checkpoint": "auto"}
        )
        second = runs.start(tmp_path / "second", runs.train_in_child, arguments)
        assert runs.wait_for((tmp_path / "second").exists, second)
        time.sleep(2)  # it has come to the lock
        assert second.is_alive(), (tmp_path / "second").read_text()
        assert first.alive()
        (tmp_path / "go-on").touch()
        assert runs.end(second) == 0, (tmp_path / "second").read_text()
        first.wait_until_gone(10)
        assert "resumed from" in (tmp_path / "second").read_text()
        assert checkpoints.verify(first.run_dir / "checkpoint-40") == []
        assert first.exit_code() == 0
        steps = [row["step"] for row in runs.rows_of(first.run_dir)]
        assert steps == list(range(2, 41, 2))


def test_a_validation_longer_than_the_process_group_waits_does_not_end_the_run(tmp_path):
    """The main process may validate, or encode data before the others, for as long as it takes."""
    others = ["--validation.validation_steps=1", "--validation.num_samples=8"]
    with Launched(tmp_path, 2, "validation", *others, max_train_steps=1) as launched:
        assert launched.launcher.wait(STARTS_WITHIN) == 0, launched.log.read_text()
        launched.wait_until_gone(10)
        assert launched.exit_code() == 0
        assert [row["step"] for row in runs.rows_of(launched.run_dir) if "validation/loss_flow" in row] == [1]
        assert checkpoints.verify(launched.run_dir / "checkpoint-1") == []
