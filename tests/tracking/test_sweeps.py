"""conf/sweep/*.yaml, judged by W&B's own search: valid, and each proposed run is one that train.py takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vit_attn.config import plain

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "conf" / "sweep").glob("*.yaml"))
RUNS = {"alpha": 6, "mechanisms": 27, "window": 12, "window_stride": 16}


@pytest.fixture(scope="module")
def sweeps_python(tmp_path_factory):
    """An interpreter with the package `sweeps`, which needs an older numpy than ours."""
    folder = tmp_path_factory.mktemp("sweeps") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "sweeps==0.3.0", "numpy<2"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=500)
    if done.returncode:
        pytest.skip(f"pip cannot install the package sweeps here: {done.stderr.strip()[-200:]}")
    return str(python)


def test_every_sweep_file_is_known_to_these_tests():
    assert {path.stem for path in SWEEPS} == RUNS.keys()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_runs_train_py_and_aims_at_a_metric_that_is_logged(path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["command"] == ["${env}", "python", "${program}", "${args_no_hyphens}"]
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": "val/acc", "goal": "maximize"}


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_run_that_the_search_proposes_composes(path, sweeps_python, compose):
    script = str(Path(__file__).parent / "propose.py")
    done = subprocess.run([sweeps_python, script, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert len(runs) == RUNS[path.stem]
    names = set()
    for run in runs:
        # As ${args_no_hyphens} writes them.
        config = compose(*(f"{name}={value}" for name, value in run.items()))
        flat = plain(config)
        for name, value in run.items():
            if name in ("data", "trainer", "run_name"):
                continue
            node = flat
            for part in name.split("."):
                node = node[part]
            assert node == pytest.approx(value) if isinstance(value, float) else node == value, name
        names.add((flat["experiment_name"], flat["run_name"]))
    assert len(names) == len(runs)
