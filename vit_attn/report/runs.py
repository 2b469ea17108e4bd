"""Runs as they lie on disk: what a folder holds, whether the run finished, and why not."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_attn.errors import UserError, one_line

State = Literal["finished", "unfinished", "failed"]
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Run:
    """One run folder; reading it never fails: what is wrong with it is in ``state`` and ``reason``.

    Args:
        path: the run's folder.
        name: the folder's name.
        config: config.yaml as plain containers; empty where it cannot be read.
        results: results/metrics.json; None where there is none that can be read.
        state: "unfinished" was stopped, or still goes on; "failed" ended in an error or cannot be read.
        reason: why it is not finished, in one line; empty where it is.
        seed: None where nothing tells it.
        curves: metric → (step, value), from logs/metrics.csv; the steps rise.
        updated: when it last noted something, in seconds since the epoch.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(repr=False)
    results: dict[str, Any] | None = field(repr=False)
    state: State
    reason: str
    seed: int | None
    curves: Curves = field(repr=False)
    updated: float = 0.0

    @property
    def explanations_path(self) -> Path | None:
        """results/explanations.npz, where the run has one."""
        path = self.path / "results" / "explanations.npz"
        return path if path.is_file() else None


class _BrokenError(Exception):
    """A file of a run that cannot be read; the message says which and why."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, sorted by folder.

    Args:
        paths: run folders, or experiment folders that hold some. What has no config.yaml is no run.

    Raises:
        UserError: no such folder, or no run in any of them.
    """
    folders: dict[Path, Path] = {}  # by resolved path: the same run may be named twice
    for path in paths:
        for folder in _run_folders(Path(path).expanduser()):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise UserError("no folder of runs was given")
    return [_read_run(folder) for folder in sorted(folders.values())]


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if (path / "config.yaml").exists():
        return [path]
    found = [config.parent for config in path.glob("*/config.yaml")]
    if not found:
        deeper = sorted({str(config.parent.parent) for config in path.glob("*/*/config.yaml")})
        hint = f"; did you mean {' or '.join(deeper[:3])}?" if deeper else ""
        raise UserError(f"{path}: no runs in it (a run's folder holds config.yaml){hint}")
    return found


def _read_run(folder: Path) -> Run:
    broken: list[str] = []

    def read(reader: Any, path: Path, default: Any) -> Any:
        """Read a file; where it is missing or broken, the default."""
        try:
            return reader(path) if path.exists() else default
        except _BrokenError as error:
            broken.append(f"{path.relative_to(folder)}: {error}")
            return default

    config = read(_read_config, folder / "config.yaml", {})
    results = read(_read_json, folder / "results" / "metrics.json", None)
    status = read(_read_json, folder / "results" / "status.json", None)
    curves = read(_read_curves, folder / "logs" / "metrics.csv", {})
    seed = next((value for value in (config.get("seed"), (results or {}).get("seed")) if type(value) is int), None)
    state, reason = _state(config, results, status, curves)
    if not broken:
        broken += [f"config.yaml: {problem}" for problem in _problems(config, seed)]
    if broken:
        state, reason = "failed", "; ".join(broken)
    return Run(folder, folder.name, config, results, state, reason, seed, curves, _updated(folder, status))


def _problems(config: dict[str, Any], seed: int | None) -> list[str]:
    """List what a comparison needs of the configuration and does not find."""
    model = _part(config, "model")
    attention, options = model.get("attention"), model.get("attention_options")
    specs = attention if isinstance(attention, list) else [attention]
    problems = ["holds no seed"] if seed is None else []
    if not specs or not all(isinstance(spec, str) and spec for spec in specs):
        problems.append(one_line(f"model.attention is {attention!r}"))
    if options is not None and not isinstance(options, dict):
        problems.append(one_line(f"model.attention_options is {options!r}"))
    return problems


def _state(
    config: dict[str, Any], results: dict[str, Any] | None, status: dict[str, Any] | None, curves: Curves
) -> tuple[State, str]:
    """Judge whether a run finished; the second is why not."""
    complete = results is not None and "steps" in results and isinstance(results.get("val"), dict)
    said = "finished" if complete else "running"  # by runs from before there was a status
    if status is not None:
        said = str(status.get("state"))
    if said == "failed":
        return "failed", one_line(str(status.get("error") or "failed without a message")) if status else ""
    if said == "finished":
        return ("finished", "") if complete else ("failed", "finished, but results/metrics.json lacks its scores")
    if said == "stopped" and status:
        return "unfinished", one_line(f"{_progress(config, curves)}: {status.get('error')}")
    if said == "running":
        return "unfinished", _progress(config, curves) + ": stopped, or still going on"
    return "failed", f"results/status.json: unknown state {said!r}"


def _progress(config: dict[str, Any], curves: Curves) -> str:
    """Say how far a run came."""
    steps = [points[-1][0] for points in curves.values() if points]
    if not steps:
        return "before the first logged step"
    trainer = _part(config, "trainer")
    most = trainer.get("max_steps")
    of = f" of {most}" if type(most) is int and most > 0 else ""
    epochs = [points[-1][1] for name, points in curves.items() if name == "epoch" and points]
    if epochs and math.isfinite(epochs[-1]) and trainer.get("max_epochs"):
        of += f", in epoch {int(epochs[-1]) + 1} of {trainer['max_epochs']}"
    return f"at step {max(steps) + 1}{of}"


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def _updated(folder: Path, status: dict[str, Any] | None) -> float:
    """When the run last noted something: by its own word, else by its files."""
    try:
        return datetime.fromisoformat(str((status or {}).get("updated"))).timestamp()
    except ValueError:
        files = (folder / "results" / "metrics.json", folder / "config.yaml")
        return next((file.stat().st_mtime for file in files if file.exists()), 0.0)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.load(path)
        # Written resolved: what is still an interpolation is not followed, it could read the environment.
        content = OmegaConf.to_container(config, resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise _BrokenError(one_line(error)[:200]) from error
    if not isinstance(content, dict):
        raise _BrokenError("holds no keys")
    return {str(key): value for key, value in content.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _BrokenError(one_line(error)[:200]) from error
    if not isinstance(content, dict):
        raise _BrokenError("holds no keys")
    return content


def _read_curves(path: Path) -> Curves:
    curves: Curves = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=2):
                if None in row or None in row.values():
                    raise _BrokenError(f"line {number} is cut short or too long")
                step = int(row.pop("step"))
                for name, text in row.items():
                    if text:
                        curves.setdefault(name, []).append((step, float(text)))
    except KeyError as error:
        raise _BrokenError(f"no column {error}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise _BrokenError(one_line(error)[:200]) from error
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}
