"""Measure speed and memory, each candidate against its rivals in the same rounds.

    python -m vit_attn.bench attention                                # attention alone, and the table of targets
    python -m vit_attn.bench attention --sizes 256,1024 --plot attention.png --json attention.json
    python -m vit_attn.bench model --attention softmax,strided        # whole training steps of a ViT
    python -m vit_attn.bench data                                     # input pipeline
    python -m vit_attn.bench step                                     # a training step, part by part
    python -m vit_attn.bench attention --quick                        # does it run? about a minute

Cells show the median over the rounds with the quartiles in brackets. `<suite> --help` lists the options of a suite.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from vit_attn.arguments import Parser
from vit_attn.bench.options import add_common, check_writable, resolve_device
from vit_attn.bench.output import Table, describe_run, print_tables, write_json, write_markdown
from vit_attn.bench.plot import save_plot, times_figure
from vit_attn.console import run_command
from vit_attn.errors import user_errors

SUITES = {
    "attention": "attention alone: every mechanism and implementation against torch's and others' kernels",
    "model": "whole training steps of a ViT",
    "data": "the input pipeline",
    "step": "a training step, part by part",
}
_OUTPUTS = ("json", "markdown", "plot")
_QUICK_ROUNDS = 3


def _load(suite: str) -> ModuleType:
    """Import a suite when it is asked for: the others' imports take seconds."""
    return importlib.import_module(f"vit_attn.bench.{suite}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ModuleType]:
    parser = Parser(
        prog="python -m vit_attn.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    suites = parser.add_subparsers(dest="suite", required=True, metavar="{" + ",".join(SUITES) + "}")
    module: Any = None
    for name, text in SUITES.items():
        sub = suites.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name not in argv[:1]:
            continue
        module = _load(name)
        add_common(sub)
        module.add_arguments(sub)
        if "--quick" in argv:
            # As defaults, so that what the command line says goes before them.
            sub.set_defaults(rounds=_QUICK_ROUNDS, **getattr(module, "QUICK", {}))
    return parser.parse_args(argv), module


def _run(argv: Sequence[str]) -> list[Table]:
    args, suite = _parse(argv)
    command = shlex.join(["python", "-m", "vit_attn.bench", *argv])
    outputs = {name: getattr(args, name, None) for name in _OUTPUTS}
    for name, path in outputs.items():
        if path is not None:
            check_writable(f"--{name}", path)
    args.device = resolve_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    run = describe_run(command, device=args.device, seed=args.seed)
    tables: list[Table] = suite.run(args)
    print(f"{command}\n{run['device']}, {run['threads']} threads, torch {torch.__version__}")
    print_tables(tables)
    _write(tables, run, outputs)
    return tables


def _write(tables: Sequence[Table], run: dict[str, Any], outputs: dict[str, Any]) -> None:
    plots = [plot for table in tables for plot in table.plots]
    for name, path in outputs.items():
        if path is None:
            continue
        if name == "plot" and not plots:
            print(f"left out {path}: nothing was measured that could be drawn")
            continue
        with user_errors(f"cannot write --{name} {str(path)!r}"):
            if name == "json":
                write_json(path, tables, run)
            elif name == "markdown":
                write_markdown(path, tables, run)
            else:
                machine = f"{run['device']}, {run['threads']} threads"
                save_plot(times_figure(plots, title=f"{tables[0].title} · {machine}"), path)
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after one line about what was wrong."""
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv), resumes=False)


if __name__ == "__main__":
    sys.exit(main())
