"""A real Slurm cluster of one node: what it stops, requeues and starts again ends as if nothing had happened.

Needs Debian's packages slurm-wlm and munge (see ``cluster``, beside this file): pytest -m slurm
"""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "slurm" / "train.sbatch"
# Everything that a checkpoint must hold: averaged weights, dropout, mixup, an accumulation, a schedule, early stopping.
SETTINGS = (
    *("data=digits", "trainer=cpu", "logger=none", "model.depth=2", "model.embed_dim=32", "model.num_heads=2"),
    *("trainer.max_epochs=10", "trainer.log_every_n_steps=1", "trainer.accumulate_grad_batches=2"),
    *("model.drop_rate=0.1", "data.augment.mixup=0.2", "optimizer.lr=2e-3", "data.batch_size=32"),
    *("callbacks.ema.enabled=true", "callbacks.ema.decay=0.9"),
    *("callbacks.early_stopping.enabled=true", "callbacks.early_stopping.patience=50", "explain_images=0"),
    *("callbacks.checkpoint_every_n_steps=15", "callbacks.attention_probe.pictures_every_n_epochs=1000"),
)
KEY = "0123456789abcdef" * 2 + "planted!"
TWO_RANKS = ("trainer=ddp_cpu", "hydra.launcher.tasks_per_node=2")


@pytest.fixture(scope="module")
def environment():
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "PYTHONPATH"}
    return clean | {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    """Runs without Slurm, by name: one after another, beside what the tests do meanwhile."""
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = {f"seed{seed}": (*SETTINGS, f"seed={seed}") for seed in range(3)}
    lines["ddp"] = (*SETTINGS, "trainer=ddp_cpu", "seed=0")

    def run(name):
        command = [sys.executable, ROOT / "train.py", *lines[name], f"run_name={name}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=folder, env=environment, timeout=300, **pipes)
        assert done.returncode == 0, done.stderr
        return folder / "experiments" / "default" / name

    with ThreadPoolExecutor(max_workers=1) as pool:
        started = {name: pool.submit(run, name) for name in lines}
        yield lambda name: started[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, environment):
    """A running cluster; call it with a command's arguments to get what that prints."""
    folder = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).with_name("cluster")
    begun = subprocess.run([script, "start", folder], capture_output=True, text=True, env=environment | {"CPUS": "2"})
    if begun.returncode:
        pytest.fail(begun.stderr)
    environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def ask(*command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield ask
    subprocess.run([script, "stop", folder], check=True, env=environment)
    assert not folder.exists()


@pytest.fixture
def launch(tmp_path, environment, slurm):
    """Start ``train.py -m hydra/launcher=slurm`` in a folder of its own."""
    started = []

    def start(*arguments):
        command = [sys.executable, ROOT / "train.py", "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *arguments], cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(happened, what, seconds=180):
    """Wait until ``happened()``; returns what it returned."""
    end = time.monotonic() + seconds
    while not (answer := happened()):
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.1)
    return answer


def lines_of(run, *, with_text):
    path = run / "logs" / "train.log"
    return [line for line in path.read_text().splitlines() if with_text in line] if path.exists() else []


def starts(run):
    return len(lines_of(run, with_text="run        "))


def until_trains(run):
    """Wait until a run is amid its training."""
    until(lambda: lines_of(run, with_text="epoch "), f"an epoch of {run.name}")
    assert not lines_of(run, with_text=" 10/10 "), "it was over too soon to be disturbed"


def array_of(slurm):
    """Number of the only job array, or job, that has not ended."""
    (number,) = {*slurm("squeue", "--noheader", "--array", "--format=%F", "--states=PENDING,RUNNING").split()}
    return number


def job_state(slurm, job):
    shown = slurm("scontrol", "show", "job", job)
    return {key: value for key, _, value in (part.partition("=") for part in shown.split())}


def until_ended(slurm, job):
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    until(lambda: job_state(slurm, job)["JobState"] in ended, f"end of job {job}")
    return job_state(slurm, job)


def assert_same(run, undisturbed):
    """Bit for bit: weights, optimizer, averages, schedule, and every logged number but speeds."""
    for name in ("last.ckpt", "best.ckpt"):
        mine, other = (torch.load(each / "checkpoints" / name, weights_only=True) for each in (run, undisturbed))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert leaves(mine[part]) == leaves(other[part]), f"{name}: {part}"
    rows, expected = (read_rows(each) for each in (run, undisturbed))
    assert len(rows) > 90
    assert rows == expected
    scores, expected = (json.loads((each / "results" / "metrics.json").read_text()) for each in (run, undisturbed))
    for part in ("val", "test", "best_step", "steps", "attention_statistics"):
        assert scores[part] == expected[part]


def leaves(node, prefix=""):
    if isinstance(node, dict):
        return {key: value for name, each in node.items() for key, value in leaves(each, f"{prefix}.{name}").items()}
    if isinstance(node, (list, tuple)):
        return leaves(dict(enumerate(node)), prefix)
    return {prefix: node.numpy().tobytes() if isinstance(node, torch.Tensor) else node}


def read_rows(run):
    with (run / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def test_a_sweep_whose_jobs_are_requeued_and_signalled(tmp_path, slurm, undisturbed, launch):
    command = launch(*SETTINGS, "experiment_name=sweep", "run_name=seed${seed}", "seed=0,1,2")
    runs = [tmp_path / "experiments" / "sweep" / f"seed{seed}" for seed in range(3)]
    until_trains(runs[0])
    array = array_of(slurm)
    slurm("scontrol", "requeue", f"{array}_0")
    until_trains(runs[1])
    slurm("scancel", "--signal=USR1", f"{array}_1")
    out, err = command.communicate(timeout=300)
    assert (command.returncode, err) == (0, "")
    for number, run in enumerate(runs):
        assert f"job {array}_{number} has finished" in out
        assert starts(run) == (2 if number < 2 else 1)
        assert_same(run, undisturbed(f"seed{number}"))
    assert (tmp_path / "experiments" / "sweep" / "report" / "report.html").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.endswith("_submitted.pkl") for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_the_script_requeues_itself(tmp_path, slurm, undisturbed):
    job = submit_script(slurm, tmp_path, "seed=0")
    run = tmp_path / "experiments" / "default" / "run"
    until_trains(run)
    slurm("scancel", "--signal=USR1", "--batch", job)  # to the script, which hands it on
    ended = until_ended(slurm, job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert starts(run) == 2
    assert_same(run, undisturbed("seed0"))


def test_two_ranks_of_the_launcher(tmp_path, slurm, undisturbed, launch):
    command = launch(*SETTINGS, *TWO_RANKS, "run_name=ddp", "seed=0")
    run = tmp_path / "experiments" / "default" / "ddp"
    until_trains(run)
    slurm("scancel", "--signal=USR1", array_of(slurm))
    out, err = command.communicate(timeout=300)
    assert (command.returncode, err) == (0, ""), out
    assert starts(run) == 2
    assert_same(run, undisturbed("ddp"))


def test_two_ranks_of_the_script(tmp_path, slurm, undisturbed):
    job = submit_script(slurm, tmp_path, "seed=0", "trainer=ddp_cpu", options=["--ntasks-per-node=2"])
    run = tmp_path / "experiments" / "default" / "run"
    until_trains(run)
    slurm("scancel", "--signal=USR1", job)  # to the tasks, as Slurm does before the time limit
    ended = until_ended(slurm, job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert starts(run) == 2
    assert_same(run, undisturbed("ddp"))


def test_the_script_requeues_no_mistake_and_nothing_cancelled(tmp_path, slurm):
    wrong = submit_script(slurm, tmp_path, "model.attention=strideed")
    unwanted = submit_script(slurm, tmp_path, "seed=0")
    until_trains(tmp_path / "experiments" / "default" / "run")
    slurm("scancel", unwanted)
    ended = until_ended(slurm, wrong)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "Did you mean 'strided'?" in (tmp_path / f"vit_attn-{wrong}.log").read_text()
    assert until_ended(slurm, unwanted)["JobState"] == "CANCELLED"
    time.sleep(10)  # KillWait is 5 seconds: what is left of the job has had its chance
    assert (job_state(slurm, unwanted)["JobState"], job_state(slurm, unwanted)["Restarts"]) == ("CANCELLED", "0")


def test_mistakes_and_lost_jobs_reach_the_launching_command(tmp_path, slurm, launch):
    command = launch(*SETTINGS, "run_name=${model.attention}", "model.attention=softmax,strideed")
    until_trains(tmp_path / "experiments" / "default" / "softmax")
    slurm("scancel", f"{array_of(slurm)}_0")
    out, err = command.communicate(timeout=300)
    assert command.returncode == 2
    assert err.startswith("error: unknown attention 'strideed'. Did you mean 'strided'?")
    assert err.count("\n") == 1
    assert "_0: ended by Slurm as CANCELLED, without a result" in out
    assert "Traceback" not in out + err


def submit_script(slurm, folder, *arguments, options=()):
    """Submit the script with :data:`SETTINGS`; its run is ``run`` below ``folder``."""
    place = (f"--chdir={ROOT}", f"--output={folder}/%x-%j.log", "--cpus-per-task=1")
    where = (f"experiments_dir={folder}/experiments", "run_name=run")
    return slurm("sbatch", "--parsable", *place, *options, SCRIPT, *SETTINGS, *where, *arguments).strip()
