"""W&B online, against a stand-in on the loopback: wandb_stub.py says what that shows and what it does not."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from wandb_stub import KEY, Stub, wandb_command

from vit_attn.tracking import loggers as tracking

ROOT = Path(__file__).parents[2]
SHORT = ("trainer.limit_train_batches=3", "trainer.limit_val_batches=2", "logger=wandb", "explain_images=0")


def environment(stub, **more):
    """What a user who is logged in has, and nothing of this process's own W&B."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY, **more}


def train_py(folder, tiny, stub, *overrides):
    command = [sys.executable, str(ROOT / "train.py"), *tiny, *SHORT, f"experiments_dir={folder}", *overrides]
    done = subprocess.run(command, env=environment(stub), cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def rows_of(run):
    return [json.loads(run["history"][line]) for line in sorted(run["history"])]


def aliases(artifact):
    return {alias["alias"] for alias in artifact["aliases"]} - {"latest"}


def test_an_online_run_uploads_its_numbers_pictures_and_checkpoints(tmp_path, tiny):
    with Stub() as stub:
        pictures = "callbacks.attention_probe.pictures_every_n_epochs=1"
        out = train_py(tmp_path, tiny, stub, pictures, "run_name=one", "logger.log_checkpoints=all")
        ((name, run),) = stub.runs.items()
        assert f"W&B        online: {stub.url}/me/vit_attn/runs/{name}" in out
    assert (run["displayName"], run["groupName"], run["jobType"]) == ("one", "default", "train")
    assert run["tags"] == ["softmax", "full", "digits"]
    assert run["exitcode"] == 0
    with (tmp_path / "default" / "one" / "logs" / "metrics.csv").open() as file:
        logged = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    rows = rows_of(run)
    assert [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row] == logged
    assert run["summary"]["val/acc"].keys() == {"max", "last"}
    assert json.loads(run["config"])["model.attention"] == {"value": "softmax"}
    drawn = {path.read_bytes() for path in (tmp_path / "default" / "one" / "results" / "attention").glob("*.png")}
    shown = {content for path, content in stub.uploads.items() if path.startswith(f"{name}/media/images/attention/")}
    assert len(shown) >= 2
    assert shown <= drawn
    kinds = {key: artifact["artifactTypeName"] for key, artifact in stub.artifacts.items()}
    models = {frozenset(aliases(stub.artifacts[key])): key for key, kind in kinds.items() if kind == "model"}
    assert models.keys() == {frozenset({"best", "step3"}), frozenset({"last", "step3"})}
    best = stub.uploads[f"{models[frozenset({'best', 'step3'})]}/best.ckpt"]
    assert best == (tmp_path / "default" / "one" / "checkpoints" / "best.ckpt").read_bytes()
    assert all(artifact["committed"] for artifact in stub.artifacts.values())
    # What has been uploaded needs no second copy on disk.
    assert not list((tmp_path / "default" / "one" / "logs" / "wandb").rglob("staging/*"))


@pytest.fixture
def service(monkeypatch, start):
    """``service(**how)`` → a stub that this process is logged in to."""
    stubs = []

    def begin(**how):
        stub = Stub(**how).__enter__()
        stubs.append(stub)
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return stub

    yield begin
    for stub in stubs:
        stub.kill()


@pytest.mark.faults("W&B dying amid a run")
def test_a_server_that_dies_costs_a_run_nothing_and_the_rest_can_be_uploaded(
    service, train, no_pictures, said, tmp_path
):
    service(die_after="UpsertBucket")
    began = time.perf_counter()
    run = train(*SHORT, "logger.finish_timeout=2", "run_name=one")
    assert time.perf_counter() - began < 40
    with (run.root / "logs" / "metrics.csv").open() as file:
        assert [row["test/acc"] for row in csv.DictReader(file)][-1]
    assert run.results["test"]["acc"] >= 0
    (line,) = [line for line in said.text.splitlines() if "to upload the rest" in line]
    with Stub() as stub:
        command = line.partition(": wandb ")[2].split()
        done = wandb_command(*command, env=environment(stub), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (uploaded,) = stub.runs.values()
    assert {"train/loss", "val/acc", "test/acc"} <= {name for row in rows_of(uploaded) for name in row}


def offline_lines(said):
    return [record.getMessage() for record in said.records if "this run is logged offline" in record.getMessage()]


def check_offline(logger, folder, written, said, why):
    logger.log_metrics({"loss": 1.0}, 0)
    tracking.finish_loggers([logger], failed=False)
    (line,) = offline_lines(said)
    assert why in line
    assert f"to upload it: wandb sync {folder / 'logs' / 'wandb'}" in said.text
    (file,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0


def test_a_key_that_is_refused_makes_the_run_offline(service, start, said, written):
    service(forbid=True)
    began = time.perf_counter()
    logger, folder = start(mode="online")
    assert time.perf_counter() - began < 10
    check_offline(logger, folder, written, said, "403")


@pytest.mark.faults("W&B hanging")
def test_a_server_that_hangs_makes_the_run_offline(service, start, said, written, monkeypatch):
    monkeypatch.setattr("vit_attn.tracking.wandb._START_SECONDS", 2)
    service(hang=True)
    began = time.perf_counter()
    logger, folder = start(mode="online")
    assert time.perf_counter() - began < 15
    check_offline(logger, folder, written, said, "cannot be started")


@pytest.mark.faults("W&B unreachable")
def test_a_server_that_is_not_there_makes_the_run_offline_at_once(service, start, said, written):
    service().kill()
    began = time.perf_counter()
    logger, folder = start(mode="online")
    assert time.perf_counter() - began < 5
    check_offline(logger, folder, written, said, "does not answer")


def test_online_without_a_login_asks_no_question(start, said, written, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    logger, folder = start(mode="online")
    check_offline(logger, folder, written, said, "nobody is logged in")


def test_a_failed_online_run_is_marked_as_failed(service, start):
    stub = service()
    logger, _ = start(mode="online")
    logger.log_metrics({"loss": 1.0}, 0)
    tracking.finish_loggers([logger], failed=True)
    (run,) = stub.runs.values()
    assert run["exitcode"] == 1


@pytest.mark.faults("W&B hanging")
def test_a_server_that_hangs_at_the_end_is_not_waited_for(service, start, said):
    stub = service()
    logger, folder = start(mode="online", finish_timeout=2)
    logger.log_metrics({"loss": 1.0}, 0)
    stub.hang = True
    began = time.perf_counter()
    tracking.finish_loggers([logger], failed=False)
    assert time.perf_counter() - began < 20
    assert f"to upload the rest: wandb sync --include-online {folder / 'logs' / 'wandb'}" in said.text


@pytest.mark.faults("W&B run of a run that goes on")
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_that_goes_on_is_one_run_there(service, start, mode, tmp_path):
    stub = service()
    for steps in (range(3), range(3, 5)):
        logger, folder = start(mode=mode)
        for step in steps:
            logger.log_metrics({"loss": float(step)}, step)
        tracking.finish_loggers([logger], failed=False)
    if mode == "offline":
        done = wandb_command("sync", folder / "logs" / "wandb", env=environment(stub), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (run,) = stub.runs.values()
    seen = [(row["trainer/global_step"], row["loss"]) for row in rows_of(run) if "loss" in row]
    assert seen == [(step, float(step)) for step in range(5)]


def test_in_a_sweep_the_run_and_its_choices_are_the_agents(fresh_wandb, start, monkeypatch, tmp_path, capfd):
    (tmp_path / "chosen.yaml").write_text("wandb_version: 1\nmodel.attention: {value: strided}\n")
    for name, value in {"SWEEP_ID": "s", "RUN_ID": "of-the-agent", "PROJECT": "q", "SILENT": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "chosen.yaml"))
    logger, _ = start(project="p")
    tracking.log_config([logger], {"model": {"attention": "strided", "depth": 2}}, {"parameters": 3})
    logger.finalize("success")
    run = logger.experiment
    assert (run.id, run.project, run.sweep_id) == ("of-the-agent", "q", "s")
    assert dict(run.config) == {"model.attention": "strided", "model.depth": 2, "parameters": 3}
    tracking.finish_loggers([logger], failed=False)
    said = capfd.readouterr().err
    assert "locked" not in said
    assert "Ignoring" not in said


@pytest.mark.slow
def test_a_real_agent_runs_a_whole_sweep(tmp_path, tiny):
    """The command, the metric and the project of conf/sweep/mechanisms.yaml, over a small grid."""
    sweep = yaml.safe_load((ROOT / "conf" / "sweep" / "mechanisms.yaml").read_text())
    given = dict(override.split("=", 1) for override in (*tiny, *SHORT)) | {"test": "false"}
    sweep["program"] = str(ROOT / "train.py")
    sweep["parameters"] = {
        "model.attention": {"values": ["softmax", "entmax15+strided"]},
        "seed": {"values": [1, 2]},
        "experiment_name": {"value": "swept"},
        "run_name": sweep["parameters"]["run_name"],
        "experiments_dir": {"value": str(tmp_path / "experiments")},
        **{name: {"value": yaml.safe_load(value)} for name, value in given.items()},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    with Stub() as stub:
        made = wandb_command("sweep", "sweep.yaml", env=environment(stub), cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        assert "wandb agent me/vit_attn/sweep0" in made.stderr
        agent = wandb_command("agent", "--count", 4, "me/vit_attn/sweep0", env=environment(stub), cwd=tmp_path)
        assert agent.returncode == 0, agent.stderr
    assert "Traceback" not in agent.stdout + agent.stderr
    # The agent's runs, no others, each with what the agent has chosen for it.
    assert sorted(stub.runs) == [f"sweeprun{number}" for number in range(4)]
    chosen = [(name, seed) for name in ("softmax", "entmax15+strided") for seed in (1, 2)]
    for number, (attention, seed) in enumerate(chosen):
        run = stub.runs[f"sweeprun{number}"]
        config = {name: entry["value"] for name, entry in json.loads(run["config"]).items()}
        assert (config["model.attention"], config["seed"], run["sweep"]) == (attention, seed, "sweep0")
        assert config["model.embed_dim"] == 32
        assert (run["displayName"], run["groupName"], run["exitcode"]) == (f"{attention}-seed{seed}", "swept", 0)
        assert 0 <= run["summary"]["val/acc"]["max"] <= 1
        assert any("val/acc" in row for row in rows_of(run))  # what a search looks at
        assert (tmp_path / "experiments" / "swept" / f"{attention}-seed{seed}" / "results" / "metrics.json").exists()
