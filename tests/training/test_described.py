"""Checkpoints of anybody's: what they say is data, and asks for nothing."""

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

from vit_attn.errors import UserError
from vit_attn.training.described import own_classes


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_in):
    limits = ("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "test=false")
    return train_in(tmp_path_factory.mktemp("run"), *limits, "run_name=mine")


CODE = {"_target_": "os.mkdir", "path": "owned"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("loss._target_", "os.mkdir", r"loss._target_='os.mkdir', not one of .*CrossEntropy"),
        ("loss", CODE, "loss._target_='os.mkdir'"),
        ("data._target_", "os.system", "data._target_='os.system'"),
        ("data", CODE, "data._target_='os.mkdir'"),
        ("data.augment", CODE, "holds data.augment._target_"),
        ("data.mean", [CODE], "holds data.mean._target_"),
        ("loss.label_smoothing", CODE, "holds loss.label_smoothing._target_"),
        ("loss._args_", ["owned"], "holds loss._args_"),
        ("data._recursive_", True, "holds data._recursive_"),
        ("data.root", "${oc.env:HOME}", "refers to something outside of it in data.root"),
        ("model.attention", ["${oc.env:HOME}"], "refers to something outside of it in model.attention"),
        ("model.checkpoint_path", "owned", "model.checkpoint_path is not for here"),
        ("model.pretrained_cfg", {"file": "owned"}, "model.pretrained_cfg is not for here"),
        ("model.cache_dir", "owned", "model.cache_dir is not for here"),
        ("model.name", "hf-hub:some/body", "unknown model.name 'hf-hub:some/body'"),
        ("model.name", "local-dir:/tmp", "unknown model.name"),
    ],
)
def test_what_asks_for_more_is_refused(run, tmp_path, monkeypatch, evaluate, key, value, said):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(run.best, weights_only=True)
    node = checkpoint["vit_attn"]["config"]
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    torch.save(checkpoint, "x.ckpt")
    with pytest.raises(UserError, match=said):
        evaluate("ckpt=x.ckpt", "output=out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_the_code_above_is_live(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hydra.utils.instantiate(OmegaConf.create({"a": CODE}))
    assert (tmp_path / "owned").is_dir()


def test_own_classes_are_those_of_the_configuration():
    assert own_classes("loss") == [
        f"vit_attn.training.losses.{n}" for n in ("CrossEntropy", "Entmax15Loss", "SparsemaxLoss")
    ]
    assert "vit_attn.data.digits.Digits" in own_classes("data")


def test_the_wanted_keys_can_be_gone_on_without(run, tmp_path, monkeypatch, evaluate):
    """The refusals above come of what was changed: unchanged, the checkpoint is scored."""
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(run.best, weights_only=True)
    torch.save(checkpoint, "x.ckpt")
    assert "test" in evaluate("ckpt=x.ckpt", "output=out", "attention_images=1")
