"""``python -m vit_attn.bench step``: both loops train the same model the same way, on the real configuration."""

import json
import logging
from statistics import median

import pytest
import torch

from vit_attn.bench import step as suite
from vit_attn.tracking.loggers import CsvLogger
from vit_attn.tracking.wandb_run import WandbRunLogger
from vit_attn.training.annealing import BestCheckpoint
from vit_attn.training.callbacks import AttentionProbe, Throughput
from vit_attn.training.saving import LastCheckpoint

CPU = torch.device("cpu")


def test_both_loops_end_with_the_same_weights_on_the_default_trainer(monkeypatch):
    kept = {}

    class Watched(suite.Turns):
        def on_train_start(self, trainer, pl_module):
            kept["first"] = [p.detach().clone() for p in pl_module.net.parameters()]

        def on_fit_end(self, trainer, pl_module):
            super().on_fit_end(trainer, pl_module)
            kept.update(trainer=trainer, mine=list(pl_module.net.parameters()), bare=list(self.loop.net.parameters()))

    monkeypatch.setattr(suite, "Turns", Watched)
    level, handlers = logging.getLogger("vit_attn").level, list(logging.getLogger("vit_attn").handlers)
    bare, full = suite.measure(3, steps=5, rounds=2, seed=4, device=CPU)
    assert len(bare.seconds) == len(full.seconds) == 2
    for mine, plainly, first in zip(kept["mine"], kept["bare"], kept["first"], strict=True):
        torch.testing.assert_close(mine, plainly, atol=1e-6, rtol=0)
        assert not mine.requires_grad or not torch.equal(mine, first)
    kinds = {type(callback) for callback in kept["trainer"].callbacks}
    assert {AttentionProbe, Throughput, BestCheckpoint, LastCheckpoint} <= kinds
    assert [type(logger) for logger in kept["trainer"].loggers] == [CsvLogger, WandbRunLogger]
    log = logging.getLogger("vit_attn")
    assert (log.level, log.handlers) == (level, handlers)


def test_the_command_measures_and_judges(bench, tmp_path):
    found = bench("step", "--quick", "--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "s.json"))
    assert found.status == 0, found.err
    (row,) = json.loads((tmp_path / "s.json").read_text())["tables"][0]["rows"]
    pairs = zip(row["seconds"]["train.py"], row["seconds"]["bare loop"], strict=True)
    overhead = median(100 * (mine / plainly - 1) for mine, plainly in pairs)
    assert row["overhead"]["median"] == pytest.approx(overhead)
    assert row["met"] == ("yes" if overhead <= 3 else "no")
    assert row["batch"] == 4


def test_a_wrong_option_is_one_line_and_status_2(bench):
    found = bench("step", "--quick", "--batch-sizes", "32,many")
    assert found.status == 2
    assert "many" in found.err
    assert len(found.err.splitlines()) == 1
