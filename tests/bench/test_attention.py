"""``python -m vit_attn.bench attention``: the candidates compute what they are named, and the tables say it all."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

from vit_attn.attention import IMPLEMENTATIONS, MECHANISMS, NORMALIZERS, PATTERNS, attention
from vit_attn.bench import attention as suite
from vit_attn.bench import cases, targets
from vit_attn.bench.cases import PASSES, make_inputs, own_cases, rival_cases, step
from vit_attn.bench.output import Spread
from vit_attn.bench.timing import Failed, Timing

CPU = torch.device("cpu")
SIZE = 36
SMALL = ("--quick", "--device", "cpu", "--sizes", "16", "--batch", "1", "--heads", "2", "--head-dim", "4")


@pytest.fixture
def inputs():
    return make_inputs((2, 3, SIZE, 8), dtype=torch.float32, device=CPU, seed=1)


def all_cases():
    return own_cases(SIZE, list(NORMALIZERS), list(PATTERNS), list(IMPLEMENTATIONS))


def reference(case, inputs):
    """The dense computation in fp64, without autograd of our own for softmax."""
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = attention(q, k, v, case.normalizer, case.pattern, implementation="dense")
    return out, torch.autograd.grad(out, (q, k, v), inputs.grad.double())


def strided_share(size):
    width = round(size**0.5)
    allowed = [(i, j) for i in range(size) for j in range(i + 1) if i - j <= width or (i - j) % width == 0]
    return 100 * len(allowed) / size**2


def test_every_candidate_computes_its_mechanism_forward_and_backward(inputs):
    rivals = [case for case in rival_cases(SIZE, "forward", CPU, quick=True) if not case.skipped]
    assert len(rivals) == 4
    for case in [*rivals, *all_cases()]:
        out, grads = reference(case, inputs)
        torch.testing.assert_close(step(case.attend, inputs, "forward")(), out.float(), atol=2e-5, rtol=1e-4)
        found = step(case.attend, inputs, "forward+backward")()
        for ours, theirs in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_flex_attention_computes_the_strided_mechanism(inputs):
    (case,) = [case for case in rival_cases(SIZE, "forward", CPU) if case.implementation == "FlexAttention"]
    out, _ = reference(case, inputs)
    torch.testing.assert_close(step(case.attend, inputs, "forward")(), out.float(), atol=2e-5, rtol=1e-4)


def test_a_forward_pass_keeps_nothing_for_a_backward_one(inputs):
    out = step(lambda q, k, v: q * k + v, inputs, "forward")()
    assert out.grad_fn is None


def test_an_implementation_is_measured_for_the_normalizers_that_it_takes():
    offered = {(case.normalizer, case.implementation) for case in all_cases()}
    assert {("softmax", "fused"), ("softmax", "dense"), ("sparsemax", "dense")} <= offered
    assert ("sparsemax", "fused") not in offered
    assert len({case.name for case in all_cases()}) == len(all_cases())


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(cases, "ENTMAX_PACKAGE_MAX", 16)
    skipped = {case.name: case.skipped for case in rival_cases(SIZE, PASSES[1], CPU) if case.skipped}
    assert skipped == {
        "softmax+strided (FlexAttention)": "it has no backward pass on the CPU",
        "entmax15+strided (entmax package)": "above N=16 it takes minutes per call",
        "sparsemax+strided (entmax package)": "above N=16 it takes minutes per call",
    }


def test_bfloat16_inputs_pass_through_every_candidate():
    low = make_inputs((1, 2, 16, 8), dtype=torch.bfloat16, device=CPU, seed=0)
    rivals = [case for case in rival_cases(16, "forward", CPU, quick=True) if not case.skipped]
    for case in [*rivals, *own_cases(16, list(NORMALIZERS), ["strided"], list(IMPLEMENTATIONS))]:
        assert step(case.attend, low, "forward")().dtype == torch.bfloat16, case.name


def test_the_command_prints_and_saves_every_candidate_and_every_target(bench, tmp_path):
    files = {name: tmp_path / "new" / f"out.{name}" for name in ("json", "md", "svg")}
    patterns = ("full", "strided")
    options = ["--target-sizes", "16", "--threads", "1", "--patterns", ",".join(patterns)]
    options += ["--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["svg"])]
    done = bench("attention", *SMALL, *options)
    assert done.status == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {path}" for path in files.values()
    ]
    read = json.loads(files["json"].read_text())
    assert read["threads"] == 1
    assert read["command"].startswith("python -m vit_attn.bench attention --quick")
    candidates, targeted = read["tables"]
    names = {(row["mechanism"], row["implementation"]) for row in candidates["rows"]}
    assert {(f"{n}+{p}", "dense") for n in NORMALIZERS for p in patterns} <= names
    assert {
        ("softmax+full", "SDPA"),
        ("softmax+strided", "SDPA masked"),
        ("sparsemax+strided", "entmax package"),
    } < names
    for row in candidates["rows"]:
        assert (row["N"], row["pass"] in PASSES) == (16, True)
        if row["implementation"] == "FlexAttention":
            assert row["note"] == "left out by --quick: it compiles for long"
            continue
        ((_, seconds),) = row["seconds"].items()
        assert len(seconds) == 3, row
        assert row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
        assert row["memory"] > 0
        if row["mechanism"] == "softmax+strided":
            assert row["entries"] == pytest.approx(strided_share(16))
        if row["implementation"] == "SDPA":
            assert row["× SDPA"] == {"median": 1, "low": 1, "high": 1}
    assert len(targeted["rows"]) == 14
    assert all(row["measured"] is not None for row in targeted["rows"])
    text = files["md"].read_text()
    for table in read["tables"]:
        assert f"### {table['title']}\n" in text
        assert table["title"] in done.out
    assert files["svg"].read_bytes().startswith(b"<?xml")


def test_targets_can_be_had_alone_or_left_out(bench, monkeypatch):
    monkeypatch.setattr(suite, "targets_table", lambda args: suite.Table("targets", (suite.Column("N"),)))
    alone = bench("attention", *SMALL, "--targets-only")
    assert (alone.status, "mechanism" in alone.out, "targets" in alone.out) == (0, False, True)
    few = ("--patterns", "fixed", "--normalizers", "softmax", "--implementations", "dense")
    without = bench("attention", *SMALL, "--no-targets", "--pass", "forward", *few)
    assert without.status == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in without.out.splitlines() if line.startswith("│")]
    assert {row[2] for row in rows} == {"forward"}
    assert [row[3] for row in rows if row[4] == "dense"] == ["softmax+fixed"]
    assert [row[3] for row in rows if row[4] == "kernel"] == list(MECHANISMS)
    assert len(rows) == 6 + len(MECHANISMS)  # and five rivals


def results_of(sizes, sdpa, own):
    share = {size: case.entries for size in sizes for case in own_cases(size, ["softmax"], ["fixed"], ["dense"])}
    for size in sizes:
        full = cases.Case("softmax", "full", cases.SDPA, 1.0, lambda q, k, v: q)
        yield suite.Result(size, "forward", full, Timing("a", sdpa), 1)
        fixed = cases.Case("softmax", "fixed", "dense", share[size], lambda q, k, v: q)
        yield suite.Result(size, "forward", fixed, own, None)


def test_the_floor_is_the_fused_time_times_the_share_of_entries():
    (_, _, floor) = suite._plot([*results_of((16, 64), (1.0, 2.0, 3.0), Timing("b", (1.0,)))], "forward", "fixed").lines
    assert floor.computed
    assert floor.sizes == (16, 64)
    # Blocks of w keys: causal halves of them with the diagonal, and the last key of every earlier block.
    share = [(w * w * (w + 1) / 2 + w * w * (w - 1) / 2) / w**4 for w in (4, 8)]
    assert [spread.median for spread in floor.seconds] == pytest.approx([2.0 * part for part in share])


def test_what_failed_has_its_reason_in_the_table_and_no_line_in_the_plot():
    args = argparse.Namespace(batch=1, heads=1, head_dim=4, dtype="float32", rounds=3, patterns=["fixed"])
    table = suite._table([*results_of((16,), (1.0, 2.0, 3.0), Failed("b", "out of memory"))], args)
    assert table.rows[1].cells["note"] == "out of memory"
    assert table.rows[1].timings == ()
    assert [line.name for line in table.plots[0].lines] == ["SDPA"]


# What the issue asks, at 1,024 and 4,096 tokens: owed and aim.
ISSUE = {
    "softmax+strided: times faster than SDPA": ("≥ 6", "≥ 10", "≥ 15", "≥ 25"),
    "softmax+fixed: times faster than SDPA": ("≥ 6", "≥ 10", "≥ 15", "≥ 25"),
    "softmax+sliding_window: times faster than SDPA": ("≥ 6", "≥ 10", "≥ 15", "≥ 25"),
    "softmax+dilated_sliding_window: times faster than SDPA": ("≥ 6", "≥ 10", "≥ 15", "≥ 25"),
    "entmax15+strided: time relative to softmax+strided": ("≤ 1.3", "≤ 1.1", "≤ 1.3", "≤ 1.1"),
    "sparsemax+strided: time relative to softmax+strided": ("≤ 1.3", "≤ 1.1", "≤ 1.3", "≤ 1.1"),
    "entmax15 alone: time relative to torch.softmax": ("≤ 3", "≤ 1.5", "≤ 3", "≤ 1.5"),
    "sparsemax alone: time relative to torch.softmax": ("≤ 3", "≤ 1.5", "≤ 3", "≤ 1.5"),
    "entmax α=1.3 alone: time relative to torch.softmax": ("≤ 5", "≤ 3", "≤ 5", "≤ 3"),
    "entmax, learned α per head, alone: time relative to torch.softmax": ("≤ 5", "≤ 3", "≤ 5", "≤ 3"),
    "entmax15 alone: times faster than the entmax package": ("≥ 20", "≥ 40", "≥ 20", "≥ 40"),
    "sparsemax alone: times faster than the entmax package": ("≥ 20", "≥ 40", "≥ 20", "≥ 40"),
    "softmax+strided: times less peak memory than dense": ("≥ 8", "≥ 16", "≥ 20", "≥ 40"),
    "ViT training, strided: images/s relative to softmax": ("≥ 1.5", "≥ 2", "", ""),
}


def test_targets_are_those_of_the_issue():
    groups = (targets._SPEED, targets._MECHANISM, targets._NORMALIZER, targets._PACKAGE)
    every = [target for group in groups for target in group.values()] + [targets._MEMORY, targets._TRAINING]
    bounds = {t.what: tuple(t.bound(b, size) for size in (1024, 4096) for b in (t.owed, t.aim)) for t in every}
    assert bounds == ISSUE


@pytest.mark.parametrize(
    ("at_least", "value", "verdict"),
    [
        *((True, 5.9, "short"), (True, 6, "owed met"), (True, 10, "aim met")),
        *((False, 10.1, "short"), (False, 10, "owed met"), (False, 6, "aim met")),
    ],
)
def test_a_verdict_names_the_best_bound_that_is_reached(at_least, value, verdict):
    owed, aim = (6, 10) if at_least else (10, 6)
    target = targets.Target("x", {1024: owed}, {1024: aim}, at_least)
    assert target.verdict(value, 1024) == verdict
    assert target.verdict(value, 16) == ""


def test_a_target_divides_round_by_round_or_says_what_failed():
    target = targets.Target("x", {}, {})
    above, below = Timing("above", (2.0, 8.0)), Timing("below", (1.0, 4.0))
    assert targets._compare(target, 16, above, below).measured == Spread(2.0, 2.0, 2.0)
    failed = targets._compare(target, 16, above, Failed("below", "out of memory"))
    assert (failed.measured, failed.note) == (None, "below: out of memory")


def test_targets_hold_for_the_sparse_engine_as_soon_as_there_is_one(monkeypatch):
    monkeypatch.setattr(targets, "IMPLEMENTATIONS", {"dense": None})
    assert targets.own_implementation() == "auto"
    monkeypatch.setattr(targets, "IMPLEMENTATIONS", {"dense": None, "blocks": None})
    assert targets.own_implementation() == "blocks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: {attention,model,data,step}"),
        (["atention"], "invalid choice: 'atention'"),
        (["attention", "--sizes", "64,60"], "argument --sizes: 60 tokens are no square grid; the nearest is 64"),
        (["attention", "--sizes", "1"], "must be a whole number from 4 to 65536, not '1'"),
        (["attention", "--patterns", "stridded"], "unknown pattern 'stridded'. Did you mean 'strided'?"),
        (["attention", "--normalizers", "softmax,entmix"], "unknown normalizer 'entmix'. Did you mean 'entmax'?"),
        (["attention", "--implementations", "fuse"], "Did you mean 'fused'?"),
        (["attention", "--pass", "backward"], "invalid choice: 'backward'"),
        (["attention", "--rounds", "0"], "argument --rounds: must be a whole number from 1 to 10000, not '0'"),
        (["attention", "--seconds-per-candidate", "nan"], "must be a number of seconds above 0, not 'nan'"),
        (["attention", "--plot", "times.jpg"], "'times.jpg' must end in .png, .svg, .pdf"),
        (["attention", "--plot", "times.png", "--targets-only"], "--plot draws what --targets-only leaves out"),
        (["attention", "--targets-only", "--no-targets"], "not allowed with"),
        (["attention", "--size", "64"], "unrecognized arguments: --size"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(bench, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "interleave", None)  # no work is done
    done = bench(*arguments)
    assert done.status == 2
    assert said in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(bench):
    done = bench("attention", "--device", "cuda")
    assert (done.status, done.err) == (2, "error: --device cuda: no GPU is available; use --device cpu\n")


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_a_file_that_cannot_be_written_is_found_before_measuring(bench, monkeypatch, tmp_path, option):
    monkeypatch.setattr(suite, "run", None)
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "out.png"
    done = bench("attention", option, str(path))
    assert done.status == 2
    assert done.err.startswith(f"error: cannot write {option} {str(path)!r}: ")
    assert done.err.count("\n") == 1


def test_finding_out_leaves_existing_results_alone(bench, monkeypatch, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    done = bench("attention", "--json", str(tmp_path / "old.json"), "--plot", str(tmp_path / "p.png"), "--targets-only")
    assert done.status == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.json": "{}"}


def test_the_command_runs_as_a_user_runs_it():
    command = [sys.executable, "-m", "vit_attn.bench", "attention", *SMALL, "--no-targets", "--patterns", "fixed"]
    command += ["--normalizers", "softmax", "--pass", "forward"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["measuring  attention, N=16, forward"]
    assert done.stdout.startswith("python -m vit_attn.bench attention --quick")
