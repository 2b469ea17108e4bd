"""Checkpoints: flipped, cut, random, with code in them, and whole ones that say something else than they should."""

import copy
import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from hypothesis import strategies as st
from playing import SMALL, assert_one_line, assert_run_or_one_line, check_all, examples, files_below, play
from values import NESTED

EVALUATE = ("accelerator=cpu", "output=out", "attention_images=1", "picture_images=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_in):
    return train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine")


def _flip(content: bytes, place: float, mask: int) -> bytes:
    index = int(place * (len(content) - 1))
    return content[:index] + bytes([content[index] ^ mask]) + content[index + 1 :]


PLACES = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
    st.tuples(st.just("cut"), PLACES, st.just(0)),
    st.tuples(st.just("zeros"), PLACES, st.integers(1, 5000)),
    st.tuples(st.just("append"), PLACES, st.integers(1, 5000)),
    st.tuples(st.just("random"), PLACES, st.integers(0, 300)),
    st.tuples(st.just("twice"), PLACES, st.just(0)),
)


def damage(content: bytes, kind: str, place: float, number: int) -> bytes:
    at = int(place * len(content))
    if kind == "flip":
        return _flip(content, place, number)
    if kind == "zeros":
        return content[:at] + bytes(number) + content[at + number :]
    if kind == "append":
        return content + content[at : at + number]
    if kind == "random":
        return content[:number] + os.urandom(number)
    return content[:at] if kind == "cut" else content[:at] + content


@examples(short=5, long=80)
def test_a_damaged_checkpoint_is_scored_as_it_was_or_refused(many, place, run):
    scores = []

    def check(given):
        folder = place()
        (folder / "x.ckpt").write_bytes(damage(run.best.read_bytes(), *given))
        before = files_below(folder)
        done = play("evaluate", "ckpt=x.ckpt", *EVALUATE)
        assert_run_or_one_line(done, folder, before)
        if done.status == 0:  # such as bytes between the parts of the archive
            scores.append(folder)

    check_all(many, check, DAMAGE)


@examples(short=3, long=70)
def test_a_run_goes_on_from_what_is_whole(many, place, run):
    """``last.ckpt`` damaged: the one before it is used, or the run starts anew; it never ends in a traceback."""
    settings = (*(setting for setting in SMALL if "max_" not in setting), "trainer.max_epochs=2", "run_name=mine")

    def check(given):
        folder = place()
        root = folder / "experiments" / "default" / "mine"
        shutil.copytree(run.root, root)
        (root / "checkpoints" / "last.ckpt").write_bytes(damage(run.last.read_bytes(), *given))
        done = play("train", *settings)
        assert "Traceback" not in done.out + done.err, done
        assert done.status == 0, done
        assert (root / "results" / "metrics.json").exists()

    check_all(many, check, DAMAGE)


# What a whole checkpoint says: one entry taken out, or put in another's place

KEYS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


def change(checkpoint: dict, where: list[int], value: object, *, below: str | None) -> dict:
    """Go down from key to key by ``where``, and put ``value`` there; None takes the entry out."""
    changed = copy.deepcopy(checkpoint)
    node = changed if below is None else changed[below]
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return changed
        key, where = keys[where[0] % len(keys)], where[1:]
        inner = node[key]
        if not where or not isinstance(inner, dict | list):
            break
        node = inner
    if value is None:
        del node[key]
    else:
        node[key] = value
    return changed


OTHER = st.one_of(
    NESTED,
    st.sampled_from(
        [
            *("${oc.env:HOME}", "os.system", "vit_attn.data.digits.Digits", "../../up", "/etc/passwd", float("nan")),
            *({"_target_": "os.system", "command": "false"}, [1e308], -1, 0, 10**12, "$x_", "[/bold]", "\x1b[31m"),
            *(torch.zeros(0), torch.zeros(1, 2, 3), torch.full((4,), float("nan")), torch.tensor(b"x"[0])),
        ]
    ),
)


@examples(short=6, long=80)
def test_a_checkpoint_that_says_something_else_is_scored_or_refused(many, place, run):
    whole = torch.load(run.best, weights_only=True)

    def check(given):
        where, value, below = given
        folder = place()
        torch.save(change(whole, where, value, below=below), folder / "x.ckpt")
        before = files_below(folder)
        done = play("evaluate", "ckpt=x.ckpt", *EVALUATE)
        assert_run_or_one_line(done, folder, before)

    check_all(many, check, st.tuples(KEYS, OTHER, st.sampled_from([None, "vit_attn", "vit_attn", "state_dict"])))


@examples(short=4, long=70)
def test_a_run_whose_last_checkpoint_says_something_else_goes_on_or_is_one_line(many, place, run):
    whole = torch.load(run.last, weights_only=True)
    settings = (*(setting for setting in SMALL if "max_" not in setting), "trainer.max_epochs=2", "run_name=mine")

    def check(given):
        where, value = given
        folder = place()
        root = folder / "experiments" / "default" / "mine"
        shutil.copytree(run.root, root)
        torch.save(change(whole, where, value, below=None), root / "checkpoints" / "last.ckpt")
        done = play("train", *settings)
        assert "Traceback" not in done.out + done.err, done
        if done.status:
            assert_one_line(done)

    check_all(many, check, st.tuples(KEYS, OTHER))


# Code


class Payload:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def _pickled(protocol: int) -> bytes:
    return pickle.dumps({"state_dict": Payload(), "vit_attn": {}}, protocol=protocol)


def _zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


@pytest.mark.parametrize("wrap", [bytes, _zipped], ids=["bare", "zipped"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("program", ["evaluate", "weights", "resume"])
def test_code_in_a_file_is_never_run(place, run, program, protocol, wrap):
    folder = place()
    content = wrap(_pickled(protocol))
    if program == "resume":
        root = folder / "experiments" / "default" / "mine"
        shutil.copytree(run.root, root)
        for name in ("last.ckpt", "best.ckpt"):
            (root / "checkpoints" / name).write_bytes(content)
        play("train", *SMALL, "run_name=mine")
    else:
        (folder / "x.ckpt").write_bytes(content)
        arguments = ("ckpt=x.ckpt", *EVALUATE) if program == "evaluate" else (*SMALL, "model.weights=x.ckpt")
        done = play("evaluate" if program == "evaluate" else "train", *arguments)
        assert_one_line(done)
    assert not (folder / "owned").exists()
    pickle.loads(_pickled(protocol))  # noqa: S301  # the payload is a live one
    assert (folder / "owned").exists()
