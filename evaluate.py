"""Score a checkpoint on the test split, and draw what it attends to.

python evaluate.py ckpt=experiments/demo/strided
python evaluate.py ckpt=experiments/demo/strided explain=true     # and what `python -m vit_attn.explain` does
python evaluate.py ckpt=last.ckpt data=imagefolder data.root=photos accelerator=cpu
"""

import sys

from vit_attn.console import run_command
from vit_attn.training.evaluation import evaluate
from vit_attn.training.restore import read_command_line


def main() -> None:
    """Read the command line and evaluate."""
    command_line = read_command_line("evaluate", sys.argv[1:], __doc__ or "")
    if command_line is not None:
        evaluate(*command_line)


if __name__ == "__main__":
    sys.exit(run_command(main))
