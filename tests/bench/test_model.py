"""``python -m vit_attn.bench model``: real training steps, and numbers that follow from their seconds."""

import json
from statistics import median

import pytest
import torch

from vit_attn.attention import attention_layers
from vit_attn.bench import model as suite
from vit_attn.bench.model import Shape, attention_alone, build, training_step
from vit_attn.cost import model_cost, peak_memory
from vit_attn.errors import UserError

CPU = torch.device("cpu")
SHAPE = Shape(image_size=8, patch_size=2, embed_dim=24, depth=2, heads=3, batch=5)
SMALL = ("--quick", "--device", "cpu", "--image-size", "4", "--embed-dim", "24", "--batch", "2")


def test_a_step_trains_every_parameter_and_frees_the_gradients():
    net = build("entmax+strided", SHAPE, CPU)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    training_step(net, SHAPE, seed=0)()
    assert net.training
    # Scores do not change with a shift of the keys, so their bias gets no gradient to speak of.
    still = [
        name for name, p in net.named_parameters() if torch.equal(p, before[name]) and not name.endswith("qkv.bias")
    ]
    assert still == []
    assert all(parameter.grad is None for parameter in net.parameters())


def test_steps_bring_the_loss_down(monkeypatch):
    torch.manual_seed(0)
    losses = []
    cross_entropy = suite.F.cross_entropy

    def recorded(logits, labels):
        assert logits.shape == (SHAPE.batch, suite.NUM_CLASSES)
        losses.append(cross_entropy(logits, labels))
        return losses[-1]

    monkeypatch.setattr(suite.F, "cross_entropy", recorded)
    run_step = training_step(build("softmax", SHAPE, CPU), SHAPE, seed=0)
    for _ in range(100):
        run_step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_peak_of_a_step_holds_all_gradients():
    net = build("softmax", SHAPE, CPU)
    run_step = training_step(net, SHAPE, seed=0)
    run_step()
    assert peak_memory(run_step, CPU) > sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_alone_meets_what_a_layer_meets(monkeypatch, dtype):
    shape = Shape(image_size=8, patch_size=2, embed_dim=24, depth=2, heads=3, batch=5, dtype=dtype)
    net = build("entmax15+strided", shape, CPU)
    met = []
    for layer in attention_layers(net):
        layer.core.register_forward_pre_hook(
            lambda core, args: met.append((core, args[0].shape, args[0].dtype, args[3]))
        )
    training_step(net, shape, seed=0)()
    assert len(met) == shape.depth
    in_model = met.copy()
    met.clear()
    q_grad, _, _ = attention_alone(net, shape, seed=0)()
    assert met == in_model[:1]
    assert q_grad.shape == (5, 3, 17, 8)  # 16 patches and a class token


def test_the_implementation_reaches_the_layers():
    for implementation in ("dense", "fused"):
        (first, *_) = attention_layers(build("strided", SHAPE, CPU, implementation=implementation))
        assert first.cost().implementation == implementation


def test_the_table_follows_from_the_seconds_of_every_round(bench, tmp_path):
    path = tmp_path / "model.json"
    done = bench("model", *SMALL, "--attention", "softmax,entmax15+strided,softmax", "--json", str(path))
    assert done.status == 0, done.err
    (table,) = json.loads(path.read_text())["tables"]
    assert "16 patches and a class token, dim 24, depth 2, 3 heads, batch 2, float32" in table["title"]
    assert table["title"] in done.out
    first, second = table["rows"]
    assert (first["attention"], second["attention"]) == ("softmax", "entmax15+strided")
    assert first["layers"] == "softmax+full (fused)"
    steps = {row["attention"]: row["seconds"][row["attention"]] for row in table["rows"]}
    for row in table["rows"]:
        step, alone = row["seconds"].values()
        assert len(step) == len(alone) == 3
        assert row["step"]["median"] == pytest.approx(1e3 * median(step))
        assert row["speed"]["median"] == pytest.approx(2 / median(step))
        assert row["in attention"]["median"] == pytest.approx(
            100 * 2 * median(a / s for a, s in zip(alone, step, strict=True))
        )
        faster = median(a / b for a, b in zip(steps["softmax"], step, strict=True))
        assert row["× first"]["median"] == pytest.approx(faster)
        assert row["memory"] > 0
    shape = Shape(image_size=4, patch_size=1, embed_dim=24, depth=2, heads=3, batch=2)
    cost = model_cost(build("entmax15+strided", shape, CPU), 4)
    assert (second["forward"], second["by entries"]) == (cost["flops"] / 1e9, cost["flops_by_entries"] / 1e9)


def test_bf16_runs_under_autocast(bench):
    done = bench("model", *SMALL, "--attention", "strided", "--precision", "bf16", "--rounds", "1")
    assert done.status == 0, done.err
    assert "bfloat16" in done.out


def test_a_model_that_fails_is_a_note_and_the_others_go_on(bench, monkeypatch, tmp_path):
    original = suite.training_step

    def failing(net, shape, *, seed):
        if attention_layers(net)[0].pattern().is_full:
            return lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
        return original(net, shape, seed=seed)

    monkeypatch.setattr(suite, "training_step", failing)
    path = tmp_path / "model.json"
    assert bench("model", *SMALL, "--attention", "softmax,strided", "--json", str(path)).status == 0
    first, second = json.loads(path.read_text())["tables"][0]["rows"]
    assert (first["note"], first["seconds"]) == ("out of memory", {})
    assert second["step"]["median"] > 0
    assert "× first" not in second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attention", "softmax,stridded"], "Did you mean 'strided'?"),
        (["--attention", "strided+softmax"], "the normalizer comes first: softmax+strided"),
        (["--attention", "entmax", "--implementation", "fused"], "implementation 'fused' computes softmax only"),
        (["--implementation", "fuse"], "invalid choice: 'fuse'"),
        (["--heads", "5"], "--heads 5 must divide --embed-dim 192"),
        (["--patch-size", "5"], "--patch-size 5 must divide --image-size 32"),
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--plot", "a.png"], "unrecognized arguments: --plot a.png"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(bench, monkeypatch, arguments, said):
    monkeypatch.setattr(suite, "interleave", None)  # no work is done
    done = bench("model", *arguments)
    assert done.status == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_sizes_that_do_not_fit_are_refused_in_code_too():
    with pytest.raises(UserError, match="--heads 7 must divide"):
        build("softmax", Shape(image_size=8, patch_size=2, embed_dim=24, depth=1, heads=7, batch=1), CPU)
