"""Finished runs without training: folders as a run leaves them, with made-up but plausible numbers."""

import csv
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

STEPS_PER_EPOCH = 10
BASE = ("experiment=demo", "logger=none", "model.attention=softmax")


def write_run(
    compose: Any,
    folder: Path,
    *,
    attention: str | list[str] = "softmax",
    seed: int = 1,
    options: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    run_name: str | None = None,
    acc: float | None = None,
    epochs: int = 5,
    layers: int = 4,
    state: str | None = "finished",
    error: str | None = None,
    stopped_after: int | None = None,
    explain: bool = False,
    test: bool = True,
    results: dict[str, Any] | None = None,
    curves: bool = True,
) -> Path:
    """Write a run folder into the experiment folder ``folder`` and return it.

    Args:
        compose: the fixture; see ``make_run``.
        attention, seed, options: as in the configuration.
        overrides: of the real configuration, such as "optimizer.lr=1e-2".
        run_name: default: as train.py names it.
        acc: test accuracy; default: made up from attention and seed.
        layers: of the statistics and the cost.
        state: of results/status.json; None leaves the file out, as old runs do.
        error: of results/status.json.
        stopped_after: steps; for a run that is not finished: no metrics.json, curves up to there.
        explain: write results/explanations.npz, and its numbers.
        test: score on test.
        results: put over what metrics.json would hold; None as a value takes a key away.
        curves: write logs/metrics.csv.
    """
    config = OmegaConf.create(OmegaConf.to_container(_composed(compose, (*BASE, *overrides)), resolve=False))
    config.experiment_name, config.experiments_dir, config.seed = folder.name, str(folder.parent), seed
    config.trainer.max_epochs = epochs
    config.model.attention = attention
    for key, value in (options or {}).items():
        OmegaConf.update(config, f"model.attention_options.{key}", value, force_add=True)
    if run_name is not None:
        config.run_name = run_name
    plain = OmegaConf.to_container(config, resolve=True)
    root = folder / str(plain["run_name"])
    for part in ("checkpoints", "logs", "results/attention"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    rng = np.random.default_rng([seed, *str((attention, sorted((options or {}).items()))).encode()])
    acc = 0.9 + 0.08 * rng.random() if acc is None else acc
    content = _metrics(plain, rng, acc=acc, epochs=epochs, layers=layers)
    if not test:
        del content["test"]
    if curves:
        _write_curves(root / "logs/metrics.csv", content, plain, rng, last=stopped_after)
    if explain:
        explanations = _explanations(rng)
        explanations.save(root / "results/explanations.npz")
        field = np.linspace(0.4, 1.0, layers).tolist()
        content["explanations"] = {**explanations.summary(), "receptive_field": field}
    for key, value in (results or {}).items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    content = {key: value for key, value in content.items() if value is not None}
    if stopped_after is None and state in ("finished", None):
        (root / "results/metrics.json").write_text(json.dumps(content))
    if state is not None:
        times = {"started": "2026-01-01T10:00:00+00:00", "updated": "2026-01-01T11:00:00+00:00"}
        (root / "results/status.json").write_text(json.dumps({"state": state, "error": error, **times}))
    return root


@functools.cache
def _composed(compose: Any, overrides: tuple[str, ...]) -> Any:
    return compose(*overrides)


def _metrics(config: dict[str, Any], rng: Any, *, acc: float, epochs: int, layers: int) -> dict[str, Any]:
    attention = config["model"]["attention"]
    zeros = 0.0 if attention in ("softmax", "full") else 0.5 + 0.4 * rng.random()
    entries = round(65**2 * (1 - zeros))
    images_per_second = 500 + 100 * rng.random()
    return {
        **{"run": config["run_name"], "experiment": config["experiment_name"], "seed": config["seed"]},
        **{"attention": attention, "checkpoint": "best.ckpt", "best_epoch": epochs, "epochs": epochs},
        "steps": epochs * STEPS_PER_EPOCH,
        "val": {"loss": 0.3 + 0.1 * rng.random(), "acc": min(acc + 0.01, 1.0), "ece": 0.05 + 0.02 * rng.random()},
        "test": {
            **{"loss": 0.4 + 0.1 * rng.random(), "acc": acc, "ece": 0.06 + 0.02 * rng.random()},
            **{"per_class_acc": [acc] * 10, "confusion": (36 * np.eye(10, dtype=int)).tolist()},
        },
        "speed": {
            **{"images_per_second": images_per_second, "step_seconds": 32 / images_per_second, "batch_size": 32},
            **{"peak_memory_bytes": 700_000_000, "device": "cpu"},
        },
        "cost": {
            **{"parameters": 459_562, "flops": 65_000_000, "attention_flops": 6_400_000},
            **{"flops_by_entries": 58_600_000 + round(6_400_000 * (1 - zeros)), "entries": [entries] * layers},
            **{"sparsity": [zeros] * layers, "why": ["asked for"] * layers},
            "layers": [f"{attention} (fused)"] * layers,
        },
        "attention_statistics": {
            str(layer): {
                "zeros": zeros + (1 - zeros) * 0.1 * layer / layers * (zeros > 0),
                "entropy": math.log(65) * (1 - zeros) * (0.9 - 0.1 * rng.random()),
                "support": 65 * (1 - zeros),
                "distance": 2 + layer / layers + 0.2 * rng.random(),
            }
            for layer in range(layers)
        },
        "environment": {
            **{"python": "3.11.7", "platform": "Linux", "cpu_count": 2, "threads": 1, "gpus": []},
            **{"vit_attn": "0.1.0", "torch": "2.15.0", "lightning": "2.6.6", "timm": "1.0.31", "numpy": "2.4.6"},
        },
    }


def _write_curves(path: Path, results: dict[str, Any], config: dict[str, Any], rng: Any, last: int | None) -> None:
    """Sparse rows, as the CSV logger writes them."""
    rows: list[dict[str, float]] = []
    steps, options = results["steps"], config["model"]["attention_options"]
    for step in range(steps if last is None else last):
        epoch, share = divmod(step, STEPS_PER_EPOCH)[0], (step + 1) / steps
        row: dict[str, float] = {"step": step, "epoch": epoch}
        if step % 5 == 4:
            row |= {"train/loss": 0.3 + 2 * math.exp(-4 * share) + 0.05 * rng.random()}
            row |= {"train/acc": 1 - 0.9 / (1 + 9 * share)}
            row |= {"train/lr": 1e-3 * (1 - share), "speed/images_per_second": 500 + 50 * rng.random()}
        if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:
            row |= {"val/loss": 0.3 + 2 * math.exp(-3 * share), "val/ece": 0.05 + 0.02 * rng.random()}
            row["val/acc"] = results["val"]["acc"] * (1 - math.exp(-5 * share))
            for layer, values in results["attention_statistics"].items():
                row |= {f"attention/{name}/layer_{int(layer):02d}": value for name, value in values.items()}
                if options.get("learnable_alpha") or options.get("anneal_alpha_from"):
                    start = options.get("anneal_alpha_from") or 1.5
                    for head in range(3):
                        learned = options.get("learnable_alpha")
                        drift = 0.2 * share * rng.random() if learned else min(2 * share, 1) * 0.4
                        row[f"attention/alpha/layer_{int(layer):02d}/head_{head}"] = start + drift
        if len(row) > 2:
            rows.append(row)
    names = sorted(set().union(*rows) - {"step", "epoch"}) if rows else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", *names])
        writer.writeheader()
        writer.writerows(rows)


def _explanations(rng: Any, count: int = 6, side: int = 8, steps: int = 10) -> Any:
    from vit_attn.explain.explanations import METHODS, Explanations

    fixed = np.random.default_rng(0)  # the images are those of the data, whatever the run
    images = fixed.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = fixed.integers(0, 10, count)
    shared = fixed.random((count, side, side))
    maps = {name: (shared + 0.3 * rng.random(shared.shape)).astype(np.float32) for name in METHODS}
    falling = np.linspace(0.9, 0.1, steps + 1)
    noise = {name: 0.05 * rng.random((count, steps + 1)) for name in (*METHODS, "random")}
    return Explanations(
        images=images,
        labels=labels.astype(np.int64),
        predictions=np.where(rng.random(count) < 0.8, labels, (labels + 1) % 10).astype(np.int64),
        confidences=(0.5 + 0.5 * rng.random(count)).astype(np.float32),
        maps=maps,
        deletion={name: (falling + extra).astype(np.float32) for name, extra in noise.items()},
        insertion={name: (falling[::-1] + extra).astype(np.float32) for name, extra in noise.items()},
    )


@pytest.fixture
def make_run(compose: Any, tmp_path: Path) -> Any:
    """``make_run(folder=None, attention=…, seed=…, …)`` → a run's folder in tmp_path/experiment; :func:`write_run`."""

    def make(folder: Path | None = None, **options: Any) -> Path:
        return write_run(compose, folder if folder is not None else tmp_path / "experiment", **options)

    return make


@pytest.fixture(scope="session")
def run_writer(compose: Any) -> Any:
    """``run_writer(folder, attention=…, seed=…, …)``; :func:`write_run` for fixtures that live longer than a test."""
    return functools.partial(write_run, compose)


@pytest.fixture
def comparison_of(make_run: Any, tmp_path: Path) -> Any:
    """``comparison_of({…}, {…}, baseline=…)``: write a run for each dictionary, and compare what lies there."""
    from vit_attn.report.compare import compare
    from vit_attn.report.runs import read_runs

    def build(*runs: dict[str, Any], **options: Any) -> Any:
        for run in runs:
            make_run(**{"curves": False, **run})
        return compare(read_runs([tmp_path / "experiment"]), **options)

    return build
