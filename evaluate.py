"""Score a checkpoint on the test split, and draw what it attends to.

python evaluate.py ckpt=experiments/demo/strided
python evaluate.py ckpt=last.ckpt data=imagefolder data.root=photos accelerator=cpu
"""

import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vit_attn.config import plain
from vit_attn.console import run_command
from vit_attn.errors import UserError, one_line
from vit_attn.training.evaluation import evaluate


def main() -> None:
    """Read the command line and evaluate."""
    overrides = sys.argv[1:]
    if not overrides or any(argument in ("-h", "--help") for argument in overrides):
        print(__doc__)
        if overrides:
            return
        raise UserError("ckpt=<checkpoint or run folder> is missing")
    other_data = any(argument.startswith("data=") for argument in overrides)
    own_data: dict[str, Any] = {}
    if not other_data:
        # Without a data set of its own, the command line changes the one that the checkpoint names.
        changes = [argument for argument in overrides if argument.startswith("data.")]
        overrides = [argument for argument in overrides if argument not in changes]
        nested = OmegaConf.create({"data": {}})
        for change in changes:
            try:
                override = OverridesParser.create().parse_override(change)
            except HydraException as error:
                raise UserError(f"{change}: {one_line(error)}") from error
            OmegaConf.update(nested, override.key_or_group, override.value())
        own_data = plain(nested.data)
    with initialize_config_dir(str(Path(__file__).parent.absolute() / "conf"), version_base="1.3"):
        config = compose("evaluate", overrides)
    if OmegaConf.is_missing(config, "ckpt"):
        raise UserError("ckpt=<checkpoint or run folder> is missing")
    evaluate(config, own_data)


if __name__ == "__main__":
    sys.exit(run_command(main))
