"""``evaluate`` against scores worked out with numpy and scikit-learn from logits that the tests compute themselves."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score
from torch.nn import functional as F

from vit_attn.attention import entmax15
from vit_attn.data.digits import Digits
from vit_attn.errors import UserError
from vit_attn.models import create_vit
from vit_attn.training.restore import find_checkpoint

LEARNS = (
    *("trainer.max_epochs=3", "optimizer.lr=1e-2", "data.batch_size=32", "data.augment.crop=none"),
    *("model.patch_size=8", "model.global_pool=avg"),
)
RUNS = {
    "plain": ["model.attention=strided"],
    "everything": [
        *("model.attention=entmax", "model.attention_options.learnable_alpha=true", "loss=entmax15"),
        *("callbacks.ema.enabled=true", "callbacks.ema.decay=0.9", "data.augment.mixup=0.2"),
    ],
}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
SIZES |= {"global_pool": "avg"}
MODELS = {
    "plain": {"attention": "strided"},
    "everything": {"attention": "entmax", "attention_options": {"learnable_alpha": True}},
}


@pytest.fixture(scope="module")
def runs(train_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return {name: train_in(folder, *LEARNS, f"run_name={name}", *settings) for name, settings in RUNS.items()}


@pytest.fixture(scope="module")
def scored(runs, evaluate):
    """Results of evaluating each run, once."""
    return {name: evaluate(f"ckpt={run.root}") for name, run in runs.items()}


@pytest.fixture(scope="module")
def test_images():
    data = Digits()
    data.setup("test")
    return data.sample("test", 360)


def logits_by_hand(run, name, images):
    net = create_vit("vit_tiny_patch16_224", **SIZES, **MODELS[name]).eval()
    state = torch.load(run.best, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    with torch.no_grad():
        return net((images / 255 - 0.3123) / 0.3561)


def calibration_error(probabilities, labels, bins=15):
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[index == i].mean() - confidence[index == i].mean()) * (index == i).mean() for i in set(index)]
    return sum(gaps)


@pytest.mark.parametrize("name", RUNS)
def test_scores_are_those_of_the_logits(runs, scored, test_images, name):
    images, labels = test_images
    logits, labels = logits_by_hand(runs[name], name, images), labels.numpy()
    probabilities = (logits.softmax(1) if name == "plain" else entmax15(logits)).double().numpy()
    predicted, test = logits.argmax(1).numpy(), scored[name]["test"]
    assert test["acc"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert 0.3 < test["acc"] < 1  # something was learned, and something is left to get wrong
    assert test["per_class_acc"] == pytest.approx(recall_score(labels, predicted, average=None), abs=1e-6)
    assert test["top5"] == pytest.approx(top_k_accuracy_score(labels, logits.numpy(), k=5), abs=1e-6)
    assert test["confusion"] == confusion_matrix(labels, predicted).tolist()
    assert test["ece"] == pytest.approx(calibration_error(probabilities, labels), abs=1e-4)
    if name == "plain":
        loss = F.cross_entropy(logits, torch.from_numpy(labels))
        assert test["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_repeats_what_training_reported(runs, scored, name):
    reported, test = runs[name].results["test"], scored[name]["test"]
    assert test["confusion"] == reported["confusion"]
    for key in ("acc", "loss", "ece", "top5"):
        assert test[key] == pytest.approx(reported[key], abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_results_keep_what_training_wrote_and_name_the_data(runs, scored, name):
    written = json.loads((runs[name].root / "results" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(scored[name]))
    for key in ("val", "epochs", "steps", "speed"):
        assert written[key] == runs[name].results[key]
    assert written["data"]["num_images"] == {"test": 360}
    assert written["test"]["images_per_second"] > 0
    assert written["run"] == name


def test_pictures_lie_beside_the_results(runs, scored):
    results = runs["plain"].root / "results"
    drawn = ["confusion.png", "reliability.png", "attention/layer_00_test.png", "attention/mask_strided.png"]
    for name in drawn:
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    assert (results / "attention" / "layer_00.png").exists()  # training's own


def test_explanations_come_with_the_evaluation_where_they_are_asked_for(runs, scored, evaluate, tmp_path):
    assert "explanations" not in scored["plain"]
    found = evaluate(f"ckpt={runs['plain'].root}", f"output={tmp_path}", "explain=true", "explain_images=3")
    assert found["explanations"]["images"] == 3
    assert len(found["explanations"]["receptive_field"]) == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["explanations"] == found["explanations"]
    assert (tmp_path / "explanations" / "methods.png").exists()
    assert found["test"]["confusion"] == scored["plain"]["test"]["confusion"]
    assert found["attention_statistics"]["0"]["distance"] > 0


def test_the_split_of_batches_changes_nothing(runs, scored, evaluate, tmp_path):
    other = evaluate(f"ckpt={runs['plain'].best}", f"output={tmp_path}", eval_batch_size=7)
    assert other["test"]["confusion"] == scored["plain"]["test"]["confusion"]
    assert other["test"]["loss"] == pytest.approx(scored["plain"]["test"]["loss"], abs=1e-5)
    assert (tmp_path / "metrics.json").exists()


@pytest.fixture
def digits_on_disk(tmp_path, test_images):
    """The digits' test split as an image folder, 0 to 9; ``rename`` gives a class another name."""

    def make(rename=str, count=360):
        root = tmp_path / "images"
        for number, (image, label) in enumerate(zip(*test_images, strict=True)):
            if number < count:
                folder = root / "test" / rename(label.item())
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
        (root / "train").symlink_to(root / "test")  # asked for, although nothing is trained
        return root

    return make


def test_other_data_with_the_same_classes_lands_in_a_folder_of_its_own(runs, scored, evaluate, digits_on_disk):
    root, results = digits_on_disk(), runs["plain"].root / "results"
    before = (results / "metrics.json").read_bytes()
    other = evaluate(f"ckpt={runs['plain'].root}", "data=imagefolder", f"data.root={root}")
    # Lossless copies of the same images, with the size and the normalization of the checkpoint: the same scores.
    assert other["test"]["confusion"] == scored["plain"]["test"]["confusion"]
    assert other["data"]["mean"] == pytest.approx([0.3123] * 3)
    assert (results / "metrics.json").read_bytes() == before
    assert json.loads((results / "other_data" / "metrics.json").read_text())["test"]["acc"] == other["test"]["acc"]
    assert "val" not in other
    assert (results / "other_data" / "confusion.png").exists()


@pytest.mark.parametrize(
    ("rename", "count", "said"),
    [
        (lambda digit: f"class{digit}", 360, r"10 classes \(class0, class1, class2, …\)"),
        (lambda digit: str(digit % 4), 360, r"4 classes \(0, 1, 2, …\).*trained on 10 \(0, 1, 2, …\)"),
    ],
    ids=["names", "number"],
)
def test_other_classes_are_refused(runs, evaluate, digits_on_disk, rename, count, said):
    with pytest.raises(UserError, match=said):
        evaluate(f"ckpt={runs['plain'].root}", "data=imagefolder", f"data.root={digits_on_disk(rename, count)}")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["state_dict", "vit_attn", "extra"])
def test_a_checkpoint_with_code_is_refused_and_its_code_never_runs(runs, evaluate, tmp_path, where):
    checkpoint = torch.load(runs["plain"].best, weights_only=True)
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    torch.save(checkpoint | {where: Payload(marker)}, path)
    with pytest.raises(UserError, match=rf"checkpoint {path}: refused, it holds more than plain data"):
        evaluate(f"ckpt={path}")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload was a live one
    assert marker.exists()


def truncated(source, path):
    path.write_bytes(source.read_bytes()[:-1000])


def text(source, path):
    path.write_text("no checkpoint at all")


def empty(source, path):
    path.touch()


def foreign(source, path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)


def without_a_layer(source, path):
    checkpoint = torch.load(source, weights_only=True)
    del checkpoint["state_dict"]["net.blocks.1.attn.qkv.weight"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        *((truncated, "cannot be read"), (text, "cannot be read"), (empty, "cannot be read")),
        *(
            (foreign, r"not made by vit_attn's train\.py"),
            (without_a_layer, r"do not fit .*blocks\.1\.attn\.qkv\.weight"),
        ),
    ],
)
def test_a_spoilt_checkpoint_is_refused(runs, evaluate, tmp_path, spoil, said):
    path = tmp_path / "spoilt.ckpt"
    spoil(runs["plain"].best, path)
    with pytest.raises(UserError, match=said):
        evaluate(f"ckpt={path}", f"output={tmp_path}")


@pytest.mark.parametrize(
    ("overrides", "data", "said"),
    [
        (["layers=[0,7]"], {}, "layers 0 to 1"),
        (["accelerator=tpu"], {}, "accelerator=tpu: one of auto, cpu, gpu"),
        (["explain=some"], {}, "explain must be true or false, not 'some'"),
        (["explain_images=0"], {}, "explain_images"),
        ([], {"batchsize": 3}, r"data\.batchsize.*data\.batch_size"),
    ],
)
def test_a_wrong_setting_is_refused(runs, evaluate, tmp_path, overrides, data, said):
    with pytest.raises(UserError, match=said):
        evaluate(f"ckpt={runs['plain'].root}", f"output={tmp_path}", *overrides, **data)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.class_token=false", "model.global_pool=avg"],
        ["model.reg_tokens=2"],
        ["model.pos_embed=sinusoidal", "+model.qk_norm=true"],
        ["model.attention=[strided,entmax+fixed]", "model.attention_options.window=4", "model.init_values=0.1"],
        ["loss=sparsemax", "data.image_size=24", "data.mean=[0.1,0.2,0.3]", "model.name=vit_small_patch16_224"],
    ],
    ids=" ".join,
)
def test_every_kind_of_model_goes_on_and_is_rebuilt(train, no_pictures, evaluate, settings):
    settings = ["run_name=kind", "trainer.limit_train_batches=2", "model.patch_size=8", *settings]
    run = train(*settings)
    assert train(*settings).results["test"] == run.results["test"]
    assert evaluate(f"ckpt={run.root}")["test"]["loss"] == pytest.approx(run.results["test"]["loss"], abs=1e-6)


def test_a_folder_means_its_best_checkpoint_else_its_last(runs, tmp_path):
    root = runs["plain"].root
    assert find_checkpoint(str(root)) == (root / "checkpoints" / "best.ckpt", root / "results")
    assert find_checkpoint(str(root / "checkpoints" / "last.ckpt")) == (
        root / "checkpoints" / "last.ckpt",
        root / "results",
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint(str(tmp_path)) == (tmp_path / "checkpoints" / "last.ckpt", tmp_path / "results")
    loose = tmp_path / "loose.ckpt"
    loose.touch()
    assert find_checkpoint(str(loose)) == (loose, tmp_path / "results")
    for nothing in (tmp_path / "none", tmp_path / "none.ckpt", tmp_path.parent):
        with pytest.raises(UserError, match=f"ckpt={nothing}: no "):
            find_checkpoint(str(nothing))
