"""The recipes that compare: what they run without -m, and what their report shows."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from vit_attn.config import plain
from vit_attn.training.module import Classifier

ROOT = Path(__file__).parent.parent
ALPHAS = (
    *({"alpha": alpha} for alpha in (1.01, 1.1, 1.25, 1.5, 1.75, 2.0)),
    {"alpha": 1.5, "anneal_alpha_from": 1.01},
    {"alpha": 1.5, "learnable_alpha": True},
)
MECHANISMS = ("softmax", "entmax15", "sparsemax", "strided", "sliding_window", "entmax15+strided")


@pytest.fixture
def jobs(command, monkeypatch, tmp_path):
    """``jobs(*arguments)`` → the configurations that the command would train, in order."""

    def run(*arguments):
        configs = []
        monkeypatch.setattr("vit_attn.training.run.train", lambda config: configs.append(plain(config)))
        done = command("train", *arguments, f"experiments_dir={tmp_path / 'runs'}", "logger=none")
        assert (done.status, done.err) == (0, "")
        return configs

    return run


def options_of(config):
    """The attention options of a configuration that are set."""
    return {key: value for key, value in config["model"]["attention_options"].items() if value is not None}


def values_of(key, text):
    """The values that a sweep over ``key`` goes through, as Hydra's own parser reads them."""
    override = OverridesParser.create().parse_override(f"{key}={text}")
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


@pytest.mark.parametrize(
    ("experiment", "attentions", "num_options", "num_jobs"),
    [("alpha_study", ("entmax",), 8, 24), ("compare", MECHANISMS, 1, 18)],
)
def test_a_recipe_sweeps_without_m(experiment, attentions, num_options, num_jobs):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = compose("config", [f"experiment={experiment}"], return_hydra_config=True).hydra
    assert hydra.mode == RunMode.MULTIRUN
    swept = {key: values_of(key, text) for key, text in hydra.sweeper.params.items()}
    assert tuple(map(str, swept["model.attention"])) == attentions
    assert list(map(int, swept["seed"])) == [1, 2, 3]
    assert len(swept.get("model.attention_options", [{}])) == num_options
    assert math.prod(map(len, swept.values())) == num_jobs


@pytest.mark.slow
def test_alpha_study_is_every_alpha_under_three_seeds(jobs):
    configs = jobs("experiment=alpha_study")
    assert len(configs) == 24
    assert {config["model"]["attention"] for config in configs} == {"entmax"}
    assert {config["experiment_name"] for config in configs} == {"alpha_study"}
    seen = Counter((tuple(sorted(options_of(config).items())), config["seed"]) for config in configs)
    assert seen == Counter((tuple(sorted(options.items())), seed) for options in ALPHAS for seed in (1, 2, 3))
    assert len({config["run_name"] for config in configs}) == 24
    for config in configs:  # beside α and the seed, all runs are the same
        for key in ("run_name", "seed"):
            del config[key]
        config["model"].pop("attention_options")
    assert all(config == configs[0] for config in configs)


@pytest.mark.slow
def test_compare_is_six_mechanisms_under_three_seeds(jobs):
    configs = jobs("experiment=compare")
    seen = Counter((config["model"]["attention"], config["seed"]) for config in configs)
    assert seen == Counter((attention, seed) for attention in MECHANISMS for seed in (1, 2, 3))
    assert len({config["run_name"] for config in configs}) == 18
    assert {config["experiment_name"] for config in configs} == {"compare"}


@pytest.mark.parametrize(
    ("overrides", "options", "seeds"),
    [
        (("seed=1",), ALPHAS, (1,)),
        (("model.attention_options={alpha:1.3}", "seed=4,5"), ({"alpha": 1.3},), (4, 5)),
        (("-m", "seed=2", "trainer.max_epochs=2", "data.batch_size=16"), ALPHAS, (2,)),
    ],
    ids=["one seed", "one alpha", "with -m"],
)
def test_what_the_command_line_says_stands_in_for_the_sweep(jobs, overrides, options, seeds):
    configs = jobs("experiment=alpha_study", *overrides)
    assert [(options_of(config), config["seed"]) for config in configs] == [
        (option, seed) for option in options for seed in seeds
    ]
    if "-m" in overrides:
        assert {(config["trainer"]["max_epochs"], config["data"]["batch_size"]) for config in configs} == {(2, 16)}


def test_softmax_beside_the_study_as_its_header_says(jobs):
    configs = jobs("experiment=alpha_study", "model.attention=softmax", "model.attention_options={}")
    assert [(config["model"]["attention"], options_of(config), config["seed"]) for config in configs] == [
        ("softmax", {}, seed) for seed in (1, 2, 3)
    ]


@pytest.mark.slow
def test_another_place_as_its_header_says(jobs):
    place = ("data=cifar10", "trainer=gpu", "experiment_name=alpha_cifar10", "seed=1")
    configs = jobs("experiment=alpha_study", *place)
    assert [options_of(config) for config in configs] == list(ALPHAS)
    assert {config["trainer"]["accelerator"] for config in configs} == {"gpu"}
    assert {config["experiment_name"] for config in configs} == {"alpha_cifar10"}
    assert {config["data"]["_target_"] for config in configs} == {"vit_attn.data.cifar10.Cifar10"}


STUDY = (
    *("experiment=alpha_study", "seed=1", "logger=none", "explain_images=0"),
    "model.attention_options={alpha:1.01},{alpha:1.5,anneal_alpha_from:1.01},{alpha:1.5,learnable_alpha:true}",
    *("model.depth=2", "model.embed_dim=32", "trainer.max_epochs=2", "trainer.limit_train_batches=2"),
    # Small batches: nothing is worth compiling.
    *("trainer.limit_val_batches=1", "test=false", "data.batch_size=16", "data.eval_batch_size=16"),
)


def read_rows(root):
    with (root / "logs" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_tiny_study_runs_every_job_and_the_same_command_repeats_nothing(command, no_pictures, monkeypatch, tmp_path):
    steps, step = [], Classifier.training_step

    def counted(self, *args):
        steps.append(self.seed)
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", counted)
    arguments = (*STUDY, f"experiments_dir={tmp_path / 'runs'}")
    done = command("train", *arguments)
    assert (done.status, done.err) == (0, "")
    assert len(steps) == 3 * 2 * 2
    study = tmp_path / "runs" / "alpha_study"
    assert f"report     {study / 'report' / 'report.html'}" in done.out
    roots = {path.parent.parent for path in study.rglob("metrics.csv")}
    assert len(roots) == 3
    assert {path for path in study.iterdir() if path.is_dir()} == roots

    found = {}
    for root in roots:
        options = yaml.safe_load((root / "config.yaml").read_text())["model"]["attention_options"]
        kind = "learned" if options["learnable_alpha"] else "annealed" if options["anneal_alpha_from"] else "fixed"
        rows = [row for row in read_rows(root) if "val/acc" in row]
        assert len(rows) == 2  # epochs
        found[kind] = [{key: float(row[key]) for key in row if key.startswith("attention/alpha/")} for row in rows]
        assert json.loads((root / "results" / "status.json").read_text())["state"] == "finished"
    names = {f"attention/alpha/layer_{layer}/head_{head}" for layer in ("00", "01") for head in (0, 1)}
    assert found["fixed"] == [{}, {}]
    assert [row.keys() for row in found["annealed"] + found["learned"]] == [names] * 4
    # Half of four steps: 1.01 in the first, 1.5 from the second, so at the end of either epoch.
    assert [set(row.values()) for row in found["annealed"]] == [{1.5}, {1.5}]
    for row in found["learned"]:
        assert all(1.4 < value < 1.6 for value in row.values())
    assert found["learned"][1] != found["learned"][0]

    steps.clear()
    again = command("train", *arguments)
    assert (again.status, again.err, steps) == (0, "", [])
    assert {path.parent.parent for path in study.rglob("metrics.csv")} == roots


@pytest.mark.slow
def test_the_report_of_a_study_shows_what_alpha_does(command, tmp_path):
    done = command("train", *STUDY, f"experiments_dir={tmp_path / 'runs'}")
    assert (done.status, done.err) == (0, "")
    page = (tmp_path / "runs" / "alpha_study" / "report" / "report.html").read_text()
    for said in ("What α does", "α over the training", "α 1.01→1.5", "α learned", "α=1.01"):
        assert said in page
    figures = tmp_path / "runs" / "alpha_study" / "report" / "figures"
    assert {"alpha.png", "alpha_training.png"} <= {path.name for path in figures.iterdir()}


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_where_it_was(command, no_pictures, monkeypatch, tmp_path):
    steps, step = [], Classifier.training_step

    def crash(self, *args):
        steps.append(self.trainer.global_step)
        if len(steps) == 7:  # in the second run, after its first epoch
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", crash)
    arguments = (*STUDY, f"experiments_dir={tmp_path / 'runs'}")
    assert command("train", *arguments).status == 130
    assert steps == [0, 1, 2, 3, 0, 1, 2]
    done = command("train", *arguments)
    assert (done.status, done.err) == (0, "")
    assert steps[7:] == [2, 3, 0, 1, 2, 3]
    assert done.out.count("validation accuracy") == 3
