"""A run that is killed goes on by the same command and ends as one that was not: to the bit, in weights and logs."""

import random
import re
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial

import jobs
import pytest

KILLED = -signal.SIGKILL


def go_on(folder, undisturbed, *overrides):
    """Give the command again until it ends, and compare."""
    ended = jobs.run(folder, *jobs.EVERYTHING, *overrides)
    assert ended.status == 0, ended.said
    jobs.assert_same(folder, undisturbed)


def random_kills(folder, random_source, wanted, longest):
    """Kill the run up to ``wanted`` times, each time within ``longest`` seconds of its first line; how often it was."""
    kills = 0
    while kills < wanted:
        job = jobs.Job(folder, *jobs.EVERYTHING)
        job.wait_for("run        ")  # before it, nothing has been written
        time.sleep(random_source.uniform(0, longest))
        job.send(signal.SIGKILL)
        ended = job.end()
        if ended.status == 0:
            return kills
        assert ended.status == KILLED, ended.said
        kills += 1
    return kills


def run_seconds(undisturbed):
    """About as long as a run takes here, from its first line to its end."""
    start = time.monotonic()
    folder = undisturbed.with_name("timed")
    job = jobs.Job(folder, *jobs.EVERYTHING)
    job.wait_for("run        ")
    begun = time.monotonic()
    assert job.end().status == 0
    shutil.rmtree(folder)
    return time.monotonic() - begun if begun > start else 0.0


@pytest.mark.faults("SIGKILL at random moments, several in one run")
def test_kills_at_random_moments_change_no_bit(tmp_path, undisturbed, record_property):
    """Some kills here; the long test has many."""
    kills = random_kills(tmp_path, random.Random(time.time_ns()), 3, run_seconds(undisturbed) / 2)
    record_property("tried", kills)
    go_on(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.faults("SIGKILL at random moments, several in one run")
def test_many_kills_at_random_moments_change_no_bit(tmp_path, undisturbed, record_property):
    """At least 60, in runs that are killed up to five times each."""
    source, seconds, kills, number = random.Random(time.time_ns()), run_seconds(undisturbed), 0, 0
    while kills < 60:
        folder = tmp_path / str(number)
        kills += random_kills(folder, source, source.randint(1, 5), seconds * source.choice([0.3, 0.6, 1]))
        go_on(folder, undisturbed)
        shutil.rmtree(folder)
        number += 1
    record_property("tried", kills)


def kill_at_file_event(folder, number):
    """Whether a run that was to be killed at this change of its folder was."""
    job = jobs.run(folder, *jobs.EVERYTHING, faults=[jobs.KillAtFileEvent(folder, number)])
    assert job.status in (0, KILLED), job.said
    return job.status == KILLED


@pytest.mark.faults("SIGKILL between two changes of the run folder")
def test_kills_as_files_are_changed_change_no_bit(tmp_path, undisturbed, record_property):
    """Each in what the one before it left: at the start, at a checkpoint, amid the renames of the next."""
    tried = [number for number in (4, 9, 13, 22) if kill_at_file_event(tmp_path, number)]
    record_property("tried", len(tried))
    assert len(tried) == 4
    go_on(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.faults("SIGKILL between two changes of the run folder")
def test_a_kill_before_each_change_of_a_file_changes_no_bit(tmp_path, undisturbed, record_property):
    """All of them, from the run's first file to its last."""
    number = 1
    while kill_at_file_event(tmp_path / str(number), number):
        go_on(tmp_path / str(number), undisturbed)
        shutil.rmtree(tmp_path / str(number))
        number += 1
    record_property("tried", number - 1)
    assert number > 50


@dataclass
class KillAmidWrites:
    """The system kills the process where a file would grow beyond ``size`` bytes."""

    size: int

    def __call__(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@pytest.mark.faults("killed amid the writing of a checkpoint")
@pytest.mark.parametrize("share", [0.5, pytest.param(0.01, marks=jobs.SLOW), pytest.param(0.999, marks=jobs.SLOW)])
def test_a_kill_amid_a_write_costs_only_what_was_being_written(tmp_path, undisturbed, share):
    size = (jobs.folder_of(undisturbed) / "checkpoints" / "last.ckpt").stat().st_size
    first = jobs.Job(tmp_path, *jobs.EVERYTHING)
    first.wait_for("epoch   1")
    first.send(signal.SIGKILL)
    assert first.end().status == KILLED
    before = (jobs.folder_of(tmp_path) / "checkpoints" / "last.ckpt").read_bytes()
    killed = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[KillAmidWrites(int(share * size))])
    assert killed.status == -signal.SIGXFSZ
    assert (jobs.folder_of(tmp_path) / "checkpoints" / "last.ckpt").read_bytes() == before
    go_on(tmp_path, undisturbed)


@pytest.mark.faults("SIGTERM, SIGUSR1 and SIGUSR2 amid an epoch")
@pytest.mark.parametrize(
    ("signum", "status"),
    [
        ("SIGUSR1", 138),
        pytest.param("SIGTERM", 143, marks=jobs.SLOW),
        pytest.param("SIGUSR2", 140, marks=jobs.SLOW),
    ],
)
def test_a_signal_saves_at_once_and_ends_with_its_status(tmp_path, undisturbed, signum, status):
    # No checkpoint but the signal's own comes before the end of the epoch.
    ended = jobs.run(
        tmp_path,
        *(*jobs.EVERYTHING, "callbacks.checkpoint_every_n_steps=null"),
        faults=[jobs.BeforeBatch(12, partial(signal.raise_signal, getattr(signal, signum)))],
    )
    assert ended.status == status
    # The signal comes amid the second epoch, in the first batch of step 6: that step is finished and saved.
    assert ended.said.splitlines()[-1] == (f"stopped by {signum}: saved at step 7; the same command goes on from there")
    assert jobs.checkpoint(tmp_path, "last.ckpt")["global_step"] == 7
    status = (jobs.folder_of(tmp_path) / "results" / "status.json").read_text()
    assert '"stopped"' in status
    again = jobs.Job(tmp_path, *jobs.EVERYTHING)
    again.wait_for("resuming from")
    assert re.search(r"last\.ckpt at step 7\b", again.said)
    assert again.end().status == 0
    jobs.assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.faults("SIGTERM before training and after it")
def test_a_signal_while_nothing_is_trained_ends_at_once(tmp_path, undisturbed):
    early = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[partial(signal_in_call, "model_cost")])
    assert early.status == 143
    assert early.said.splitlines()[-1].startswith("stopped by SIGTERM: nothing was left to save")
    late = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[partial(signal_in_call, "_step_memory")])
    assert late.status == 143
    go_on(tmp_path, undisturbed)


def signal_in_call(name):
    """Send this process SIGTERM as train() calls the function ``name``."""
    import vit_attn.training.run as module

    function = getattr(module, name)

    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    setattr(module, name, signalled)
