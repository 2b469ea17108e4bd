"""Configuration files: broken, of wrong types, deep, huge; a user's own, and those that a run left behind."""

import shutil

import yaml
from hypothesis import strategies as st
from playing import SMALL, assert_run_or_one_line, check_all, examples, files_below, play
from values import NESTED, PLAIN

_NAMES = st.sampled_from(
    [
        *("model", "data", "trainer", "optimizer", "loss", "callbacks", "lr_schedule", "seed", "run_name", "defaults"),
        *(
            "model.depth",
            "experiment_name",
            "experiments_dir",
            "hydra",
            "logger",
            "nope",
            "<<",
            "_target_",
            "overwrite",
        ),
    ]
)
_DEEP = "a: " + "[" * 3000 + "]" * 3000
ALIASES = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40))
YAML = st.one_of(
    st.dictionaries(_NAMES, NESTED, max_size=4).map(lambda content: yaml.safe_dump(content, allow_unicode=True)),
    st.builds("{}: {}".format, _NAMES, st.text(max_size=20)),
    st.text(max_size=60),
    st.sampled_from(
        [
            *(
                "a: [1",
                "a: 'b",
                "a:\n\tb",
                "a: b: c",
                "- 1\n- 2",
                "3",
                "null",
                "",
                "%YAML 9",
                "a: *nope",
                "a: !!nope x",
            ),
            *(
                "a: !!python/object/apply:os.system ['false']",
                "? [a]\n: b",
                "a: 1\na: 2",
                "\0",
                "\x1b[31m",
                "---\n---\n",
            ),
            *("seed: 0x", "seed: 1e400", "seed: 2001-01-01", "run_name: 2001-01-01", "model: {depth: ???}", "true: 1"),
            *("defaults: [nope]", "defaults: 3", "defaults: [{model: nope}]", "defaults: [{override /model: x}]"),
            *("x: ${y}\ny: ${x}", "x: ${oc.env:NO_SUCH}", "x: ${", "model: ${data}", "hydra: 1", "hydra: {run: 3}"),
            *(_DEEP, ALIASES.decode(), "a: " + "x" * 10**6, "\n".join(f"k{n}: {n}" for n in range(20000))),
        ]
    ),
)
BYTES = st.one_of(YAML.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=60))


@examples(short=5, long=80)
def test_an_experiment_of_the_users_own_is_a_run_or_one_line(many, place):
    def check(content):
        folder = place()
        (folder / "mine" / "experiment").mkdir(parents=True)
        (folder / "mine" / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + content)
        before = files_below(folder)
        done = play("train", f"--config-dir={folder / 'mine'}", *SMALL, "experiment=mine")
        assert_run_or_one_line(done, folder, before)

    check_all(many, check, BYTES)


LEFT_BEHIND = st.sampled_from(
    [
        *("config.yaml", "logs/metrics.csv", "results/status.json", "results/metrics.json"),
        *("results/skipped_batches.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "logs/train.log"),
    ]
)
TEXT_FILES = st.one_of(
    BYTES,
    st.sampled_from(
        [
            *(
                b"{",
                b"[]",
                b"[1]",
                b'{"state": 3}',
                b'[{"epoch": "x", "batch": 0}]',
                b'[{"epoch": 0}]',
                b"step\n1,2,3\n",
            ),
            *(
                b"step,epoch\nx,y\n",
                b"step\n99999999999999999999\n",
                b"\xff\xfe",
                b'"' * 200000,
                b"[" * 100000,
                b"1e999",
            ),
        ]
    ),
    PLAIN.map(lambda value: repr(value).encode("utf-8", "surrogatepass")),
)


@examples(short=4, long=70)
def test_a_run_whose_files_somebody_has_changed_goes_on_or_is_one_line(many, place, tmp_path_factory, train_in):
    """With the same command. What it refuses, it leaves as it is; broken checkpoints may be set aside by name."""
    whole = train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine").root
    settings = (*SMALL, "run_name=mine")

    def check(given):
        name, content = given
        folder = place()
        shutil.copytree(whole, folder / "experiments" / "default" / "mine")
        (folder / "experiments" / "default" / "mine" / name).write_bytes(content)
        done = play("train", *settings)
        assert "Traceback" not in done.out + done.err, done
        if done.status:
            assert_run_or_one_line(done, folder, files_below(folder))

    check_all(many, check, st.tuples(LEFT_BEHIND, TEXT_FILES))


@examples(short=4, long=70)
def test_a_report_of_changed_runs_is_a_page_or_one_line(many, place, tmp_path_factory, train_in):
    from vit_attn.report.__main__ import main

    whole = train_in(tmp_path_factory.mktemp("run"), *SMALL, "run_name=mine").root
    statuses = []

    def check(given):
        name, content = given
        folder = place()
        shutil.copytree(whole, folder / "runs" / "mine")
        (folder / "runs" / "mine" / name).write_bytes(content)
        done = play("report", main=lambda: statuses.append(main([str(folder / "runs")])))
        assert "Traceback" not in done.out + done.err, done
        assert (done.status, statuses[-1]) in ((0, 0), (0, 2)), done

    check_all(many, check, st.tuples(LEFT_BEHIND, TEXT_FILES))
