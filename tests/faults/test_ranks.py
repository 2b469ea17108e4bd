"""Runs of two processes, started as a user does: all of them killed, one of them lost, a signal, a bad batch of one."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest

pytestmark = pytest.mark.slow

PAIR = (*jobs.EVERYTHING, "trainer=ddp_cpu", "data.batch_size=16")


class Command:
    """``python train.py trainer=ddp_cpu …``, in a process group of its own."""

    def __init__(self, folder, *overrides, env=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "said.txt"
        arguments = [sys.executable, str(jobs.ROOT / "train.py"), *PAIR, f"experiments_dir={folder}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                arguments, stdout=output, stderr=output, cwd=jobs.ROOT, env=environment, start_new_session=True
            )

    @property
    def said(self):
        return self.output.read_text()

    def wait_for(self, words):
        end = time.monotonic() + 120
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def other(self):
        """The process that Lightning has launched."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ours = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ours) == 1
        return ours[0]

    def kill_all(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds=180):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"it hangs: {self.said}") from None


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def go_on(folder, undisturbed_pair):
    command = Command(folder)
    assert command.end() == 0, command.said
    assert "resuming from" in command.said
    jobs.assert_same(folder, undisturbed_pair)


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed_pair")
    command = Command(folder)
    assert command.end() == 0, command.said
    return folder


@pytest.mark.faults("SIGKILL of both processes of a run, at random moments")
def test_kills_of_both_processes_change_no_bit(tmp_path, undisturbed_pair, record_property):
    source, kills = random.Random(time.time_ns()), 0
    while kills < 6:
        command = Command(tmp_path)
        command.wait_for("run        ")
        command.wait_for("epoch" if kills % 2 else "run ")
        time.sleep(source.uniform(0, 2))
        if command.process.poll() is not None:
            break
        command.kill_all()
        kills += 1
    record_property("tried", kills)
    assert kills > 2
    go_on(tmp_path, undisturbed_pair)


@pytest.mark.faults("one process of two killed")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_job_which_goes_on(tmp_path, undisturbed_pair, rank):
    command = Command(tmp_path)
    command.wait_for("epoch   1")
    other = command.other()
    start = time.monotonic()
    os.kill(other if rank else command.process.pid, signal.SIGKILL)
    status = command.end(30)
    while is_alive(other):
        assert time.monotonic() - start < 30
        time.sleep(0.1)
    if rank:
        assert status == 75
        assert command.said.splitlines()[-1] == (
            "error: process 1 of the run was killed by signal 9; the same command goes on from the last checkpoint"
        )
        assert "Traceback" not in command.said
    else:
        assert status == -signal.SIGKILL
    go_on(tmp_path, undisturbed_pair)


@pytest.mark.faults("SIGTERM to one process of two, or to both")
@pytest.mark.parametrize("whom", ["first", "second", "both"])
def test_a_signal_to_any_process_saves_once_and_ends_both(tmp_path, undisturbed_pair, whom):
    command = Command(tmp_path, "callbacks.checkpoint_every_n_steps=null")
    command.wait_for("epoch   1")
    other = command.other()
    if whom == "both":
        os.killpg(command.process.pid, signal.SIGTERM)
    else:
        os.kill(command.process.pid if whom == "first" else other, signal.SIGTERM)
    assert command.end(30) == 143, command.said
    assert not is_alive(other)
    assert re.search(r"^stopped by SIGTERM: saved at step \d+; the same command goes on", command.said, re.M)
    assert "Traceback" not in command.said
    go_on(tmp_path, undisturbed_pair)


POISON = """
from vit_attn.training.module import Classifier

step = Classifier.training_step

def poisoned(module, batch, batch_idx):
    loss = step(module, batch, batch_idx)
    place = (module.current_epoch, batch_idx)
    bad = module.global_rank == 1 and place == (1, 5) and place not in module.left_out
    return loss * float("nan") if bad else loss

Classifier.training_step = poisoned
"""


@pytest.mark.faults("loss NaN on one process of two")
def test_a_bad_batch_of_one_process_is_left_out_by_both(tmp_path, undisturbed_pair):
    (tmp_path / "sitecustomize.py").write_text(POISON)
    poisoned = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(jobs.ROOT)])}
    command = Command(tmp_path, env=poisoned)
    assert command.end() == 2, command.said
    assert "error: the loss is not finite on another rank in step 7 (batch 6 of epoch 2)" in command.said
    command = Command(tmp_path, "trainer.on_nan=rewind", env=poisoned)
    assert command.end() == 0, command.said
    assert "left out from now on" in command.said
    assert len(jobs.rows(tmp_path)) == len(jobs.rows(undisturbed_pair))
