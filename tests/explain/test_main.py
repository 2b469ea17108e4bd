"""``python -m vit_attn.explain`` as a user runs it."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vit_attn.console import run_command
from vit_attn.explain.__main__ import main
from vit_attn.explain.explanations import METHODS, Explanations


@pytest.fixture(scope="module")
def run(train_in, tmp_path_factory):
    settings = ("run_name=mine", "model.attention=strided", "trainer.limit_train_batches=2", "model.patch_size=8")
    return train_in(tmp_path_factory.mktemp("explained"), *settings)


@pytest.fixture
def explain(monkeypatch, capsys):
    """``explain(*arguments)`` → status, out and err of the command line, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["explain", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        capsys.readouterr()
        status = run_command(main, resumes=False)
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return call


def test_test_images_are_explained_and_their_numbers_join_the_results(run, explain):
    before = json.loads((run.root / "results" / "metrics.json").read_text())
    done = explain(f"ckpt={run.root}", "images=5", "picture_images=2", "layers=[1]", "accelerator=cpu")
    assert done.status == 0
    results = run.root / "results"
    after = json.loads((results / "metrics.json").read_text())
    found = Explanations.load(results / "explanations.npz")
    shares = {name: after["explanations"].pop(name) for name in list(after["explanations"]) if "receptive" in name}
    assert after.pop("explanations") == found.summary()
    assert {key: value for key, value in before.items() if key != "explanations"} == after
    assert shares["receptive_field"][-1] == 1.0 > shares["receptive_field_without_relays"][-1]
    assert found.images.shape == (5, 32, 32, 3)
    assert found.grid_size == (4, 4)
    for path in (results / "explanations").glob("*.png"):
        assert f"picture    {path}" in done.out
    assert {path.stem for path in (results / "explanations").glob("*.png")} == {
        *("methods", "curves", "layers", "heads_layer_01", "receptive_field")
    }
    assert "random order" in done.out


def test_a_photograph_is_explained_with_its_classes(run, explain, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    results = (run.root / "results" / "metrics.json").read_bytes()
    done = explain(f"ckpt={run.root}", f"image={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}")
    assert done.status == 0
    folder = tmp_path / "out" / "explanations" / "photo"
    found = Explanations.load(folder / "explanations.npz")
    assert found.images.shape == (1, 32, 32, 3)
    assert found.labels.tolist() == [-1]
    lines = [line.split() for line in done.out.splitlines() if line.startswith("class ")]
    assert len(lines) == 5
    assert int(lines[0][1]) == found.predictions[0]
    assert float(lines[0][2]) == pytest.approx(100 * found.confidences[0], abs=0.01)
    assert all(f"picture    {folder / name}.png" in done.out for name in ("methods", "curves", "layers"))
    assert (run.root / "results" / "metrics.json").read_bytes() == results


def test_the_seed_orders_patches_by_chance(run, explain, tmp_path, monkeypatch):
    monkeypatch.setattr("vit_attn.explain.write.draw_images", lambda *args, **kwargs: [])
    curves = []
    for seed in (0, 0, 1):
        assert explain(f"ckpt={run.root}", f"output={tmp_path}", "images=2", f"seed={seed}").status == 0
        curves.append(Explanations.load(tmp_path / "explanations.npz"))
    assert np.array_equal(curves[0].deletion["random"], curves[1].deletion["random"])
    assert not np.array_equal(curves[0].deletion["random"], curves[2].deletion["random"])
    assert all(np.array_equal(curves[0].maps[method], curves[2].maps[method]) for method in METHODS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ckpt=<checkpoint or run folder> is missing"),
        (["ckpt=nowhere"], "nowhere: no such file or run folder"),
        (["ckpt=RUN", "image=none.jpg"], "cannot read image none.jpg: No such file"),
        (["ckpt=RUN", "image=RUN/config.yaml"], "config.yaml: not an image"),
        (["ckpt=RUN", "image=a.jpg", "data.batch_size=3"], "image= and data= exclude each other"),
        (["ckpt=RUN", "images=0"], "images"),
        (["ckpt=RUN", "imges=3"], "images"),
        (["ckpt=RUN", "layers=[2]"], "the model has layers 0 to 1"),
        (["ckpt=RUN", "layers=1"], "layers must be a list"),
        (["ckpt=RUN", "accelerator=tpu"], "one of auto, cpu, gpu"),
        (["ckpt=RUN", "data.batchsize=3"], "data.batch_size"),
        (["ckpt=RUN", "output=/proc/none"], "/proc/none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_changes_nothing(run, explain, arguments, said):
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    done = explain(*(argument.replace("RUN", str(run.root)) for argument in arguments))
    assert done.status == 2
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


def test_help_is_printed(explain):
    done = explain("--help")
    assert done.status == 0
    assert "image=photo.jpg" in done.out


def test_a_broken_checkpoint_is_named(explain, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    done = explain(f"ckpt={tmp_path / 'other.ckpt'}")
    assert done.status == 2
    assert "not made by vit_attn" in done.err
