"""α on its way: where it is at every step, what a stopped run makes of it, and what checkpoints hold."""

import csv
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vit_attn.attention.normalizers.entmax import AlphaCore, annealing_cores
from vit_attn.errors import UserError
from vit_attn.models import create_vit
from vit_attn.training.annealing import AlphaAnnealing
from vit_attn.training.build import build_net
from vit_attn.training.module import Classifier

ANNEALED = (
    *("model.attention=entmax", "model.attention_options.anneal_alpha_from=1.01", "model.attention_options.alpha=1.7"),
    # Small batches: nothing is worth compiling.
    *("data.batch_size=16", "data.eval_batch_size=16", "trainer.limit_val_batches=1"),
)


class StoppedError(Exception):
    """Ends a training as a crash would."""


@dataclass
class Seen:
    """What the batches of a training saw: the optimizer step, α of the first layer, the loss."""

    steps: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def watch(monkeypatch, *, stop=None):
    """Note what each batch sees, and crash where the ``stop``-th (from 0) would begin."""
    seen, step = Seen(), Classifier.training_step

    def watched(self, *args):
        if len(seen.steps) == stop:
            raise StoppedError
        alphas = torch.cat([core.number() for core in annealing_cores(self.net)] or [torch.ones(1)])
        assert (alphas == alphas[0]).all()
        seen.steps.append(self.trainer.global_step)
        seen.alphas.append(float(alphas[0]))
        loss = step(self, *args)
        seen.losses.append(loss.item())
        return loss

    monkeypatch.setattr(Classifier, "training_step", watched)
    return seen


def load(path):
    return torch.load(path, weights_only=True)


def alphas_of(path):
    """Every α that the state dict of a checkpoint holds."""
    return {value for key, one in load(path)["state_dict"].items() if "annealed_alpha" in key for value in one.tolist()}


def same(left, right):
    """Whether two nests of containers hold the same, tensors bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def read_rows(run):
    with (run.root / "logs" / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def spread_net(*args, **kwargs):
    """A network whose scores spread, so that it matters how they are weighed; its head is not near zero."""
    net = build_net(*args, **kwargs)
    with torch.no_grad():
        net.pos_embed *= 20
        for block in net.blocks:
            block.attn.qkv.weight *= 8
            block.attn.proj.weight *= 8
        net.head.weight *= 5
    return net


# Where α is


@pytest.mark.parametrize(
    ("share", "line"),
    [
        (0.0, np.full(8, 1.7)),
        (0.5, [*np.linspace(1.01, 1.7, 4), *np.full(4, 1.7)]),
        (1.0, np.linspace(1.01, 1.7, 8)),
    ],
)
def test_alpha_moves_in_a_line_over_its_share_of_the_steps(train, no_pictures, monkeypatch, share, line):
    seen = watch(monkeypatch)
    limits = ("trainer.max_epochs=2", "trainer.limit_train_batches=4", "test=false")
    run = train(*ANNEALED, *limits, f"callbacks.alpha_annealing.share={share}")
    assert seen.steps == list(range(8))
    assert seen.alphas == pytest.approx(line, abs=1e-6)
    assert seen.alphas[-1] == float(np.float32(1.7))
    assert alphas_of(run.last) == {float(np.float32(1.7))}
    logged = [row for row in read_rows(run) if "attention/alpha/layer_01/head_1" in row]
    assert [int(row["step"]) for row in logged] == [3, 7]  # at the end of each epoch
    for name in (f"attention/alpha/layer_{layer}/head_{head}" for layer in ("00", "01") for head in (0, 1)):
        assert [float(row[name]) for row in logged] == pytest.approx([line[3], line[7]], abs=1e-6)


def test_alpha_waits_for_the_step_where_gradients_accumulate(train, no_pictures, monkeypatch):
    seen = watch(monkeypatch)
    limits = ("trainer.limit_train_batches=8", "trainer.accumulate_grad_batches=2", "test=false")
    train(*ANNEALED, *limits, "callbacks.alpha_annealing.share=1")
    assert seen.steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen.alphas == pytest.approx(np.repeat(np.linspace(1.01, 1.7, 4), 2), abs=1e-6)


def test_alpha_may_go_down(train, no_pictures, monkeypatch):
    seen = watch(monkeypatch)
    options = ("model.attention_options.anneal_alpha_from=2.0", "model.attention_options.alpha=1.2")
    train(*ANNEALED, *options, "trainer.limit_train_batches=4", "test=false", "callbacks.alpha_annealing.share=1")
    assert seen.alphas == pytest.approx(np.linspace(2.0, 1.2, 4), abs=1e-6)


def test_the_layers_of_entmax_alone_anneal(train, no_pictures, monkeypatch):
    limits = ("trainer.limit_train_batches=2", "test=false", "model.attention=[strided,entmax+strided]")
    run = train(*ANNEALED, *limits)
    state = load(run.last)["state_dict"]
    assert [key for key in state if key.endswith("annealed_alpha")] == [
        "net.blocks.1.attn.core.normalizer.annealed_alpha"
    ]
    assert alphas_of(run.last) == {float(np.float32(1.7))}


@pytest.mark.parametrize(
    "options",
    [
        ("model.attention=softmax", "model.attention_options.anneal_alpha_from=1.01"),
        ("model.attention=entmax", "model.attention_options.alpha=1.3"),
        ("model.attention=entmax", "model.attention_options.learnable_alpha=true"),
    ],
    ids=["softmax", "fixed", "learned"],
)
def test_nothing_happens_where_no_layer_anneals(train, no_pictures, monkeypatch, options):
    def refuse(self, progress):
        raise AssertionError("an α that is not annealed was moved")

    monkeypatch.setattr(AlphaCore, "anneal", refuse)
    run = train(*options, "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false")
    assert not [line for line in (run.root / "logs" / "train.log").read_text().splitlines() if " alpha  " in line]
    assert not [key for key in load(run.last)["state_dict"] if "annealed" in key]
    assert run.best.exists()


def test_the_log_says_where_alpha_goes(train, no_pictures):
    run = train(*ANNEALED, "trainer.limit_train_batches=6", "test=false")
    assert "alpha      1.01 to 1.7 in the first 3 of 6 steps" in (run.root / "logs" / "train.log").read_text()


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), True, "half", None])
def test_what_is_no_share_is_refused_in_one_line(share):
    with pytest.raises(UserError, match=r"callbacks\.alpha_annealing\.share is a share, from 0 to 1, not ") as error:
        AlphaAnnealing(share=share)
    assert "\n" not in str(error.value)


def test_a_wrong_share_in_the_configuration_is_refused_before_a_run_begins(train, tmp_path):
    with pytest.raises(UserError, match="from 0 to 1, not 2"):
        train(*ANNEALED, "callbacks.alpha_annealing.share=2")
    assert not list(tmp_path.rglob("config.yaml"))


# Checkpoints


def test_the_best_checkpoint_is_the_first_best_whose_alpha_has_arrived(train, no_pictures):
    # Nothing is learned, so that all epochs are equally good and the first that counts is kept.
    limits = ("trainer.max_epochs=4", "trainer.limit_train_batches=2", "test=false", "optimizer.lr=1e-12")
    run = train(*ANNEALED, *limits, "callbacks.alpha_annealing.share=0.75")
    assert run.results["best_epoch"] == 3
    assert load(run.best)["global_step"] == 6  # of 8; α arrives in the 6th
    assert alphas_of(run.best) == {float(np.float32(1.7))}


def test_where_alpha_has_not_arrived_the_last_checkpoint_is_scored(train, no_pictures):
    limits = ("trainer.max_epochs=4", "trainer.limit_train_batches=2", "test=false", "optimizer.lr=1e-12")
    stops = ("callbacks.early_stopping.enabled=true", "callbacks.early_stopping.patience=1")
    run = train(*ANNEALED, *limits, *stops, "callbacks.alpha_annealing.share=1")
    assert (run.results["epochs"], run.results["checkpoint"]) == (2, "last.ckpt")
    assert not run.best.exists()


@pytest.fixture(scope="module")
def scored(train_in, tmp_path_factory):
    """A finished run with scores that spread, annealed to 1.7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_attn.training.run.build_net", spread_net)
        folder = tmp_path_factory.mktemp("scored")
        return train_in(folder, *ANNEALED, "trainer.limit_train_batches=6")


def test_evaluating_gives_what_training_gave(scored, evaluate, no_pictures, tmp_path):
    again = evaluate(f"ckpt={scored.root}", f"output={tmp_path / 'again'}")
    for name in ("loss", "acc", "confusion"):
        assert again["test"][name] == scored.results["test"][name]
    state = load(scored.best)
    for key in [key for key in state["state_dict"] if key.endswith("annealed_alpha")]:
        state["state_dict"][key].fill_(1.01)
    torch.save(state, tmp_path / "elsewhere.ckpt")
    other = evaluate(f"ckpt={tmp_path / 'elsewhere.ckpt'}", f"output={tmp_path / 'other'}")
    assert abs(other["test"]["loss"] - scored.results["test"]["loss"]) > 1e-3  # so α is the checkpoint's, and matters


# Going on


EXACT = (
    *(*ANNEALED, "run_name=exact", "trainer.limit_train_batches=10", "trainer.max_epochs=3"),
    *("trainer.accumulate_grad_batches=2", "callbacks.checkpoint_every_n_steps=2", "callbacks.ema.enabled=true"),
    *("callbacks.ema.decay=0.9", "callbacks.alpha_annealing.share=0.7", "model.attention=entmax+strided", "test=false"),
)
# Two batches to a step, five steps to an epoch, fifteen in all: α takes round(0.7 * 15) = 10 of them.
EXACT_LINE = [*np.linspace(1.01, 1.7, 10), *np.full(5, 1.7)]


@pytest.fixture(scope="module")
def uninterrupted(train_in, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        return train_in(tmp_path_factory.mktemp("uninterrupted"), *EXACT), seen


def test_an_averaged_run_follows_the_line_and_its_checkpoints_hold_alpha_itself(uninterrupted):
    run, seen = uninterrupted
    assert seen.alphas == pytest.approx(np.repeat(EXACT_LINE, 2), abs=1e-6)
    for path in (run.best, run.last):
        assert alphas_of(path) == {float(np.float32(1.7))}  # copied, not averaged with where it was
    raw = load(run.last)["current_model_state"]
    assert {value for key, one in raw.items() if "annealed_alpha" in key for value in one.tolist()} == {
        float(np.float32(1.7))
    }
    assert run.results["best_epoch"] >= 2


# Amid an accumulation and the way of α; before an epoch; twice, of which once after α has arrived.
@pytest.mark.parametrize(
    "stops",
    [[7], pytest.param([10], marks=pytest.mark.slow), pytest.param([23, 5], marks=pytest.mark.slow)],
    ids=str,
)
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(train, no_pictures, monkeypatch, uninterrupted, stops):
    for stop in stops:
        with monkeypatch.context() as patch:
            watch(patch, stop=stop)
            with pytest.raises(StoppedError):
                train(*EXACT)
    with monkeypatch.context() as patch:
        seen = watch(patch)
        resumed = train(*EXACT)
    whole, wanted = uninterrupted
    assert 0 < len(seen.steps) < 30  # it went on rather than begin anew
    assert seen.steps == wanted.steps[-len(seen.steps) :]
    assert seen.alphas == wanted.alphas[-len(seen.alphas) :]
    assert seen.losses == wanted.losses[-len(seen.losses) :]
    for name in ("best", "last"):
        ours, theirs = (load(run.root / "checkpoints" / f"{name}.ckpt") for run in (resumed, whole))
        for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
            assert same(ours[part], theirs[part]), part
        assert (ours["global_step"], ours["epoch"]) == (theirs["global_step"], theirs["epoch"])
    assert read_rows(resumed) == read_rows(whole)
    assert (resumed.results["val"], resumed.results["best_epoch"]) == (
        whole.results["val"],
        whole.results["best_epoch"],
    )


# From weights of softmax


@pytest.fixture(scope="module")
def softmax(train_in, tmp_path_factory):
    """A short run of softmax whose scores spread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_attn.training.run.build_net", spread_net)
        folder = tmp_path_factory.mktemp("softmax")
        return train_in(folder, "trainer.limit_train_batches=4", "trainer.limit_val_batches=1", "test=false")


def logits_from(path, attention, **options):
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    net = create_vit("vit_tiny_patch16_224", attention=attention, attention_options=options, weights=path, **sizes)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net.eval()(images)


@pytest.mark.parametrize("pattern", ["full", "strided"])
def test_annealed_entmax_on_the_weights_of_softmax_begins_as_softmax(softmax, pattern):
    before = logits_from(softmax.best, f"softmax+{pattern}")
    begins = logits_from(softmax.best, f"entmax+{pattern}", anneal_alpha_from=1.01)
    jumps = logits_from(softmax.best, f"entmax+{pattern}", alpha=1.5)
    near, far = ((logits - before).abs().max() / before.abs().max() for logits in (begins, jumps))
    assert near < 0.05
    assert far > 5 * near


def test_training_goes_on_from_the_weights_of_softmax_at_its_loss(train, no_pictures, monkeypatch, softmax):
    losses = {}
    weights = (f"model.weights={softmax.best}", "trainer.limit_train_batches=2", "test=false")
    weights += ("data.batch_size=16", "data.eval_batch_size=16", "trainer.limit_val_batches=1")
    for name, options in {
        "softmax": ("model.attention=softmax",),
        "annealed": ("model.attention=entmax", "model.attention_options.anneal_alpha_from=1.01"),
        "jump": ("model.attention=entmax", "model.attention_options.alpha=1.5"),
    }.items():
        with monkeypatch.context() as patch:
            seen = watch(patch)
            # Two steps, so that α is at its start in the first.
            train(*weights, *options, "callbacks.alpha_annealing.share=1", f"run_name={name}")
        losses[name] = seen.losses[0]
    near, far = (abs(losses[name] - losses["softmax"]) for name in ("annealed", "jump"))
    assert near < 0.02 * losses["softmax"]
    assert far > 3 * near


def test_weights_of_an_annealed_run_begin_again_where_the_option_says(scored):
    softly = logits_from(scored.best, "entmax", anneal_alpha_from=1.2, alpha=1.5)
    assert torch.equal(softly, logits_from(scored.best, "entmax", anneal_alpha_from=1.2, alpha=2.0))
    torch.testing.assert_close(softly, logits_from(scored.best, "entmax", alpha=1.2), rtol=0, atol=1e-4)
    assert (softly - logits_from(scored.best, "entmax", alpha=1.7)).abs().max() > 1e-2
