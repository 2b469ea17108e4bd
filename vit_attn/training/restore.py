"""From a checkpoint to a module and its data: what the commands that score and explain share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import vit_attn
from vit_attn.attention import attention_layers
from vit_attn.config import plain
from vit_attn.console import shows_progress_bar
from vit_attn.data import ImageData, Normalize
from vit_attn.errors import UserError, one_line, unknown_name, user_errors
from vit_attn.explain.probe import default_layers
from vit_attn.training.build import build_data, build_loss, build_net
from vit_attn.training.checkpoint import load_checkpoint
from vit_attn.training.folder import RunFolder
from vit_attn.training.module import Classifier


def read_command_line(name: str, arguments: list[str], usage: str) -> tuple[DictConfig, dict[str, Any]] | None:
    """Compose conf/<name>.yaml for a command that begins with a checkpoint.

    Args:
        name: of the configuration.
        arguments: the command line.
        usage: printed where help is asked for, or nothing is given.

    Returns:
        The configuration, and changes to the data that the checkpoint names, where the command line names no other;
        None where help was asked for.

    Raises:
        UserError: no checkpoint, or a ``data.…`` that cannot be read.
    """
    overrides = list(arguments)
    if not overrides or any(argument in ("-h", "--help") for argument in overrides):
        print(usage)
        if overrides:
            return None
        raise UserError("ckpt=<checkpoint or run folder> is missing")
    other_data = any(argument.startswith("data=") for argument in overrides)
    own_data: dict[str, Any] = {}
    if not other_data:
        # Without a data set of its own, the command line changes the one that the checkpoint names.
        changes = [argument for argument in overrides if argument.startswith("data.")]
        overrides = [argument for argument in overrides if argument not in changes]
        own_data = _data_changes(changes)
    with initialize_config_dir(str(Path(vit_attn.__file__).parent.parent.absolute() / "conf"), version_base="1.3"):
        config = compose(name, overrides)
    if OmegaConf.is_missing(config, "ckpt"):
        raise UserError("ckpt=<checkpoint or run folder> is missing")
    return config, own_data


def _data_changes(changes: list[str]) -> dict[str, Any]:
    nested = OmegaConf.create({"data": {}})
    for change in changes:
        try:
            override = OverridesParser.create().parse_override(change)
        except HydraException as error:
            raise UserError(f"{change}: {one_line(error)}") from error
        OmegaConf.update(nested, override.key_or_group, override.value())
    return plain(nested.data)


def find_checkpoint(where: str) -> tuple[Path, Path]:
    """Find the checkpoint that ``ckpt=`` means: a file, or the best (else the last) of a run folder.

    Returns:
        The checkpoint, and the folder for results.

    Raises:
        UserError: nothing of the kind is there.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        for candidate in (folder.best, folder.last):
            if candidate.exists():
                return candidate, folder.results
        raise UserError(f"ckpt={path}: no checkpoint in {folder.checkpoints}")
    if not path.exists():
        raise UserError(f"ckpt={path}: no such file or run folder")
    inside_run = path.parent.name == "checkpoints" and RunFolder(path.parent.parent).config.exists()
    return path, RunFolder(path.parent.parent).results if inside_run else path.parent / "results"


@dataclass(frozen=True)
class Restored:
    """A checkpoint, ready to be used.

    Args:
        path: the checkpoint.
        folder: where results go.
        config: what the checkpoint was trained with.
        trained_on: ``ImageData.describe()`` of then.
        epoch: that the checkpoint was made in, from 1.
        module: with its weights, on the CPU.
        layers: indices of the layers to draw.
    """

    path: Path
    folder: Path
    config: dict[str, Any]
    trained_on: dict[str, Any]
    epoch: int
    module: Classifier
    layers: list[int]

    @property
    def title(self) -> str:
        """Run and attention, for the titles of pictures."""
        return f"{self.config['run_name']} · {self.config['model']['attention']}"

    @property
    def note(self) -> str:
        """Run and epoch, likewise."""
        return f"{self.config['run_name']} · epoch {self.epoch}"

    def make_folder(self) -> None:
        """Make the folder for results.

        Raises:
            UserError: it cannot be made.
        """
        with user_errors(f"output {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)


def restore(config: DictConfig) -> Restored:
    """Rebuild the model of the checkpoint that ``config.ckpt`` names; nothing is written.

    Args:
        config: conf/evaluate.yaml or conf/explain.yaml, composed: ``ckpt``, ``output``, ``layers``, ``data``.

    Raises:
        UserError: a checkpoint that cannot be used, or layers that it does not have.
    """
    if config.layers is not None and not (
        OmegaConf.is_list(config.layers) and all(isinstance(layer, int) for layer in config.layers)
    ):
        raise UserError(f"layers must be a list of layer numbers, such as [0,3], not {config.layers!r}")
    path, folder = find_checkpoint(str(config.ckpt))
    checkpoint = load_checkpoint(path)
    saved, trained_on = checkpoint["vit_attn"]["config"], checkpoint["vit_attn"]["data"]
    module = _build_module(saved, trained_on, checkpoint["state_dict"])
    layers = list(config.layers) if config.layers is not None else default_layers(module.net)
    depth = len(attention_layers(module.net))
    if any(not 0 <= layer < depth for layer in layers):
        raise UserError(f"layers={layers}: the model has layers 0 to {depth - 1}")
    if config.output:
        folder = Path(config.output).expanduser()
    elif config.get("data") is not None:
        folder /= "other_data"  # what the run itself measured stays
    return Restored(path, folder, saved, trained_on, checkpoint["epoch"] + 1, module, layers)


def load_data(config: DictConfig, restored: Restored, overrides: dict[str, Any]) -> ImageData:
    """Load the test split, with the sizes and the normalization that the model was trained with.

    Args:
        config: ``data`` names another data set than the checkpoint's.
        restored: the checkpoint.
        overrides: changes to the checkpoint's data, see :func:`read_command_line`.

    Raises:
        UserError: a key that the data do not have, data that cannot be read, or that have other classes.
    """
    saved, trained_on = restored.config, restored.trained_on
    for key in overrides:
        if key not in saved["data"]:
            raise UserError(unknown_name("key", f"data.{key}", [f"data.{name}" for name in saved["data"]]))
    options = plain(config.data) if config.get("data") is not None else {**saved["data"], **overrides}
    fixed = {name: trained_on[name] for name in ("image_size", "mean", "std")}
    data = build_data(OmegaConf.create({**options, **fixed}), saved["seed"])
    with user_errors("data"):
        data.prepare_data()
        data.setup("test")
    if data.class_names != trained_on["class_names"]:
        theirs, ours = data.class_names, trained_on["class_names"]
        raise UserError(
            f"the data have {len(theirs)} classes ({', '.join(theirs[:3])}, …), but the checkpoint was trained on "
            f"{len(ours)} ({', '.join(ours[:3])}, …)"
        )
    return data


def _build_module(saved: dict[str, Any], trained_on: dict[str, Any], state: dict[str, Tensor]) -> Classifier:
    """Rebuild the model from what the checkpoint says of it."""
    # The checkpoint brings the weights: what they started from is not needed again.
    model = {**saved["model"], "pretrained": False, "weights": None}
    num_classes = len(trained_on["class_names"])
    module = Classifier(
        net=build_net(model, num_classes=num_classes, image_size=trained_on["image_size"]),
        criterion=build_loss(saved["loss"]),
        normalize=Normalize(trained_on["mean"], trained_on["std"]),
        num_classes=num_classes,
    )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its configuration: {one_line(error)[:200]}") from error
    return module


def build_tester(accelerator: str) -> Trainer:
    """A Trainer that scores on one device and writes nothing; its ``strategy.root_device`` is that device.

    Raises:
        UserError: an accelerator that does not exist here.
    """
    allowed = ("auto", "cpu", "gpu")
    if accelerator not in allowed:
        raise UserError(f"accelerator={accelerator}: one of {', '.join(allowed)}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: no GPU is available; use accelerator=cpu")
    return Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=shows_progress_bar(),
        use_distributed_sampler=False,
    )
