"""Names of runs, folders, files and classes: blanks, Unicode, "=", leading dashes, "..", long ones."""

from pathlib import Path

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from playing import SMALL, assert_run_or_one_line, check_all, examples, files_below, play
from test_any_images import FOLDER, encoded, image_folder
from values import quoted

NAMES = st.one_of(
    st.text(min_size=1, max_size=20),
    st.text(alphabet="ab =-._~$'\"\\(){}[],:;*?!@#%&+é日🦉\u202e\u0301\t", min_size=1, max_size=15),
    st.sampled_from(
        [
            *("a b", " a", "a ", "a=b", "=a", "-a", "--help", ".", "..", "...", ".a", "../up", "/abs", "a/b", "a//b"),
            *(
                "~",
                "~root",
                "~nobody/x",
                "é",
                "e\u0301",
                "日本語",
                "🦉",
                "\u202eabc",
                "a\nb",
                "a\tb",
                "\x1b[31mred",
                "\x7f",
            ),
            *("a" * 200, "a" * 201, "a" * 256, "é" * 150, "a" * 5000, "a\\b", "C:", "con", "nul", "$HOME", "${seed}"),
            *(
                "report",
                "checkpoints",
                "'",
                '"',
                "a'b",
                "x$_y$",
                "$\\frac",
                "[/bold]",
                "[red]",
                "%s%n",
                "{}",
                "a,b",
                "*",
            ),
        ]
    ),
)


@examples(short=5, long=80)
def test_a_run_of_any_name(many, place):
    """Where it is a run, it is in a folder of that name, below experiments_dir, and the same command finds it again."""

    def check(given):
        key, name = given
        assume("\0" not in name)
        assume(key != "experiments_dir" or not name.startswith(("/", "~")))  # a place outside of this folder, as asked
        folder = place()
        (folder / "outside").mkdir()
        before = files_below(folder)
        settings = [*SMALL, f"{key}={quoted(name)}"]
        done = play("train", *settings)
        assert_run_or_one_line(done, folder, before)
        made = list(folder.rglob("config.yaml"))
        if done.status == 0:
            assert len(made) == 1
            if key != "experiments_dir":
                assert made[0].parent.parent.parent == folder / "experiments"
                assert name in made[0].parts[-3:-1] or name == "${seed}"  # which is a reference

    check_all(many, check, st.tuples(st.sampled_from(["run_name", "experiment_name", "experiments_dir"]), NAMES))


@examples(short=3, long=70)
def test_classes_and_files_of_any_name(many, place):
    def check(given):
        first, second, file = given
        names = [name for name in (first, second, file) if "/" in name or "\0" in name or name in (".", "..")]
        assume(not names and len({first, second}) == 2 and not first.startswith(".") and not second.startswith("."))
        assume(max(len(name.encode("utf-8", "surrogatepass")) for name in (first, second, file)) < 200)
        folder = place()
        try:
            image_folder(
                folder / "photos", encoded("PNG", "RGB", (16, 16), 9), classes=(first, second), name=f"{file}.png"
            )
        except (OSError, UnicodeEncodeError):
            assume(False)
        before = files_below(folder)
        done = play("train", *FOLDER, "data.root=photos", "run_name=mine")
        assert_run_or_one_line(done, folder, before)
        if done.status == 0:
            done = play("evaluate", "ckpt=experiments/default/mine", "accelerator=cpu", "attention_images=1")
            assert done.status == 0, done

    check_all(many, check, st.tuples(NAMES, NAMES, NAMES))


@examples(short=4, long=70)
def test_paths_of_any_name(many, place, run):
    def check(given):
        key, name = given
        assume("\0" not in name)
        folder = place()
        program, *others = {
            "ckpt": ("evaluate",),
            "output": ("evaluate", f"ckpt={run.best}"),
            "image": ("explain", f"ckpt={run.best}", "output=out"),
            "data.root": ("train", *FOLDER),
            "model.weights": ("train", *SMALL),
        }[key]
        others += ["accelerator=cpu"] if program != "train" else []
        others += ["attention_images=1"] if program == "evaluate" else []
        done = play(program, *others, f"{key}={quoted(name)}")
        assert_run_or_one_line(done, folder, {str(folder): b""})
        strangers = [path for path in Path(folder).parent.iterdir() if path != folder]
        assert strangers == []

    keys = st.sampled_from(["ckpt", "output", "image", "data.root", "model.weights"])
    inside = NAMES.filter(lambda name: not name.startswith(("/", "~", "..")))  # elsewhere is allowed, but not tidy here
    check_all(many, check, st.tuples(keys, inside))


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_in):
    return train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine")
