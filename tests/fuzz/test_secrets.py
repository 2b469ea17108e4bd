"""No secret in any file or line that a run, an evaluation, an explanation or a report writes."""

import os
import zipfile
from pathlib import Path

import pytest
from playing import SMALL, assert_one_line, files_below, play

KEY = "0123456789abcdef0123456789abcdef01234567"
PLANTED = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_planted0planted1planted2",
    "AWS_SECRET_ACCESS_KEY": "aws/planted0planted1planted2",
    "DB_PASSWORD": "planted-password-of-many-letters",
}


@pytest.fixture(autouse=True)
def _planted(monkeypatch, _offline):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def holders(folder: Path, *outputs: str) -> list[str]:
    """Names of the files below ``folder``, parts of archives included, and of outputs, that hold a planted secret."""
    secrets = [value.encode() for value in PLANTED.values()]
    contents = {f"output {number}": text.encode() for number, text in enumerate(outputs)}
    for name, content in files_below(folder).items():
        contents[name] = os.fsencode(name) + content
        if zipfile.is_zipfile(name):
            with zipfile.ZipFile(name) as archive:
                contents |= {f"{name}/{part}": archive.read(part) for part in archive.namelist()}
    assert len(contents) > len(outputs)
    return [name for name, content in contents.items() if any(secret in content for secret in secrets)]


@pytest.mark.slow
def test_nothing_that_the_commands_write_holds_one(place, monkeypatch):
    from vit_attn.report.__main__ import main as report

    folder = place()
    small = [setting for setting in SMALL if not setting.startswith(("logger", "test", "explain"))]
    settings = (*small, "logger=wandb", "logger.mode=offline", "explain_images=1", "+note=${oc.env:WANDB_API_KEY}")
    # As a multirun, with the files that Hydra would write if it were asked to.
    done = [play("train", "-m", *settings, "run_name=mine", "hydra.output_subdir=.hydra")]
    done += [play("train", *SMALL[1:], "data=digits", "logger=tensorboard", "run_name=other")]
    run = folder / "experiments" / "default" / "mine"
    done += [play("evaluate", f"ckpt={run}", "accelerator=cpu", "explain=true", "explain_images=1", "output=scores")]
    done += [play("explain", f"ckpt={run}", "accelerator=cpu", "images=1", "output=explained")]
    done += [play("report", main=lambda: report([str(run.parent)]))]
    assert [each.status for each in done] == [0] * 5, done
    names = {Path(name).name for name in files_below(folder)}
    assert {"last.ckpt", "train.log", "multirun.yaml", "report.html", "explanations.npz", "overrides.yaml"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert any(name.startswith("events.out") for name in names)
    assert holders(folder, *(text for each in done for text in (each.out, each.err))) == []
    (folder / "planted.txt").write_text(f"x{KEY}y")
    assert holders(folder) == [str(folder / "planted.txt")]  # it would be found


@pytest.mark.parametrize(
    "argument",
    [
        *(f"+logger.api_key={KEY[:20]}", "++logger.apikey=mine-77", "hydra.job.env_set.WANDB_API_KEY=mine-77"),
        *("+token=mine-77", "+mine={a:{password:mine-77}}", "+mine={'hf_token': mine-77}", "+mine=[{secret:mine-77}]"),
        *("--api-key=mine-77", "--token", "-password=mine-77", f"run_name={KEY}", f"+note=key-{KEY}!", KEY),
        *(f"--config-name={KEY}", f"+x@{KEY}=y", "+credentials=mine-77", "+AWS_SECRET_ACCESS_KEY=mine-77"),
    ],
)
@pytest.mark.parametrize("program", ["train", "evaluate", "explain"])
def test_one_on_the_command_line_is_refused_and_not_repeated(place, program, argument):
    folder = place()
    arguments = (argument, "-m", "seed=1") if program == "train" else ("ckpt=x", argument)
    done = play(program, *arguments)
    assert_one_line(done)
    assert "a secret does not belong there" in done.err
    for secret in (KEY, KEY[:20], "mine-77"):
        assert secret not in done.out + done.err
    assert files_below(folder) == {str(folder): b""}  # no multirun.yaml


@pytest.mark.parametrize(
    "key",
    [
        *("run_name", "experiment_name", "experiments_dir", "data.root", "model.name", "model.attention", "seed"),
        *("model.weights", "trainer.precision", "data.augment.policy", "optimizer._target_", "loss._target_"),
        *("callbacks.early_stopping.monitor", "experiment", "data", "+nothing.here", "+trainer.nothing"),
        *("logger.project", "logger.group", "logger.mode"),
    ],
)
def test_one_that_a_setting_refers_to_is_hidden(place, key):
    folder = place()
    logger = ["logger=wandb"] if key.startswith("logger") else []
    given = [setting for setting in SMALL if setting.partition("=")[0] not in (key, "logger" if logger else "")]
    on = ["callbacks.early_stopping.enabled=true"] if "early" in key else []
    data = ["data=imagefolder"] if key == "data.root" else []
    given = [setting for setting in given if not (data and setting.startswith("data="))]
    done = play("train", *given, *logger, *on, *data, f"{key}=${{oc.env:WANDB_API_KEY}}")
    if key != "+nothing.here":
        assert_one_line(done)
        assert files_below(folder) == {str(folder): b""}
    assert KEY not in done.out + done.err
    if files_below(folder) != {str(folder): b""}:
        assert holders(folder) == []


@pytest.mark.parametrize("argument", ["model.class_token=true", "model.reg_tokens=2", "+model.note=null"])
def test_tokens_of_a_transformer_are_no_secrets(place, argument):
    place()
    assert "secret" not in play("train", *SMALL, argument, "run_name=mine").err


def test_one_in_a_checkpoint_of_anybodys_is_not_looked_up(place, tmp_path_factory, train_in):
    import torch

    run = train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine")
    folder = place()
    checkpoint = torch.load(run.best, weights_only=True)
    checkpoint["vit_attn"]["config"]["run_name"] = "${oc.env:WANDB_API_KEY}"
    torch.save(checkpoint, folder / "x.ckpt")
    done = play("evaluate", "ckpt=x.ckpt", "accelerator=cpu")
    assert_one_line(done)
    assert KEY not in done.out + done.err
    assert "refers to something outside of it in run_name" in done.err
