"""The composed configuration: what identifies a run, what changed since, and plain containers of it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from vit_attn.attention import option_names
from vit_attn.errors import UserError, printable

# Keys that say where and with what a run is computed, not what it computes.
_PLACE = (
    *("hydra", "experiments_dir", "experiment_name", "run_name", "overwrite", "test", "explain_images", "logger"),
    *("callbacks.attention_probe", "callbacks.checkpoint_every_n_steps", "callbacks.checkpoint_every_n_minutes"),
    *("trainer.accelerator", "trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.on_nan"),
    *("data.root", "data.num_workers", "data.cache_budget", "data.progress", "data.eval_batch_size"),
    *("data.check_images",),
)
# What a run that has a name of its own may change when it goes on: how long it is, and how many devices it has.
_MAY_CHANGE = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
)

_SECRET = re.compile(
    r"((api|access|account|private|secret|signing)_?key|token|secret|password|passwd|passphrase|credential)s?$",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8  # characters: less is found by chance
_TOKENS = ("class_token", "reg_tokens")  # of a Vision Transformer
_HIDDEN = "<hidden>"


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve every interpolation and leave plain containers."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a plain configuration to the leaves that decide what is computed: "optimizer.lr" → 0.001."""
    return {
        key: value
        for key, value in _leaves(config)
        if not any(key == place or key.startswith(place + ".") for place in _PLACE)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what would make ``new`` another run than ``old``: "key: old → new".

    The same global batch may be shared by another number of processes.
    """
    before, after = identity(old), identity(new)
    may_change = {*_MAY_CHANGE}
    if None is not _global_batch(before) == _global_batch(after):
        may_change.add("data.batch_size")
    return [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted({*before, *after} - may_change)
        if before.get(key) != after.get(key) and before.get(key) != _HIDDEN
    ]


def _global_batch(leaves: dict[str, Any]) -> int | None:
    """Images that all processes together take at a time; None where "auto" leaves their number open."""
    sizes = [leaves.get(key) for key in ("data.batch_size", "trainer.devices", "trainer.num_nodes")]
    known = [size for size in sizes if isinstance(size, int)]
    return prod(known) if len(known) == len(sizes) else None


def without_secrets(config: Any, key: str = "") -> Any:
    """Copy plain containers; what is under a secret's name, or holds a secret of the environment, is hidden."""
    if isinstance(config, Mapping):
        return {name: without_secrets(value, str(name)) for name, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value, key) for value in config]
    if _names_secret(key) and config not in (None, ""):
        return _HIDDEN
    return _HIDDEN if isinstance(config, str) and held_secret(config) else config


def _names_secret(key: str) -> bool:
    return _SECRET.search(key) is not None and key not in _TOKENS


def _environment_secrets() -> dict[str, str]:
    return {
        value: name
        for name, value in os.environ.items()
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET and not os.path.exists(value)
    }


def held_secret(text: str) -> str | None:
    """Name the variable of the environment whose secret ``text`` holds; None where it holds none."""
    return next((name for secret, name in _environment_secrets().items() if secret in text), None)


def hide_secrets(text: str) -> str:
    """``text`` with every secret of the environment hidden in it."""
    for secret in _environment_secrets():
        text = text.replace(secret, _HIDDEN)
    return text


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuse a command line that holds a secret: lists of processes, logs and a sweep's files would show it.

    Raises:
        UserError: names the key, never the value.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = key.lstrip("+~-").rpartition(".")[2].replace("-", "_")
        inside = [word for word in re.findall(r"(?<!\w)(\w+)[\"']?\s*:", value) if _names_secret(word)]
        if _names_secret(name) and value not in ("null", "''", '""') and (value or key.startswith("--")):
            inside.insert(0, name)
        variable = held_secret(argument)
        if inside or variable:
            what = printable(inside[0]) if inside else f"the value of {variable}"
            raise UserError(
                f"{what} on the command line: a secret does not belong there, where others can read it. "
                "Leave it in the environment, such as WANDB_API_KEY, or use `wandb login`"
            )


def default_run_name(*, _root_: DictConfig) -> str:
    """Name a run after its attention, its seed and a digest of all else that decides what is computed."""
    raw = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(raw, dict)
    found = identity({str(key): value for key, value in raw.items()})
    # Without what is null, so that a name stays when an option is added that nobody has set.
    leaves = sorted((key, str(value)) for key, value in found.items() if value is not None)
    digest = hashlib.sha256(json.dumps(leaves).encode()).hexdigest()[:6]
    attention = _root_.model.attention
    specs = attention if isinstance(attention, ListConfig) else [attention]
    readable = re.sub(r"[^\w+.-]+", "-", "-".join(str(spec) for spec in specs))[:60]
    return f"{readable}_seed{_root_.seed}_{digest}"


OmegaConf.register_new_resolver("default_run_name", default_run_name, replace=True)
# conf/model: every option of every registered normalizer, pattern and mechanism, null.
ConfigStore.instance().store("registered", dict.fromkeys(option_names()), group="model/attention_options")
