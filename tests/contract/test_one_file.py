"""One mechanism, one file: without its file, a mechanism is unknown, and nothing but its own tests misses it."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vit_attn.attention import MECHANISMS, PATTERNS

ROOT = Path(__file__).parent.parent.parent
# Those that nothing else uses as an example.
NAMES = [*MECHANISMS, *(name for name, cls in PATTERNS.items() if cls.needs_grid)]
FILES = {
    name: Path(sys.modules[{**MECHANISMS, **PATTERNS}[name].__module__].__file__).relative_to(ROOT) for name in NAMES
}
PARTS = ("vit_attn", "conf", "tests", "hydra_plugins", "docs", "train.py", "evaluate.py", "pyproject.toml")


def copy_without(names: list[str], folder: Path) -> Path:
    """The project without the files of some mechanisms, and without their tests."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    for name in names:
        (folder / FILES[name]).unlink()
        (folder / "tests" / "attention" / f"test_{name}.py").unlink()
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


REST = """
    import sys

    import torch

    from vit_attn.attention import MECHANISMS, NORMALIZERS, PATTERNS, option_names, parse_spec
    from vit_attn.attention.__main__ import main as list_them
    from vit_attn.masks import main as draw_masks
    from vit_attn.models import create_vit
    from vit_attn.report.mechanisms import read_mechanism
    from vit_attn.training.check import check_config
    import vit_attn.bench.attention

    gone = sys.argv[1]
    names = [*MECHANISMS, *NORMALIZERS, *PATTERNS]
    assert gone not in names, names
    for name in names:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
        assert create_vit("vit_tiny_patch16_224", attention=name, **sizes)(torch.zeros(1, 3, 32, 32)).isfinite().all()
    assert list_them() == draw_masks(["--out", "masks"]) == 0
    assert read_mechanism({"attention": gone}) == (gone, {})  # a run of another version: taken as it is written
    try:
        parse_spec(gone)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("name", [*NAMES[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_rest_works_without_a_file(name, tmp_path):
    folder = copy_without([name], tmp_path)
    (folder / "rest.py").write_text(textwrap.dedent(REST))
    done = python(folder, "rest.py", name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"unknown attention '{name}'")
    composed = python(folder, "train.py", f"model.attention={name}", "data=digits", "logger=none")
    assert composed.returncode == 2
    assert re.match(
        rf"error: unknown attention '{name}'\..* Allowed: [a-z0-9_, ]+\. Or normalizer\+pattern\.\n", composed.stderr
    )


@pytest.mark.slow
def test_no_test_but_their_own_misses_them(tmp_path):
    folder = copy_without(NAMES, tmp_path)
    places = (
        "attention",
        "contract",
        "bench",
        "explain",
        "report",
        "test_masks.py",
        "test_config.py",
        "test_models.py",
    )
    chosen = [f"tests/{place}" for place in places]
    options = ("-p", "no:cacheprovider", "-n", "2", "-m", "not slow", "--deselect", "tests/contract/test_one_file.py")
    done = python(folder, "-m", "pytest", *options, *chosen)
    assert done.returncode == 0, done.stdout[-3000:]
