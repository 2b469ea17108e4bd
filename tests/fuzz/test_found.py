"""What the generated inputs have found, each once more by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from playing import ROOT, SMALL, assert_one_line, assert_run_or_one_line, files_below, play
from test_any_images import FOLDER, STRANGE, encoded, image_folder
from test_config_files import ALIASES

from vit_attn.training.folder import read_json, update_json

# In front of each group: what these ended in.
COMMAND_LINES = [
    # a traceback of Hydra's, of YAML's or of argparse's, or several lines
    *(["--no-such-flag"], ["--cfg"], ["--cfg=nope"], ["--config-dir=nope"], ["~experiments_dir"], ["~run_name"]),
    # a traceback, amid a run folder that had just been made
    *(["~loss._target_"], ["loss._target_=torch.nn.CrossEntropyLoss"], ["loss._target_=torch.nn.Identity"]),
    *(["optimizer._target_=torch.nn.Linear"], ["~optimizer._target_"], ["optimizer.betas=[]"], ["lr_schedule=3"]),
    *(["callbacks.ema=3"], ["callbacks.early_stopping=null"], ["~callbacks.ema"], ["+callbacks.mine.enabled=true"]),
    *(["+trainer.detect_anomaly=x"], ["+trainer.profiler=7"], ["~trainer.on_nan"], ["test=abc"], ["overwrite=1"]),
    *(
        ["+model.img_size=7"],
        ["+model.num_classes=7"],
        ["+model.checkpoint_path=x"],
        ["model.name=null"],
        ["~model.name"],
    ),
    *(["model.attention_options=3"], ["seed=99999999999"], ["optimizer.lr=inf"], ["run_name=???"], ["run_name=null"]),
    # for ever, or until the memory ends
    *(
        ["model.depth=1000000000"],
        ["model.embed_dim=10000000000"],
        ["data.image_size=1000000"],
        ["data.num_workers=9999"],
    ),
    # OSError, RuntimeError, UnicodeEncodeError: names and paths
    *([f"run_name={'a' * 256}"], [f"run_name={'é' * 150}"], ["experiments_dir=~nobody-of-this-name/x"]),
    *(
        [f"experiments_dir={'a' * 5000}"],
        ["run_name='\udcff'"],
        ["+note='\udcff'"],
        ["run_name='a\nb'"],
        ["run_name='-a'"],
    ),
    # more than a screenful, or what a terminal obeys
    *([f"model.attention={'x' * 100000}"], ["model.attention='\x1b[31mred'"], [f"{'x' * 5000}=1"]),
]


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=lambda arguments: ascii(" ".join(arguments))[:60])
def test_a_command_line(place, arguments):
    folder = place()
    keys = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
    done = play("train", *[setting for setting in SMALL if setting.partition("=")[0] not in keys], *arguments)
    assert_one_line(done)
    assert files_below(folder) == {str(folder): b""}


@pytest.mark.parametrize(
    "content",
    [
        *(b"a: [1", b"a:\n\tb", b"\xff\xfe", b"3", b"a: *nope", b"a: !!nope x", b"a: " + b"[" * 3000 + b"]" * 3000),
        *(ALIASES, b"a: &a [*a]"),  # for ever
    ],
    ids=lambda content: repr(content)[:30],
)
def test_a_config_file(place, content):
    """Each was a traceback of YAML's or of OmegaConf's, or had no end."""
    folder = place()
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "mine.yaml").write_bytes(content)
    before = files_below(folder)
    done = play("train", f"--config-dir={folder / 'mine'}", *SMALL, "experiment=mine")
    assert_one_line(done)
    assert files_below(folder) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_in):
    return train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine")


@pytest.mark.parametrize("program", ["evaluate", "explain"])
@pytest.mark.parametrize(
    "argument",
    ["data=7", "data.root=1,2", "~data.root", "~layers", "layers=abc", "output=~nobody-of-this-name/x", "--x"],
)
def test_a_command_line_of_the_others(place, run, program, argument):
    folder = place()
    done = play(program, f"ckpt={run.best}", "accelerator=cpu", argument)
    assert_one_line(done)
    assert files_below(folder) == {str(folder): b""}


@pytest.mark.parametrize("key", ["vit_attn", "epoch", "state_dict"])
@pytest.mark.parametrize("value", [None, "x", {}, []])
def test_a_checkpoint_without_a_part(place, run, key, value):
    """KeyError, TypeError."""
    folder = place()
    checkpoint = torch.load(run.best, weights_only=True)
    torch.save({**checkpoint, key: value}, folder / "x.ckpt")
    before = files_below(folder)
    assert_one_line(play("evaluate", "ckpt=x.ckpt", "accelerator=cpu"))
    assert files_below(folder) == before


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(((key,), ["x"]) for key in ("loops", "optimizer_states", "lr_schedulers", "pytorch-lightning_version")),
        (("global_step",), ["x"]),
        (("global_step",), {"": {}}),
        # only amid the first step, as the schedule takes it
        (("lr_schedulers", 0, "base_lrs"), 5),
        (("lr_schedulers", 0, "last_epoch"), "x"),
        # only once the epoch ends
        (("callbacks", "BestCheckpoint", "kth_value"), [1]),
        (("callbacks", "BestCheckpoint", "kth_best_model_path"), "nowhere/x.ckpt"),
        (("loops", "fit_loop", "epoch_progress", "total", "completed"), "x"),
        (("loops", "fit_loop", "epoch_progress", "total", "completed"), {}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_last_checkpoint_that_says_something_else(place, where, value):
    """Lightning's own tracebacks and torch's, as it was restored or later."""
    place()
    assert play("train", *SMALL, "run_name=mine").status == 0
    last = next(iter((Path.cwd() / "experiments").rglob("last.ckpt")))
    checkpoint = node = torch.load(last, weights_only=True)
    for key in where[:-1]:
        node = node[next(full for full in node if full.startswith(key)) if isinstance(key, str) else key]
    node[where[-1]] = value
    torch.save(checkpoint, last)
    longer = [setting for setting in SMALL if "max_" not in setting]
    done = play("train", *longer, "trainer.max_epochs=2", "trainer.max_steps=-1", "run_name=mine")
    assert_one_line(done)
    assert "last.ckpt" in done.err


@pytest.mark.parametrize("name", ["no width", "gif of nothing", "bomb"])
def test_a_first_image_of_no_size(place, name):
    """ZeroDivisionError: the size of the images is that of the first one."""
    folder = place()
    image_folder(folder / "photos", STRANGE[name], name="0.jpg")
    before = files_below(folder)
    settings = [setting for setting in FOLDER if "image_size" not in setting]
    assert_run_or_one_line(play("train", *settings, "data.root=photos", "run_name=mine"), folder, before)


@pytest.mark.parametrize("names", [("[/bold]", "[red]x"), ("\x1b[31mred", "b"), ("a b", "=c")])
def test_classes_with_markup_in_their_names(place, names):
    """MarkupError, of the table of scores; and colours in the log."""
    folder = place()
    image_folder(folder / "photos", encoded("PNG", "RGB", (16, 16), 9), classes=names, name="x.png")
    done = play("train", *FOLDER, "data.root=photos", "run_name=mine")
    assert "\x1b" not in done.out + done.err
    if names[0].isprintable():
        assert done.status == 0, done
        done = play("evaluate", "ckpt=experiments/default/mine", "accelerator=cpu", "attention_images=1")
        assert done.status == 0, done
    else:
        assert_one_line(done)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train.py", [b"run_name=\xff"]),
        pytest.param("train.py", [b"--no-such-flag"], marks=pytest.mark.slow),
        pytest.param("evaluate.py", [b"ckpt=\xff"], marks=pytest.mark.slow),
        pytest.param("train.py", [b"+token=mine-77"], marks=pytest.mark.slow),
    ],
)
def test_a_real_process(tmp_path, program, arguments):
    """What the terminal gives is bytes, and not all of them are text."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "data=digits", "trainer=cpu", "logger=none", *arguments]
        if program == "train.py"
        else [sys.executable, str(ROOT / program), *arguments],
        **{"cwd": tmp_path, "capture_output": True, "timeout": 240},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_aliases_that_stand_for_little_are_kept(place):
    """A million entries is what is refused, not a file that says a thing once."""
    folder = place()
    (folder / "mine" / "experiment").mkdir(parents=True)
    content = b"# @package _global_\nmodel: {depth: &depth 1}\ncallbacks: {attention_probe: {num_images: *depth}}\n"
    (folder / "mine" / "experiment" / "mine.yaml").write_bytes(content)
    assert play("train", f"--config-dir={folder / 'mine'}", *SMALL, "experiment=mine").status == 0


@pytest.mark.parametrize("content", ["100000000000000000000", "[1]", "{", "null"])
def test_results_that_are_no_results_are_written_anew(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    assert read_json(path) == {}
    assert update_json(path, {"a": 1}) == {"a": 1}
    assert read_json(path) == {"a": 1}
