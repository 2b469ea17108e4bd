"""Reading W&B's files with W&B's own command, and runs without a training."""

import json
import logging
import os

import pytest
from wandb_stub import wandb_command


class Written:
    """What stands in the one .wandb file of a run's logs folder."""

    def __init__(self, logs, cwd):
        (self.file,) = sorted(logs.glob("wandb/*run-*/*.wandb"))
        self.cwd = cwd

    def _inspect(self, *options):
        done = wandb_command("leet", "inspect", *options, "--json", self.file, cwd=self.cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def summary(self):
        return json.loads(self._inspect("--summary"))

    @property
    def records(self):
        return [json.loads(line) for line in self._inspect().splitlines()]

    def of(self, kind):
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self):
        """Rows of what was logged: name → value."""
        rows = []
        for history in self.of("history"):
            items = history.get("item", history)
            if isinstance(items, list):
                items = {
                    item.get("key") or "/".join(item["nested_key"]): item.get("value", item.get("value_json"))
                    for item in items
                }
            rows.append(items)
        return rows


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """``written(logs folder)`` → :class:`Written`."""
    cwd = tmp_path_factory.mktemp("wandb_command")
    return lambda logs: Written(logs, cwd)


@pytest.fixture
def fresh_wandb(monkeypatch):
    """W&B reads the environment once per process: let it read that of this test."""
    import wandb

    from vit_attn.tracking import wandb as ours

    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_TAGS", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(ours, "_current", None)
    yield wandb
    if ours._current is not None:
        ours._current.finish(failed=True)
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def start(fresh_wandb, tmp_path):
    """``start(name="run", **options)`` → a logger and its folder, as a run makes them."""
    from vit_attn.tracking.wandb import wandb_logger

    def begin(name="run", **options):
        folder = tmp_path / "experiment" / name
        if not folder.exists():
            (folder / "logs").mkdir(parents=True)
            (folder / "config.yaml").write_text("seed: 1\n")
        given = {"project": "p", "entity": None, "group": "g", "tags": [], "mode": "offline", "finish_timeout": 20}
        return wandb_logger(folder, name, **given | options), folder

    return begin


@pytest.fixture
def said(caplog, monkeypatch):
    """Lines of the project's log."""
    monkeypatch.setattr(logging.getLogger("vit_attn"), "propagate", True)
    caplog.set_level(logging.INFO, "vit_attn")
    return caplog
