"""docker/slurm/train.sbatch with programs in the place of Slurm's: when it requeues itself, and what it runs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "slurm" / "train.sbatch"


@pytest.fixture
def start(tmp_path):
    """``start(srun=shell commands, state="RUNNING", arguments=(), **environment)``: the script as Slurm runs it."""
    started = []

    def run(srun, *, state="RUNNING", arguments=(), **environment):
        programs = {
            "srun": f'printf "%s\\n" "$@" > "{tmp_path}/srun"\n{srun}',
            "scontrol": f'[ $1 = show ] && echo "JobId=7 JobState={state} Reason=None" || echo "$@" >>requeued',
            "sleep": f'[ "$1" = 60 ] || exec /bin/sleep "$@"; touch "{tmp_path}/slept"',
        }
        (tmp_path / "bin").mkdir()
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        given = {
            **{"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)},
            **{"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"},
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(["bash", SCRIPT, *arguments], env=given | environment, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def was_requeued(tmp_path):
    path = tmp_path / "requeued"
    return path.exists() and path.read_text() == "requeue 7\n"


@pytest.mark.parametrize("status", [75, 138, 140, 143])
def test_what_was_saved_is_requeued(start, tmp_path, status):
    process = start(f"exit {status}")
    _, err = process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (status, True)
    assert f"status {status}: requeued" in err
    assert (tmp_path / "slept").exists()


@pytest.mark.parametrize("status", [0, 1, 2, 130, 137])
def test_what_is_over_or_wrong_is_not(start, tmp_path, status):
    process = start(f"exit {status}")
    process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (status, False)


@pytest.mark.parametrize(("state", "requeued"), [("CANCELLED", False), ("PREEMPTED", False), ("TIMEOUT", True)])
def test_a_job_that_slurm_has_ended(start, tmp_path, state, requeued):
    process = start("exit 143", state=state)
    process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (143, requeued)


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", False), ("TIMEOUT", True)])
def test_a_task_that_srun_ended_as_another_failed_is_no_reason(start, tmp_path, state, requeued):
    process = start("exit 143", state=state, SLURM_NTASKS="8")
    process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (143, requeued)


def test_not_for_ever(start, tmp_path):
    process = start("exit 75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    _, err = process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (75, False)
    assert "after 3 restarts" in err


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_reaches_the_tasks(start, tmp_path, signum):
    ready = tmp_path / "ready"
    process = start(f"trap 'sleep 0.3; exit 138' USR1; touch {ready}; while :; do sleep 0.05; done")
    end = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signum)
    process.communicate(timeout=20)
    assert (process.returncode, was_requeued(tmp_path)) == (138, True)


def test_ranks_follow_from_the_job_and_the_users_words_come_last(start, tmp_path):
    process = start("exit 0", arguments=["trainer=ddp", "run_name=two words"])
    process.communicate(timeout=20)
    assert (tmp_path / "srun").read_text().splitlines() == [
        *("--kill-on-bad-exit=1", "python", "train.py", "trainer.devices=4", "trainer.num_nodes=2"),
        *("trainer=ddp", "run_name=two words"),
    ]


def test_outside_of_a_job_it_says_so(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    assert "submit this file with sbatch" in done.stderr
