"""Several processes: they compute what one does, write one run, and go on from what any number of them has saved."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vit_attn.attention.normalizers.entmax import annealing_cores
from vit_attn.config import differences, plain
from vit_attn.errors import LostRankError, UserError
from vit_attn.models import create_vit
from vit_attn.training.check import check_config
from vit_attn.training.launcher import OneRun, follow_launcher, names_to_pass_on
from vit_attn.training.sharding import parts_of, shard, whole_net

ROOT = Path(__file__).parent.parent.parent
TRAIN, EVALUATE = ([sys.executable, str(ROOT / f"{name}.py")] for name in ("train", "evaluate"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Everything random but dropout, what averages and accumulates, and 129 images to validate on: an odd number.
EVERYTHING = (
    *("data.augment.mixup=0.4", "data.augment.cutmix=0.5", "data.augment.policy=rand_augment"),
    *("data.augment.erasing=0.3", "data.augment.flip=true", "data.augment.group_size=7"),
    *("callbacks.ema.enabled=true", "callbacks.ema.decay=0.9", "trainer.accumulate_grad_batches=2"),
    *("trainer.gradient_clip_val=0.1", "model.attention=entmax", "model.attention_options.learnable_alpha=true"),
    *("trainer.max_epochs=2", "data.val_fraction=0.0897", "data.eval_batch_size=32", "run_name=mine"),
)


def start(command, folder, **environment):
    """Start a command in ``folder``, in a session of its own."""
    return subprocess.Popen(
        [*map(str, command)],
        **{"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)} | environment,
        start_new_session=True,
    )


def kill(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def finish(*processes, timeout=240):
    """Let commands come to their ends: [(status, out, err), …]."""
    try:
        streams = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            kill(process)
    return [(process.returncode, *found) for process, found in zip(processes, streams, strict=True)]


def run(command, folder, **environment):
    """Run a command; returns what it printed."""
    ((status, out, err),) = finish(start(command, folder, **environment))
    assert (status, err) == (0, "")
    return out


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def read_rows(root):
    """logs/metrics.csv: step → {name: text}, without the speed."""
    with (root / "logs" / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    return {
        step: {name: value for name, value in row.items() if value and not name.startswith("speed/")}
        for step, row in rows.items()
    }


def checkpoint(root, name="last"):
    return torch.load(root / "checkpoints" / f"{name}.ckpt", weights_only=True)


def tensors(found):
    """What a checkpoint holds of model, average and optimizer: place → tensor."""
    parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    return dict(leaves({part: found[part] for part in parts}))


def leaves(node, place=""):
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in leaves(value, f"{place}/{key}")]
    if isinstance(node, (list, tuple)):
        return [found for number, value in enumerate(node) for found in leaves(value, f"{place}/{number}")]
    return [(place, node)] if isinstance(node, torch.Tensor) else []


def assert_same_training(ours, theirs, tolerance=5e-6):
    """Every row of the log has the same names, and the same numbers to fp32's rounding."""
    found, expected = read_rows(ours), read_rows(theirs)
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        assert found[step].keys() == row.keys(), step
        for name, value in row.items():
            assert float(found[step][name]) == pytest.approx(float(value), abs=tolerance), (step, name)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, tiny):
    """``make_run(kind)`` → (folder that the commands ran in, what they printed); each kind is run once."""
    done = {}
    settings = [setting for setting in tiny if setting not in ("trainer=cpu", "logger=none")]

    def commands(kind):
        train = [TRAIN[1], *settings, *EVERYTHING, "logger=wandb"]
        if kind in ("cpu", "ddp_cpu", "fsdp_cpu"):
            return [[*TRAIN[:1], *train, f"trainer={kind}", f"data.batch_size={60 if kind == 'cpu' else 30}"]]
        train += ["trainer=cpu", "data.batch_size=30"]
        if kind == "torchrun":
            return [[*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", *train]]
        port = free_port()
        if kind == "two static nodes":
            nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
            return [[*TORCHRUN, *nodes, f"--node-rank={rank}", *train] for rank in (0, 1)]
        assert kind == "two c10d nodes, fsdp2"
        nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        return [[*TORCHRUN, *nodes, "--rdzv-id=one", *train, "trainer.strategy=fsdp2"]] * 2

    def once(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("run")
            ended = finish(*(start(command, folder) for command in commands(kind)))
            assert [status for status, _, _ in ended] == [0] * len(ended), ended
            done[kind] = folder, "".join(out for _, out, _ in ended)
        return done[kind]

    return once


def root_of(folder):
    return folder / "experiments" / "default" / "mine"


SEVERAL = ["ddp_cpu", "fsdp_cpu", "torchrun", "two static nodes", "two c10d nodes, fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEVERAL)
def test_two_processes_train_as_one_with_the_same_global_batch(make_run, kind):
    ours, theirs = (root_of(make_run(each)[0]) for each in (kind, "cpu"))
    assert_same_training(ours, theirs)
    results, expected = (json.loads((root / "results" / "metrics.json").read_text()) for root in (ours, theirs))
    assert results["test"]["confusion"] == expected["test"]["confusion"]
    assert results["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=5e-6)
    assert results["val"] == pytest.approx(expected["val"], abs=5e-6)
    assert results["speed"]["devices"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEVERAL)
def test_two_processes_are_one_run_one_log_and_one_tracked_run(make_run, kind):
    folder, printed = make_run(kind)
    root = root_of(folder)
    assert [path.name for path in folder.iterdir()] == ["experiments"]
    assert [path.name for path in (folder / "experiments").rglob("*.csv")] == ["metrics.csv"]
    assert len(list(folder.rglob("run-*.wandb"))) == 1
    for line in ("run        ", "epoch   1/2", "epoch   2/2", "results    "):
        assert printed.count(line) == 1, line
        if line != "run        ":
            assert (root / "logs" / "train.log").read_text().count(line) == 1, line


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp_cpu"])
def test_a_checkpoint_of_two_processes_is_that_of_one(make_run, kind):
    ours, theirs = (checkpoint(root_of(make_run(each)[0])) for each in (kind, "cpu"))
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    assert {"alpha_logit"} <= {name.rpartition(".")[2] for name in found}
    for place, tensor in expected.items():
        assert found[place].shape == tensor.shape, place
        assert type(found[place]) is torch.Tensor, place
    for part in ("state_dict", "current_model_state"):
        for name, tensor in theirs[part].items():
            # Adam divides by the size of gradients that are nothing but rounding, as those of the keys' biases.
            torch.testing.assert_close(ours[part][name], tensor, atol=1e-4, rtol=1e-4, msg=f"{part}: {name}")


@pytest.mark.slow
def test_evaluate_reads_a_sharded_runs_checkpoint(make_run, tmp_path):
    root = root_of(make_run("fsdp_cpu")[0])
    trained = json.loads((root / "results" / "metrics.json").read_text())
    run([*EVALUATE, f"ckpt={root}", f"output={tmp_path}", "accelerator=cpu", "explain=false"], tmp_path)
    evaluated = json.loads((tmp_path / "metrics.json").read_text())
    assert evaluated["test"]["confusion"] == trained["test"]["confusion"]


def kill_amid_an_epoch(command, folder, root):
    """Start a command and kill all of its processes once it has saved twice; returns the step it has saved."""
    process = start(command, folder)
    last, deadline, seen = root / "checkpoints" / "last.ckpt", time.monotonic() + 120, set()
    while time.monotonic() < deadline and process.poll() is None and len(seen) < 2:
        with suppress(FileNotFoundError):
            seen.add(last.stat().st_mtime_ns)
        time.sleep(0.005)
    time.sleep(0.05)
    kill(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (root / "results" / "metrics.json").exists()
    return checkpoint(root)["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp_cpu"])
def test_two_processes_killed_amid_an_epoch_end_as_if_they_had_not_been(make_run, tmp_path, tiny, kind):
    """And the same global batch goes on in one process, to the same losses."""
    whole = root_of(make_run(kind)[0])
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    command = [*TRAIN, *settings, *EVERYTHING, "callbacks.checkpoint_every_n_steps=4"]
    two, root = [*command, f"trainer={kind}", "data.batch_size=30"], root_of(tmp_path / "two")
    for folder in ("two", "one"):
        (tmp_path / folder).mkdir()
    step = kill_amid_an_epoch(two, tmp_path / "two", root)
    assert 4 <= step < 22
    run(["cp", "-r", tmp_path / "two" / "experiments", tmp_path / "one"], tmp_path)

    assert f"at step {step}" in run(two, tmp_path / "two")
    found, expected = (tensors(checkpoint(each)) for each in (root, whole))
    assert found.keys() == expected.keys()
    assert [place for place, tensor in expected.items() if not torch.equal(found[place], tensor)] == []
    assert read_rows(root) == read_rows(whole)

    printed = run([*command, "trainer=cpu", "data.batch_size=60"], tmp_path / "one")
    assert f"at step {step}" in printed
    assert_same_training(root_of(tmp_path / "one"), whole)


@pytest.mark.slow
def test_every_job_of_a_multirun_under_torchrun_is_one_run(tmp_path, tiny):
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    limits = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false")
    command = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", TRAIN[1], *settings, *limits]
    printed = run([*command, "trainer=fsdp_cpu", "-m", "seed=1,2,3"], tmp_path)
    assert printed.count("results    ") == 3
    assert printed.count("report     ") == 1
    folders = sorted((tmp_path / "experiments" / "default").glob("softmax*"))
    assert [folder.name.rpartition("_")[0] for folder in folders] == [f"softmax_seed{seed}" for seed in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.devices=3", "trainer.devices=3, but torchrun has started 2 processes per node: leave it out"),
        ("run_name=process_${oc.env:RANK}", "the processes of this run would write into"),
        ("run_name=${now:%S}", "every process of a launcher reads the clock for itself"),
    ],
)
def test_processes_that_are_not_one_run_are_refused_on_one_line(tmp_path, tiny, override, said):
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    command = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", TRAIN[1], *settings, "trainer=cpu"]
    ((status, _, err),) = finish(start([*command, override], tmp_path))
    assert status != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "exitcode  : 2 " in err
    assert "vit_attn/" not in err, "a traceback of the project"


@pytest.mark.slow
def test_lightnings_processes_take_the_name_that_the_first_one_read_off_the_clock(tmp_path, tiny):
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    limits = ("trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "test=false", "trainer=ddp_cpu")
    run([*TRAIN, *settings, *limits, "run_name='it\\'s_${now:%H_%M_%S_%f}'"], tmp_path)
    (folder,) = (tmp_path / "experiments" / "default").iterdir()
    assert folder.name.startswith("it's_")


# In this process alone


@pytest.fixture
def alone():
    """A group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_net_computes_and_comes_together_as_it_was(alone):
    net = create_vit(
        "vit_tiny_patch16_224",
        attention="entmax",
        attention_options={"anneal_alpha_from": 1.1},
        **{"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3},
        pos_embed="sinusoidal",
    ).eval()
    assert whole_net(net) is net
    images, state = torch.rand(4, 3, 8, 8), {name: value.clone() for name, value in net.state_dict().items()}
    logits = net(images)
    shard(net, alone)
    core = annealing_cores(net)[1]
    core.anneal(0.5)
    state["blocks.1.attn.core.normalizer.annealed_alpha"] = core.number().clone()
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    together = whole_net(net)
    assert not any(isinstance(parameter, DTensor) for parameter in together.parameters())
    assert not together.training
    found = together.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not together.pos_embed.requires_grad
    torch.testing.assert_close(together(images), net(images))
    assert not torch.allclose(net(images), logits), "another α"

    changed = {name: value + 1 for name, value in state.items()}
    older = {name.replace("core.normalizer.", ""): value for name, value in changed.items()}  # α was the layer's own
    net.load_state_dict(parts_of(older, net))
    found = whole_net(net).state_dict()
    assert all(torch.equal(found[name], value) for name, value in changed.items())


def test_best_weights_are_validated_and_not_the_last_average(train, no_pictures):
    """A great learning rate, so that the last epoch is not the best one."""
    settings = ("callbacks.ema.enabled=true", "callbacks.ema.decay=0.5", "trainer.max_epochs=4", "optimizer.lr=0.03")
    done = train(*settings, "trainer.limit_train_batches=6", "test=false")
    rows = [row for row in read_rows(done.root).values() if "val/acc" in row]
    accuracies = [float(row["val/acc"]) for row in rows]
    best = accuracies.index(max(accuracies))
    losses = [float(row["val/loss"]) for row in rows]
    assert len(set(losses)) == 4
    assert done.results["best_epoch"] == best + 1
    assert best != 3, "the last average is the best one: this shows nothing"
    assert done.results["val"]["loss"] == pytest.approx(losses[best], abs=1e-6)


@pytest.fixture
def torchrun_started(monkeypatch):
    """``torchrun_started(here, everywhere)``: as if it had."""

    def pretend(here, everywhere):
        for name, value in {"LOCAL_WORLD_SIZE": here, "WORLD_SIZE": everywhere, "TORCHELASTIC_RUN_ID": "x"}.items():
            monkeypatch.setenv(name, str(value))

    return pretend


def test_devices_and_nodes_are_the_launchers(compose, torchrun_started):
    torchrun_started(here=4, everywhere=12)
    for trainer in ("cpu", "ddp_cpu", "fsdp", "auto"):
        config = compose(f"trainer={trainer}")
        follow_launcher(config)
        assert (config.trainer.devices, config.trainer.num_nodes) == (4, 3)


def test_without_a_launcher_the_configuration_stays(compose):
    config = compose("trainer=ddp_cpu", "run_name=${now:%H}")
    before = OmegaConf.to_container(config)
    follow_launcher(config)
    assert OmegaConf.to_container(config) == before


def test_unequal_nodes_are_refused(compose, torchrun_started):
    torchrun_started(here=2, everywhere=5)
    with pytest.raises(UserError, match=r"started 2 processes on this node and 5 in all"):
        follow_launcher(compose())


def test_a_folder_named_by_the_clock_is_refused_where_processes_cannot_agree(compose, torchrun_started, monkeypatch):
    config = compose("experiment_name=${now:%Y}")
    assert names_to_pass_on(config) == [f"experiment_name='{time.strftime('%Y')}'"]
    torchrun_started(here=2, everywhere=2)
    with pytest.raises(UserError, match=r"^experiment_name=\$\{now:%Y\}: every process"):
        follow_launcher(config)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "deepspeed"])
def test_strategies_that_would_not_resume_are_refused(compose, strategy):
    with pytest.raises(UserError, match=r"trainer\.strategy.*(ddp|fsdp2)"):
        check_config(compose("trainer=ddp_cpu", f"trainer.strategy={strategy}"))


@pytest.mark.parametrize(
    ("theirs", "kind", "said"),
    [
        (("/b", 7), UserError, r"would write into /a and, process 1, /b"),
        (("/a", 6), LostRankError, r"process 1 would go on from step 6, process 0 from step 7"),
        (("/a", None), LostRankError, r"process 1 would go on from step 0"),
    ],
)
def test_ranks_agree_on_folder_and_checkpoint(monkeypatch, theirs, kind, said):
    class Trainer:
        world_size = 2

    def gather(found, mine):
        found[:] = [mine, theirs]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(kind, match=said):
        OneRun(Path("/a"), 7).setup(Trainer(), None, "fit")
    theirs = ("/a", 7)
    OneRun(Path("/a"), 7).setup(Trainer(), None, "fit")


def test_another_number_of_processes_may_share_the_same_global_batch(compose):
    two = plain(compose("trainer=fsdp_cpu", "data.batch_size=30"))
    assert differences(two, plain(compose("trainer=cpu", "data.batch_size=60"))) == []
    assert differences(two, plain(compose("trainer=cpu", "data.batch_size=30"))) == []  # a smaller global batch
    assert differences(two, plain(compose("trainer=cpu", "data.batch_size=50"))) == ["data.batch_size: 30 → 50"]
    assert differences(two, plain(compose("trainer=ddp", "data.batch_size=60", "trainer.accelerator=cpu"))) != []
