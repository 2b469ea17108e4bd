"""Wrong command lines: exit status 2, one line that names what was wrong, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_attn.attention import MECHANISMS, PATTERNS
from vit_attn.training.module import Classifier

ROOT = Path(__file__).parent.parent


def assert_refused(done, *said):
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err + done.out
    for text in said:
        assert text in done.err
    assert len(done.err) < 800


ATTENTION = [
    (["model.attention=stridded"], "'stridded'", "'strided'"),
    (["model.attention=entmax+stridded"], "'stridded'", "'strided'"),
    (["model.attention=strided+entmax"], "strided+entmax", "entmax+strided"),
    (["model.attention=a+b+c"], "a+b+c"),
    (["model.attention=[]"], "[]"),
    (
        [
            *("model.attention=entmax", "model.attention_options.anneal_alpha_from=1.01"),
            "callbacks.alpha_annealing.enabled=false",
        ],
        "callbacks.alpha_annealing.enabled=true",
    ),
    (["model.attention=null"], "None"),
    (["model.attention=7"], "7"),
    (["model.attention=[strided,fulll]"], "fulll", "'full'"),
    (["model.attention=[softmax,strided,full]"], "3 specs for 2 layers"),
    (["model.attention=entmax", "model.attention_options.alpha=0.5"], "0.5", "alpha"),
    (["model.attention=entmax", "model.attention_options.alpha=1"], "alpha", "1"),
    (["model.attention=entmax", "model.attention_options.alpha=big"], "alpha", "big"),
    (["model.attention=strided", "model.attention_options.window=0"], "window", "0"),
    (["model.attention=strided:window:0"], "'strided:window:0'", "at least 1"),
    (["model.attention=strided:window"], "strided:option:value"),
    (["model.attention=strided:windw:4"], "'windw'", "'window'"),
    (["model.attention=softmax:window:4"], "softmax has no options"),
    (["model.attention=[strided,entmax:window:4+full]"], "option of entmax", "'window'", "alpha"),
    *(([f"model.attention={name}:alhpa:4"], f"'{name}:alhpa:4'", name) for name in (*MECHANISMS, *PATTERNS)),
    *(([f"model.attention=entmax+{name}"], name, "takes no normalizer") for name in MECHANISMS),
    (["model.attention=strided", "model.attention_options.stride=1.5"], "stride", "1.5"),
    (["model.attention_options.causal=yess"], "causal", "yess"),
    (["model.attention_options.windw=3"], "windw", "window"),
    (["+model.attention_options.windw=3"], "windw", "window"),
    (["model.attention_options.implementation=fast"], "fast", "dense"),
    (["model.attention=entmax", "model.attention_options.implementation=fused"], "fused", "entmax"),
]
GROUPS = [
    *((["model=vit_tinny"], "vit_tinny", "vit_tiny"), (["data=cifar"], "'cifar'", "'cifar10'")),
    *(
        (["trainer=gppu"], "gppu", "gpu"),
        (["optimizer=adam"], "'adam'", "'adamw'"),
        (["loss=ce"], "'ce'", "cross_entropy"),
    ),
    *((["logger=wandbb"], "wandbb", "wandb"), (["callbacks=defaults"], "defaults", "default")),
    *((["experiment=dmo"], "dmo", "demo"), (["expriment=demo"], "expriment", "experiment")),
]
KEYS = [
    (["trainer.max_epoch=3"], "trainer.max_epoch", "trainer.max_epochs"),
    (["modle.depth=3"], "modle", "model"),
    (["sed=3"], "sed", "seed"),
    (["+model.dpth=3"], "dpth"),
    (["+trainer.max_epoch=3"], "max_epoch"),
    (["+data.batchsize=3"], "batchsize"),
    (["+optimizer.beta=3"], "beta"),
    (["+loss.smoothing=0.1"], "smoothing"),
    (["+logger.projct=x", "logger=tensorboard"], "projct"),
    (["data.augment.mixupp=1"], "mixupp", "mixup"),
    (["+data.augment.mixupp=1"], "mixupp", "mixup"),
    (["+lr_schedule.warm=0.1"], "warm"),
    (["seed"], "seed"),
    (["model.attention=[strided"], "strided"),
]
VALUES = [
    *((["trainer.precision=17"], "17"), (["trainer.max_epochs=abc"], "trainer.max_epochs", "abc")),
    *((["trainer.max_epochs=-3"], "max_epochs", "-3"), (["trainer.max_epochs=null"], "trainer.max_epochs")),
    *((["trainer.accelerator=abacus"], "abacus"), (["trainer.accumulate_grad_batches=0"], "accumulate_grad_batches")),
    *((["optimizer.lr=-1"], "-1"), (["optimizer.lr=fast"], "optimizer.lr", "fast")),
    *((["optimizer._target_=torch.optim.Adamm"], "Adamm"), (["loss._target_=no.such.Loss"], "no.such")),
    *(
        (["lr_schedule.warmup=3"], "lr_schedule.warmup", "3"),
        (["lr_schedule.final_lr=low"], "lr_schedule.final_lr", "low"),
    ),
    *((["seed=-1"], "seed", "-1"), (["seed=one"], "seed", "one"), (["seed=1.5"], "seed", "1.5")),
    *((["data.batch_size=0"], "data.batch_size", "0"), (["data.batch_size=big"], "data.batch_size", "big")),
    *((["data.val_fraction=1.5"], "data.val_fraction", "1.5"), (["data.val_fraction=0"], "data.val_fraction=0")),
    *((["data.augment.policy=rand"], "rand", "rand_augment"), (["data.augment.mixup=-1"], "mixup", "-1")),
    *((["data.mean=[0.5]"], "data.mean", "0.5"), (["data.image_size=0"], "data.image_size", "0")),
    *(
        (["loss.label_smoothing=1"], "loss.label_smoothing", "1"),
        (["logger=wandb", "logger.mode=ofline"], "ofline", "offline"),
    ),
    *((["callbacks.attention_probe.num_images=0"], "num_images", "0"),),
    *((["callbacks.attention_probe.layers=[9]"], "callbacks.attention_probe.layers", "9"),),
    *((["callbacks.ema.enabled=true", "callbacks.ema.decay=high"], "callbacks.ema.decay", "high"),),
    *((["callbacks.ema.enabled=true", "callbacks.ema.decay=1.5"], "decay", "1.5"),),
    *((["callbacks.early_stopping.enabled=true", "callbacks.early_stopping.mode=up"], "up"),),
    *((["callbacks.early_stopping.enabled=true", "callbacks.early_stopping.monitor=val/accuracy"], "val/accuracy"),),
    *((["callbacks.checkpoint_every_n_steps=-1"], "checkpoint_every_n_steps", "-1"),),
    *((["run_name=a/b"], "run_name", "a/b"), (["experiment_name=.."], "experiment_name", "..")),
    *((["run_name="], "run_name"), (["run_name=report"], "report")),
    *((["explain_images=-1"], "explain_images"), (["explain_images=some"], "explain_images", "some")),
    *((["trainer.log_every_n_steps=often"], "trainer.log_every_n_steps", "often"),),
    *((["trainer.gradient_clip_val=-1"], "gradient_clip_val", "-1"), (["trainer.strategy=3"], "trainer.strategy", "3")),
]
MODELS = [
    (["model.name=vit_tinny_patch16_224"], "vit_tinny_patch16_224", "vit_tiny_patch16_224"),
    (["model.name=swin_tiny_patch4_window7_224"], "swin_tiny_patch4_window7_224"),
    (["model.name=resnet18"], "resnet18"),
    (["model.num_heads=3"], "num_heads"),
    (["model.num_heads=many"], "many"),
    (["model.depth=0"], "depth"),
    (["model.patch_size=0"], "patch_size"),
    (["model.patch_size=64"], "patch"),
    (["model.pos_embed=cosine"], "cosine", "sinusoidal"),
    (["model.global_pool=mean"], "mean"),
    (["model.weights=/no/such.safetensors"], "/no/such.safetensors"),
    (["model.weights=/no/such", "model.pretrained=true"], "exclude"),
]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(overrides, said) for overrides, *said in (*ATTENTION, *GROUPS, *KEYS, *VALUES, *MODELS)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_setting_of_train_is_one_line_and_leaves_nothing(command, tiny, tmp_path, overrides, said):
    chosen = {override.split("=")[0] for override in overrides}
    settings = [setting for setting in tiny if setting.split("=")[0] not in chosen]
    # A test that is not refused shall end soon.
    limits = ["trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "test=false"]
    done = command("train", *settings, *limits, f"experiments_dir={tmp_path / 'runs'}", *overrides)
    assert_refused(done, *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("overrides", [["trainer=gpu"], ["trainer=ddp"], ["trainer.accelerator=gpu"]], ids=" ".join)
def test_a_gpu_that_is_not_there_is_named(command, tiny, tmp_path, overrides):
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    done = command("train", *settings, *overrides, f"experiments_dir={tmp_path / 'runs'}")
    assert_refused(done, "no GPU is available", "trainer=cpu")
    assert not (tmp_path / "runs").exists()


# Data


@pytest.fixture
def images(tmp_path):
    """Two classes of four images for training and one for test."""
    from PIL import Image

    for split, count in (("train", 4), ("test", 1)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (16, 16), (80 * number, 20 * index, 0)).save(folder / f"{index}.png")
    return tmp_path / "images"


FOLDER = (
    *("data=imagefolder", "trainer=cpu", "logger=none", "model.depth=1", "model.embed_dim=16", "model.num_heads=2"),
    *("trainer.max_epochs=1", "data.batch_size=2", "data.val_fraction=0.25"),
)


def without_root(root):
    return "null"


def missing_root(root):
    return root / "elsewhere"


def broken_image(root):
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    return root


def broken_test_image(root):
    (root / "test" / "dog" / "0.png").write_text("not an image")
    return root


def another_class_in_test(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        *((without_root, "data.root"), (missing_root, "elsewhere")),
        *((broken_image, "train/cat/1.png"), (broken_test_image, "test/dog/0.png"), (another_class_in_test, "wolf")),
    ],
)
def test_data_that_cannot_be_used_are_named(command, tmp_path, images, spoil, said):
    done = command("train", *FOLDER, f"data.root={spoil(images)}", f"experiments_dir={tmp_path / 'runs'}")
    assert_refused(done, said)
    assert not (tmp_path / "runs").exists()


def test_the_same_data_unspoilt_are_trained_on(command, tmp_path, images, no_pictures):
    done = command("train", *FOLDER, f"data.root={images}", f"experiments_dir={tmp_path / 'runs'}")
    assert (done.status, done.err) == (0, "")
    assert len(list((tmp_path / "runs").rglob("last.ckpt"))) == 1


def test_an_experiments_dir_that_is_a_file_is_named_and_left_alone(command, tiny, tmp_path):
    (tmp_path / "file").write_text("precious")
    done = command("train", *tiny, f"experiments_dir={tmp_path / 'file'}")
    assert_refused(done, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


# Files


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_weights(kind, folder):
    path = folder / f"{kind}.pth"
    if kind == "malicious":
        torch.save({"state_dict": Payload(folder / "ran")}, path)
    elif kind == "truncated":
        torch.save({"weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "empty":
        path.touch()
    return path


@pytest.mark.parametrize("kind", ["missing", "malicious", "truncated", "empty", "other"])
def test_weights_that_cannot_be_used_are_named_and_never_run(command, tiny, tmp_path, kind):
    path = write_weights(kind, tmp_path)
    done = command("train", *tiny, f"model.weights={path}", f"experiments_dir={tmp_path / 'runs'}")
    assert_refused(done, f"model.weights={path}")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["missing", "malicious", "truncated", "empty", "other"])
def test_checkpoints_that_cannot_be_evaluated_are_named_and_never_run(command, tmp_path, kind):
    path = write_weights(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    done = command("evaluate", f"ckpt={path}")
    assert_refused(done, str(path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def run(train_in, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("mistakes"), "run_name=mine", "trainer.limit_train_batches=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["ckpt="]),
        (["data.batch_size=3"], ["ckpt="]),
        (["ckpt=RUN", "data.batchsize=3"], ["data.batchsize", "data.batch_size"]),
        (["ckpt=RUN", "data.batch_size=0"], ["data.batch_size", "0"]),
        (["ckpt=RUN", "data.batch_size=[1"], ["data.batch_size"]),
        (["ckpt=RUN", "data=digit"], ["digit", "digits"]),
        (["ckpt=RUN", "accelerater=cpu"], ["accelerater", "accelerator"]),
        (["ckpt=RUN", "accelerator=tpu"], ["tpu", "cpu"]),
        (["ckpt=RUN", "layers=[5]"], ["5", "0 to 1"]),
        (["ckpt=RUN", "layers=first"], ["first"]),
        (["ckpt=RUN", "attention_images=0"], ["attention_images", "0"]),
        (["ckpt=RUN", "picture_images=-1"], ["picture_images", "-1"]),
        (["ckpt=RUN", "attention_images=few"], ["attention_images", "few"]),
        (["ckpt=RUN", "output=/proc/none"], ["/proc/none"]),
        (["chkpt=RUN"], ["chkpt", "ckpt"]),
        (["RUN"], ["RUN"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_a_wrong_setting_of_evaluate_is_one_line_and_changes_nothing(command, run, arguments, said):
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    done = command("evaluate", *(argument.replace("RUN", str(run.root)) for argument in arguments))
    assert_refused(done, *(text.replace("RUN", str(run.root)) for text in said))
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_evaluating_on_a_gpu_that_is_not_there_is_refused(command, run):
    assert_refused(command("evaluate", f"ckpt={run.root}", "accelerator=gpu"), "no GPU is available", "accelerator=cpu")


def test_another_configuration_under_the_same_name_is_refused(command, tiny, run):
    settings = ("run_name=mine", "trainer.limit_train_batches=1", f"experiments_dir={run.root.parent.parent}")
    done = command("train", *tiny, *settings, "model.attention=fixed")
    assert_refused(done, "model.attention: softmax → fixed", "overwrite=true")


# Many jobs


def test_one_wrong_job_of_a_multirun_leaves_the_others_alone(command, tiny, tmp_path, no_pictures):
    settings = ("trainer.limit_train_batches=1", "trainer.limit_val_batches=1", f"experiments_dir={tmp_path / 'runs'}")
    done = command("train", *tiny, *settings, "-m", "model.attention=stridded,strided,fixed", "seed=1,2")
    assert_refused(done, "'stridded'")
    names = sorted(path.parent.parent.name.split("_")[:2] for path in (tmp_path / "runs").rglob("metrics.json"))
    assert names == [[name, seed] for name in ("fixed", "strided") for seed in ("seed1", "seed2")]


def test_one_crashed_job_of_a_multirun_leaves_the_others_alone(command, tiny, tmp_path, no_pictures, monkeypatch):
    step = Classifier.training_step

    def crash(self, *args):
        if self.seed == 1:
            raise RuntimeError("the GPU fell off")
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", crash)
    settings = ("trainer.limit_train_batches=1", "trainer.limit_val_batches=1", f"experiments_dir={tmp_path / 'runs'}")
    with pytest.raises(SystemExit, match=r"1 of the runs crashed"):
        command("train", *tiny, *settings, "-m", "seed=1,2")
    states = {path.parent.parent.name.split("_")[1]: path for path in (tmp_path / "runs").rglob("status.json")}
    states = {seed: json.loads(path.read_text()) for seed, path in states.items()}
    assert (states["seed1"]["state"], states["seed1"]["error"]) == ("failed", "RuntimeError: the GPU fell off")
    assert states["seed2"]["state"] == "finished"


# As a user's shell sees it


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("train", ["model.attention=stridded"], "Did you mean 'strided'?"),
        ("evaluate", ["ckpt=nowhere"], "nowhere"),
    ],
)
def test_a_real_process_says_one_line(tmp_path, program, arguments, said):
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{program}.py"), *arguments],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
