"""Command lines: right and wrong keys, values, groups, interpolations and Hydra's own syntax."""

import pytest
from hypothesis import strategies as st
from omegaconf import OmegaConf
from playing import ROOT, SMALL, assert_run_or_one_line, check_all, examples, files_below, play
from values import INTEGERS, NUMBERS, TEXTS, WORDS

GROUPS = ("model", "data", "trainer", "optimizer", "loss", "logger", "callbacks", "experiment")
# Other processes and devices, other machines and the compiler: what they cost is not what is tested here.
LEFT_OUT = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "compile", "data.num_workers", "hydra")


def _keys() -> list[str]:
    from hydra import compose, initialize_config_dir

    import vit_attn.config  # noqa: F401  # registers the resolver of run names

    def below(node, prefix=""):
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from below(value, f"{prefix}{key}.")

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", ["data=digits", "logger=none"])
    keys = list(below(OmegaConf.to_container(composed, resolve=False)))
    return [key for key in keys if not key.startswith(LEFT_OUT)]


KEYS = st.sampled_from(_keys())
STRANGE_KEYS = st.sampled_from(
    [
        *("", "x", "sed", "model.", ".model", "model..depth", "trainer.max_epoch", "a.b.c.d.e.f", "run_name.x"),
        *("+model.img_size", "+model.num_classes", "+model.in_chans", "+model.block_fn", "+model.checkpoint_path"),
        *("+trainer.logger", "+trainer.callbacks", "+trainer.plugins", "+trainer.profiler", "+trainer.fast_dev_run"),
        *("+trainer.detect_anomaly", "+trainer.val_check_interval", "+trainer.reload_dataloaders_every_n_epochs"),
        *("+trainer.enable_checkpointing", "+trainer.use_distributed_sampler", "+trainer.num_sanity_val_steps"),
        *("+optimizer.params", "+optimizer.fused", "+loss.weight", "+loss._partial_", "+data._recursive_"),
        *("+data._args_", "+callbacks.mine", "+callbacks.mine.enabled", "+model._target_", "data@x", "+data@y"),
        *("hydra.mode", "hydra.run.dir", "hydra/launcher", "hydra.nope", "model@model", "~model", "é", "a b", "$x"),
    ]
)
VALUES = st.one_of(INTEGERS.map(str), NUMBERS.map(str), WORDS, TEXTS)
OVERRIDES = st.one_of(
    st.builds("{}={}".format, KEYS, VALUES),
    st.builds("{}={}".format, KEYS, VALUES),
    st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~"]), KEYS, VALUES),
    st.builds("~{}".format, KEYS),
    st.builds("{}={}".format, STRANGE_KEYS, VALUES),
    st.builds("{}={}".format, st.sampled_from(GROUPS), WORDS),
    st.sampled_from(["--no-such-flag", "--cfg", "--cfg=nope", "-c", "--config-name=nope", "--config-dir=nope", "--"]),
    st.sampled_from(["--resolve", "--package", "-p", "--run", "-r", "--info=nope", "--shell-completion", "-x"]),
    TEXTS,
    WORDS,
)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _harmless(overrides: list[str]) -> bool:
    """Left out: what would train for long, on other devices, or change the world outside of the folder."""
    keys = {_key(override) for override in overrides}
    endless = {"trainer.max_epochs", "trainer.max_steps"} <= keys or "trainer" in keys
    return not endless and not any(key.startswith(LEFT_OUT[:-1]) for key in keys)


@examples(short=12, long=300)
def test_a_command_line_of_train_is_a_run_or_one_line(many, place):
    def check(overrides):
        folder = place()
        keys = {_key(override) for override in overrides}
        settings = [setting for setting in SMALL if _key(setting) not in keys]
        arguments = [override.replace("\0", "") for override in overrides]  # no argument can hold that
        done = play("train", *settings, *arguments)
        assert_run_or_one_line(done, folder, {str(folder): b""})

    check_all(many, check, st.lists(OVERRIDES, min_size=1, max_size=3).filter(_harmless))


EVALUATE = st.sampled_from(
    [
        *("ckpt", "output", "accelerator", "attention_images", "picture_images", "layers", "explain", "images", "seed"),
        *("explain_images", "image", "data", "data.root", "data.batch_size", "data.nope", "+data", "~layers", "nope"),
        *("data.image_size", "data.augment.flip", "data._target_", "+data.x", "data"),
    ]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_in):
    return train_in(tmp_path_factory.mktemp("run"), "run_name=mine", "trainer.limit_train_batches=1", "test=false")


@examples(short=6, long=70)
def test_a_command_line_of_evaluate_and_explain_is_a_run_or_one_line(many, place, run):
    def check(given):
        program, overrides = given
        folder = place()
        before = files_below(run.root)
        arguments = [override.replace("\0", "") for override in overrides]
        small = ("images=1", "picture_images=1") if program == "explain" else ("attention_images=1",)
        done = play(program, f"ckpt={run.best}", "accelerator=cpu", "output=out", *small, *arguments)
        assert_run_or_one_line(done, folder, {str(folder): b""})
        assert files_below(run.root) == before

    overrides = st.one_of(st.builds("{}={}".format, EVALUATE, VALUES), TEXTS, WORDS)
    check_all(
        many, check, st.tuples(st.sampled_from(["evaluate", "explain"]), st.lists(overrides, min_size=1, max_size=2))
    )
