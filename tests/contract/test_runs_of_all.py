"""A training, its resumption, its evaluation and its explanations, for everything that is registered."""

import json

import pytest
import torch
from registered import NAMES

from vit_attn.attention import MECHANISMS, PATTERNS, Masked, option_names, parse_spec
from vit_attn.explain.explanations import METHODS, Explanations
from vit_attn.report.compare import compare
from vit_attn.report.runs import read_runs
from vit_attn.training.module import Classifier

# 16 patches and a class token; few images, so that a run takes a second or two.
SHORT = (
    *("model.patch_size=8", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "data.batch_size=16"),
    *("callbacks.attention_probe.num_images=2", "callbacks.attention_probe.picture_images=1", "explain_images=2"),
    "data.eval_batch_size=64",
)


class CrashError(Exception):
    """Ends a training."""


# Whole runs take seconds: those over tokens in raster order, of which others tests have many, are slow ones.
QUICK = [*MECHANISMS, *(name for name, cls in PATTERNS.items() if cls.needs_grid)]
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("spec", EVERY)
def test_a_mechanism_is_trained_evaluated_explained_and_compared(spec, train, evaluate, tmp_path):
    run = train(*SHORT, f"model.attention={spec}", "run_name=one")
    written = json.loads((run.root / "results" / "metrics.json").read_text())
    mechanism = parse_spec(spec)
    assert written["cost"]["layers"][0].startswith(f"{mechanism} (")
    assert (written["cost"]["entries"][0] is None) is (spec in MECHANISMS)
    for values in written["attention_statistics"].values():
        assert {"zeros", "entropy", "support", "distance"} <= values.keys()
        assert 0 <= values["zeros"] < 1
        assert values["support"] == pytest.approx((1 - values["zeros"]) * 17)
    masks = [path.name for path in (run.root / "results" / "attention").glob("mask_*.png")]
    assert masks == ([f"mask_{mechanism.pattern.name}.png"] if isinstance(mechanism, Masked) else [])
    found = Explanations.load(run.root / "results" / "explanations.npz")
    assert set(found.maps) == set(METHODS)
    assert all(maps.shape == (2, 4, 4) and (abs(maps) > 0).any() for maps in found.maps.values())
    again = evaluate(f"ckpt={run.root}", f"output={tmp_path / 'again'}", "explain=true", "explain_images=2")
    assert again["test"]["acc"] == run.results["test"]["acc"]
    assert again["test"]["loss"] == run.results["test"]["loss"]
    comparison = compare(read_runs([run.root.parent]))
    assert [group.label for group in comparison.groups] == [spec if spec != "full" else "softmax"]


@pytest.mark.parametrize("spec", [*MECHANISMS, "entmax:learnable_alpha:true+strided"])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(spec, train, train_in, no_pictures, monkeypatch, tmp_path):
    settings = (
        *("run_name=one", f"model.attention={spec}", "model.patch_size=8", "trainer.max_epochs=2", "test=false"),
        *("trainer.limit_train_batches=6", "trainer.limit_val_batches=1", "data.batch_size=16"),
        *("trainer.accumulate_grad_batches=2", "callbacks.checkpoint_every_n_steps=1", "callbacks.ema.enabled=true"),
        *("callbacks.ema.decay=0.5", *(["model.attention_options.redraw=2"] if "redraw" in option_names() else [])),
    )
    whole = train_in(tmp_path / "whole", *settings)
    steps, step = [], Classifier.training_step

    def crash(self, *args):
        steps.append(self.trainer.global_step)
        if len(steps) == 10:
            raise CrashError
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", crash)
        with pytest.raises(CrashError):
            train(*settings)
    resumed = train(*settings)
    ours, theirs = (torch.load(run.last, weights_only=True) for run in (resumed, whole))
    for part in ("state_dict", "current_model_state"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][key]) for key, value in ours[part].items()), part
    assert resumed.results["val"] == whole.results["val"]
    # What is drawn is copied into the average, not averaged with what it was.
    drawn = [key for key in ours["state_dict"] if key.endswith("core.features")]
    assert all(torch.equal(ours["state_dict"][key], ours["current_model_state"][key]) for key in drawn)
