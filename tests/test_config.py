"""The configuration: every choice composes, sweeps included, and a run's name says what is computed."""

import inspect
import itertools
from pathlib import Path

import pytest
import timm
import yaml
from omegaconf import OmegaConf

from vit_attn.attention import parse_attention
from vit_attn.config import differences, plain
from vit_attn.models import create_vit

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
GROUPS = ("model", "data", "trainer", "optimizer", "loss", "logger", "callbacks", "experiment")
# base.yaml is what the other data sets start from, no data set.
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "base"
]
SWEEPS = sorted((CONF / "sweep").glob("*.yaml"))


def options_of(config):
    return {key: value for key, value in plain(config.model)["attention_options"].items() if value is not None}


def test_groups_are_the_folders():
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {*GROUPS, "hydra", "sweep"}
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_resolves(compose, group, choice):
    config = plain(compose(f"{group}={choice}"))
    own = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    here = config if group == "experiment" else config[group]
    expected = {key: value for key, value in own.items() if key not in ("defaults", "run_name")}
    for key, value in expected.items():
        if not (isinstance(value, str) and "${" in value) and not isinstance(value, (dict, str)):
            assert here[key] == value


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "data"])
def test_evaluate_composes_with_every_data_set(compose, choice):
    config = compose("ckpt=x", f"data={choice}", name="evaluate")
    assert config.data == compose(f"data={choice}").data


def read_recipe(name):
    """A recipe with what it builds on: its settings, and the choices of other groups that it names."""
    own = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    settings, choices = OmegaConf.create(), {}
    for entry in own.pop("defaults"):
        if isinstance(entry, dict):
            choices |= {key.removeprefix("override /"): value for key, value in entry.items()}
        elif entry != "_self_":
            inherited, more = read_recipe(entry)
            settings, choices = OmegaConf.merge(settings, inherited), {**choices, **more}
    return OmegaConf.merge(settings, own), choices


RECIPES = [choice for group, choice in CHOICES if group == "experiment"]
TRAINERS = [choice for group, choice in CHOICES if group == "trainer"]


@pytest.mark.parametrize(("recipe", "trainer"), itertools.product(RECIPES, TRAINERS))
def test_every_recipe_composes_with_every_trainer(compose, recipe, trainer):
    config = compose(f"experiment={recipe}", f"trainer={trainer}")
    own, _ = read_recipe(recipe)
    assert config.trainer.max_epochs == own["trainer"]["max_epochs"]
    for key in ("accelerator", "devices", "strategy", "precision"):
        assert config.trainer[key] == compose(f"trainer={trainer}").trainer[key], key
    assert config.experiment_name == own["experiment_name"] == recipe
    for key, value in own["model"].items():
        assert config.model[key] == value
    parse_attention(plain(config.model)["attention"], options_of(config))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_the_choices_that_it_names(compose, recipe):
    own, choices = read_recipe(recipe)
    assert choices.keys() >= {"data", "trainer"}  # by name, so that a recipe means the same on every machine
    config = compose(f"experiment={recipe}")
    for group, choice in choices.items():
        changed = compose(f"{group}={choice}")[group]
        assert config[group] == OmegaConf.merge(changed, own.get(group, {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_line_beats_the_recipe(compose, recipe):
    config = compose(f"experiment={recipe}", "trainer.max_epochs=3", "model.attention=fixed", "experiment_name=mine")
    assert (config.trainer.max_epochs, config.model.attention, config.experiment_name) == (3, "fixed", "mine")


def test_model_keys_are_arguments_of_create_vit_or_of_timm():
    ours = inspect.signature(create_vit).parameters.keys() - {"timm_kwargs"}
    timms = inspect.signature(timm.models.vision_transformer.VisionTransformer).parameters.keys()
    keys = yaml.safe_load((CONF / "model" / "vit_tiny.yaml").read_text()).keys() - {"defaults"} | {"attention_options"}
    assert keys <= ours | timms
    # Sizes come from the data.
    assert not keys & {"num_classes", "img_size", "in_chans"}
    assert ours <= keys


def test_null_model_arguments_change_nothing_of_timms_model(compose):
    from vit_attn.training.build import build_net

    ours = build_net(plain(compose().model), num_classes=1000, image_size=224)
    theirs = timm.create_model("vit_tiny_patch16_224")
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def sweep_points(sweep):
    """Every combination of a grid; of distributions, the bounds."""
    names, values = [], []
    for name, parameter in sweep["parameters"].items():
        names.append(name)
        if "value" in parameter:
            values.append([parameter["value"]])
        else:
            values.append(parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]])
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_is_a_command_line_with_a_run_name_of_its_own(compose, path):
    sweep = yaml.safe_load(path.read_text())
    points = sweep_points(sweep)
    folders = set()
    for point in points:
        # As ${args_no_hyphens} writes them, without a shell in between.
        config = compose(*(f"{name}={value}" for name, value in point.items()))
        parse_attention(plain(config.model)["attention"], options_of(config))
        for name, value in point.items():
            if name not in ("data", "trainer", "run_name"):
                assert OmegaConf.select(config, name) == value
        folders.add((config.experiment_name, config.run_name))
        assert "/" not in config.run_name
    assert len(folders) == len(points)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_runs_train_and_follows_a_metric_that_is_logged(path):
    sweep = yaml.safe_load(path.read_text())
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["program"] == "train.py"
    assert sweep["command"] == ["${env}", "python", "${program}", "${args_no_hyphens}"]
    assert sweep["metric"] == {"name": "val/acc", "goal": "maximize"}
    assert sweep["name"] == path.stem
    text = path.read_text()
    if sweep["method"] == "grid":
        assert f"{len(sweep_points(sweep))} runs" in text
        assert all(
            {"value"} == parameter.keys() or {"values"} == parameter.keys()
            for parameter in sweep["parameters"].values()
        )
    else:
        assert f"{sweep['run_cap']} runs" in text


@pytest.mark.parametrize(
    "override",
    [
        *("model.attention=strided", "model.attention=[softmax,strided]", "seed=2", "optimizer.lr=2e-3", "data=digits"),
        *(
            "trainer.max_epochs=7",
            "trainer.precision=bf16-mixed",
            "loss=entmax15",
            "data.batch_size=64",
            "compile=true",
        ),
        *(
            "model.attention_options.window=4",
            "data.augment.mixup=0.1",
            "lr_schedule.warmup=0.1",
            "data.val_fraction=0.2",
        ),
        *("trainer.devices=2", "trainer.accumulate_grad_batches=2", "+model.qk_norm=true", "data.split_seed=3"),
        *("callbacks.ema.enabled=true", "callbacks.ema.decay=0.9"),
    ],
)
def test_run_name_changes_with_what_decides_the_result(compose, override):
    assert compose(override).run_name != compose().run_name


@pytest.mark.parametrize(
    "override",
    [
        *("data.root=/elsewhere", "logger=csv", "logger=none", "experiments_dir=/elsewhere", "experiment_name=other"),
        *("overwrite=true", "data.num_workers=3", "trainer.enable_progress_bar=false", "data.progress=false"),
        *("data.cache_budget=1", "data.eval_batch_size=3", "callbacks.checkpoint_every_n_steps=5", "test=false"),
    ],
)
def test_run_name_does_not_change_with_where_a_run_is_computed(compose, override):
    assert compose(override).run_name == compose().run_name


def test_run_name_is_the_same_in_every_composition_and_reads_well(compose):
    name = compose("model.attention=entmax+strided", "seed=4").run_name
    assert name == compose("seed=4", "model.attention=entmax+strided").run_name
    assert name.startswith("entmax+strided_seed4_")
    layered = compose("model.attention=[strided,full]").run_name
    assert layered.startswith("strided-full_seed1_")
    assert Path(layered).name == layered


def test_run_name_does_not_follow_the_environment(compose, monkeypatch):
    before = compose().run_name
    monkeypatch.setenv("VIT_ATTN_DATA", "/elsewhere")
    assert compose().run_name == before


@pytest.mark.parametrize(
    ("overrides", "listed"),
    [
        ([], []),
        (["optimizer.lr=2e-3"], ["optimizer.lr: 0.001 → 0.002"]),
        (["model.attention=fixed", "seed=3"], ["model.attention: softmax → fixed", "seed: 1 → 3"]),
        (["+model.qk_norm=true"], ["model.qk_norm: None → True"]),
        (["data.augment.crop_scale=[0.5,1.0]"], ["data.augment.crop_scale: [0.08, 1.0] → [0.5, 1.0]"]),
        (["trainer.max_epochs=7", "trainer.devices=2", "trainer.strategy=ddp", "data.root=/x", "logger=csv"], []),
        (["experiments_dir=/x", "run_name=y", "overwrite=true"], []),
    ],
)
def test_differences_list_what_makes_it_another_run(compose, overrides, listed):
    assert differences(plain(compose()), plain(compose(*overrides))) == listed
