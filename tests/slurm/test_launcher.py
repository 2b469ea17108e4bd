"""hydra/launcher=slurm without a cluster: programs of Slurm's names stand in where it is told or asked something."""

import importlib.util
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import submitit
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from vit_attn import outcomes, slurm
from vit_attn.errors import LostRankError, UserError
from vit_attn.training.stopping import Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """``programs(name=script, …)``: these are all the programs that there are, besides the shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("cat", "sh"):
        (folder / name).symlink_to(f"/bin/{name}")

    def write(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return write


@pytest.fixture
def slurm_commands(programs):
    programs(**dict.fromkeys(("sbatch", "scontrol", "squeue", "srun", "scancel"), "exit 1"))
    return programs


@pytest.fixture(autouse=True)
def _nothing_went_wrong_before():
    outcomes.mistakes.clear()
    outcomes.crashes.clear()
    yield
    outcomes.mistakes.clear()
    outcomes.crashes.clear()


def refused(done):
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    return line


def test_without_a_multirun_it_is_refused(command, tiny, tmp_path):
    done = command("train", *tiny, "hydra/launcher=slurm", f"experiments_dir={tmp_path / 'runs'}")
    assert refused(done) == "error: hydra/launcher=slurm submits the jobs of a multirun: add -m"
    assert not (tmp_path / "runs").exists()


def test_where_slurm_is_not_it_is_refused(command, tiny, programs):
    line = refused(command("train", "-m", *tiny, "hydra/launcher=slurm", "seed=1,2"))
    assert "no sbatch, scontrol, squeue, srun here; run it on a login node" in line


def test_what_sbatch_refuses_is_one_line(command, tiny, slurm_commands, tmp_path):
    slurm_commands(sbatch="echo 'sbatch: error: invalid partition specified: tset' >&2; exit 1")
    settings = (f"experiments_dir={tmp_path / 'runs'}", "seed=1,2", "hydra.launcher.partition=tset")
    line = refused(command("train", "-m", *tiny, "hydra/launcher=slurm", *settings))
    assert line == "error: hydra/launcher=slurm: sbatch: error: invalid partition specified: tset"


def test_an_unknown_parameter_is_one_line(command, tiny, slurm_commands):
    line = refused(command("train", "-m", *tiny, "hydra/launcher=slurm", "hydra.launcher.patition=gpu", "seed=1,2"))
    assert "'patition'" in line or "partition" in line


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in ("hydra_plugins.hydra_submitit_launcher", "hydra_plugins.hydra_submitit_launcher.submitit_launcher"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("without_extra", ROOT / "hydra_plugins" / "vit_attn_slurm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=r"pip install -e '\.\[slurm\]'"):
        module.SlurmLauncher(timeout_min=3).setup(hydra_context=None, task_function=None, config=None)


def launcher_params(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = ["hydra/launcher=slurm", "hydra.job.name=train", "+hydra.job.num=0", *overrides]
        config = compose("config", [f"experiments_dir={tmp_path}", *settings], return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    params = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    return {key: value for key, value in params.items() if key != "_target_"}


def test_what_is_submitted(tmp_path, slurm_commands):
    slurm_commands(sbatch="echo Submitted batch job 7")
    params = launcher_params(tmp_path, "hydra.launcher.setup=[module load cuda]", "hydra.launcher.gpus_per_node=2")
    jobs = slurm.submit(print, params, [["seed=0"], ["seed=1"], ["seed=2"]], 0)
    assert [job.job_id for job in jobs] == ["7_0", "7_1", "7_2"]
    text = next(tmp_path.rglob("7_submission.sh")).read_text()
    for line in ("array=0-2%3", "gpus-per-node=2", "time=240", "signal=USR2@120", "open-mode=append"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --mem" not in text
    assert f"export PYTHONPATH={ROOT}" in text
    assert "\nmodule load cuda\n" in text
    assert "--kill-on-bad-exit=1" in text
    assert (tmp_path / "default" / ".submitit").stat().st_mode & 0o077 == 0
    call = pickle.loads(jobs[1].paths.submitted_pickle.read_bytes())  # noqa: S301  # of this test's own making
    assert call.args[:3] == (["seed=1"], "hydra.sweep.dir", 1)
    assert call._timeout_countdown == 100


def returned(value, status=JobStatus.COMPLETED):
    return JobReturn(status=status, _return_value=value)


@pytest.fixture
def _signals():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_job_tells_how_it_ended(capsys):
    assert slurm.run_job(lambda: returned(None)) == {"status": 0, "message": ""}
    assert slurm.run_job(lambda: returned(UserError("no such thing"))) == {"status": 2, "message": "no such thing"}
    assert slurm.run_job(lambda: returned(LostRankError("rank 1")))["status"] == 75
    crash = slurm.run_job(lambda: returned(RuntimeError("it\nbroke")))
    assert crash == {"status": 1, "message": "RuntimeError: it broke"}
    assert "error: no such thing" in capsys.readouterr().err


def test_a_mistake_on_the_way_to_the_job_is_one_too():
    def compose_wrongly():
        raise UserError("no such key")

    assert slurm.run_job(compose_wrongly) == {"status": 2, "message": "no such key"}


def test_a_stopped_job_ends_its_process_without_a_result(capsys):
    def stop():
        raise Stopped(signal.SIGTERM, 7)

    with pytest.raises(SystemExit) as ended:
        slurm.run_job(stop)
    assert ended.value.code == 143
    assert "saved at step 7" in capsys.readouterr().err


@pytest.mark.usefixtures("_signals")
def test_both_signals_requeue_a_job():
    heard = []
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))  # as submitit does

    def send():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        return returned(None)

    slurm.run_job(send)
    assert heard == [signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.usefixtures("_signals")
def test_ranks_after_the_first_stay_until_srun_ends_them(monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(slurm.time, "sleep", sleep)
    monkeypatch.setattr(slurm.os, "_exit", sys.exit)
    for rank in ("", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank) if rank else monkeypatch.delenv("SLURM_PROCID", raising=False)
        slurm.let_first_rank_end(138)
    assert slept == []
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit) as ended:
        slurm.let_first_rank_end(138)
    assert (ended.value.code, slept) == (138, [60])


@pytest.fixture
def job(tmp_path):
    """``job(name, *results)``: a job that Slurm has been given, one result per rank; None: none yet."""

    def make(name, *results):
        made = submitit.SlurmJob(folder=tmp_path / name, job_id=name, tasks=list(range(len(results))))
        (tmp_path / name).mkdir()
        for rank, result in enumerate(results):
            if result is not None:
                with made.task(rank).paths.result_pickle.open("wb") as file:
                    pickle.dump(result, file)
        return made

    return make


@pytest.fixture
def wait(monkeypatch, caplog):
    """Wait for jobs without patience; returns what was said."""
    monkeypatch.setattr(slurm, "_QUEUE_POLL", 0)
    monkeypatch.setattr(slurm, "_RESULT_POLL", 0.01)
    monkeypatch.setattr(slurm.log, "propagate", True)

    def run(*jobs):
        with caplog.at_level("INFO"):
            slurm.wait(jobs)
        return [record.getMessage() for record in caplog.records]

    return run


FINE, WRONG = ("success", {"status": 0, "message": ""}), ("success", {"status": 2, "message": "no 'strideed'"})


def test_results_of_all_ranks_count(job, wait):
    said = wait(job("7_0", FINE, FINE), job("7_1", FINE, ("error", "Traceback:\n  of it\nRuntimeError: rank 1 broke")))
    assert said[0].endswith("job 7_0 has finished")
    assert "job 7_1: RuntimeError: rank 1 broke; see " in said[1]
    assert said[1].endswith("7_1_0_log.err")
    assert (len(outcomes.crashes), outcomes.mistakes) == (1, [])


def test_a_mistake_keeps_its_status(job, wait):
    wait(job("7_0", WRONG), job("7_1", ("success", {"status": 75, "message": "lost"})))
    assert [(str(each), each.status) for each in outcomes.mistakes] == [("no 'strideed'", 2), ("lost", 75)]
    assert outcomes.crashes == []


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "OUT_OF_MEMORY", "NODE_FAIL", None])
def test_a_job_that_slurm_ended_is_not_waited_for(job, wait, programs, state):
    told = f"echo '7_1  {state}  0'" if state else "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    programs(squeue=told)
    said = wait(job("7_0", FINE), job("7_1", FINE, None))
    assert said[-1].split("; see")[0].endswith(f"job 7_1: ended by Slurm as {state or 'GONE'}, without a result")
    assert len(outcomes.crashes) == 1


def test_a_job_that_comes_back_is_waited_for(job, wait, programs, tmp_path):
    made = job("7", None)
    path = made.task(0).paths.result_pickle
    (tmp_path / "result").write_bytes(pickle.dumps(FINE))
    # No answer, then requeued though it looked ended a moment ago, then on, then done.
    steps = [
        "echo 'Unable to contact slurm controller' >&2; exit 1",
        "echo '7 PREEMPTED 0'",
        *("echo '7 PENDING 1'", "echo '7 FAILED 1'", "echo '7 RUNNING 2'"),
        f"cat '{tmp_path / 'result'}' > '{path}'; echo '7 COMPLETED 2'",
    ]
    for number, step in enumerate(steps):
        (tmp_path / f"step{number}").write_text(step)
    folder = f"'{tmp_path}'"
    count = f"n=$(cat {folder}/count 2>/dev/null || echo 0); echo $((n + 1)) > {folder}/count"
    programs(squeue=f"{count}; [ -f {folder}/step$n ] && . {folder}/step$n")
    said = wait(made)
    assert [line.split("slurm      ")[1] for line in said] == [
        "job 7 was requeued (1); it goes on from its checkpoint",
        "job 7 was requeued (2); it goes on from its checkpoint",
        "job 7 has finished",
    ]
    assert (tmp_path / "count").read_text() == "6\n"


def test_ctrl_c_leaves_the_jobs_to_slurm(job, wait, monkeypatch, caplog):
    def interrupt(seconds):
        raise KeyboardInterrupt

    made = job("7_0", None)
    monkeypatch.setattr(slurm.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wait(made)
    assert "scancel 7 ends them" in caplog.text
