"""Generated bad input: a command is played in this process, and must end in a whole run or in one clear line.

Each property is tested twice: on a few inputs that are always the same, in every run of the tests, and on many that
differ each time, with ``pytest -m fuzz``; there, ``--hypothesis-seed`` repeats what a failure prints.
"""

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).parent.parent.parent
SECONDS = 60  # none of these inputs is worth more: what takes longer hangs
LONGEST = 1100  # characters of the one line
# What the machine or the training did wrong, not the input: then a run folder says so.
AMID_A_RUN = ("not finite", "out of memory", "cannot be written", "diverges")
# As small as a run can be, and bounded in steps and in epochs, so that either may be changed.
SMALL = (
    *("data=digits", "trainer=cpu", "logger=none", "model.depth=2", "model.embed_dim=32", "model.num_heads=2"),
    *("trainer.max_epochs=1", "trainer.max_steps=2", "trainer.log_every_n_steps=1", "explain_images=0", "test=false"),
    *("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1"),
    *("data.batch_size=8", "data.eval_batch_size=8", "callbacks.attention_probe.num_images=2"),
)


def examples(short: int, long: int) -> Any:
    """Parametrize a test with ``many``: how many inputs to try."""
    return pytest.mark.parametrize(
        "many", [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.fuzz)]
    )


def check_all(many: int, check: Callable[[Any], None], inputs: Any) -> None:
    """Call ``check`` on each of ``many`` generated inputs; the short runs are the same each time."""
    always_same = many <= 60

    @settings(
        max_examples=many,
        deadline=None,
        phases=[Phase.generate],  # the inputs are small, and a smaller one takes minutes to find
        database=None,
        derandomize=always_same,
        print_blob=not always_same,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def on_one(given_input: Any) -> None:
        check(given_input)

    on_one()


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


class TooLongError(BaseException):  # no library's `except Exception` may swallow it
    """A command that did not come back."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise :class:`TooLongError` inside, once this many seconds have passed."""

    def ring(signum: int, frame: Any) -> None:
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def streams() -> Iterator[tuple[Any, Any]]:
    """Stand-ins for stdout and stderr, as strict about what can be encoded as those of a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def _main(program: str) -> Callable[[], object]:
    if program == "explain":
        from vit_attn.explain.__main__ import main

        return main
    spec = importlib.util.spec_from_file_location(program, ROOT / f"{program}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def play(program: str, *arguments: str, main: Callable[[], object] | None = None) -> Done:
    """Run a command of the project in this process; what is raised goes on."""
    from vit_attn.console import run_command

    argv, environment, folder = sys.argv, dict(os.environ), Path.cwd()
    sys.argv = [str(ROOT / f"{program}.py"), *arguments]
    try:
        with streams() as (out, err), time_limit(SECONDS):
            try:
                status = run_command(main or _main(program))
            except SystemExit as ended:
                if isinstance(ended.code, str):
                    print(ended.code, file=sys.stderr)
                status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
    return Done(status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def files_below(folder: Path) -> dict[str, bytes]:
    """Path → content of every file, and every empty folder."""
    found = {}
    for path, folders, files in os.walk(os.fsencode(folder)):
        for name in files:
            file = os.path.join(path, name)
            if not name.endswith(b".lock"):
                found[os.fsdecode(file)] = Path(os.fsdecode(file)).read_bytes() if os.path.isfile(file) else b""
        if not files and not folders:
            found[os.fsdecode(path)] = b""
    return found


def assert_one_line(done: Done) -> None:
    """Exit status 2, and one line of moderate length that a terminal can show as it is."""
    assert done.status == 2, done
    assert done.err.startswith("error: "), done
    assert done.err.endswith("\n"), done
    line = done.err[:-1]
    assert line.isprintable(), done
    assert len(line) <= LONGEST, done
    assert len(line) > len("error: ") + 5, done


def assert_run_or_one_line(done: Done, folder: Path, before: dict[str, bytes]) -> None:
    """A whole run, or one line and nothing new in ``folder``, which held ``before``."""
    assert "Traceback" not in done.out + done.err, done
    after = files_below(folder)
    if done.status == 0:
        assert "error" not in done.err.lower(), done
        states = [json.loads(text)["state"] for path, text in after.items() if path.endswith("/status.json")]
        assert set(states) <= {"finished"}, done
        return
    assert_one_line(done)
    if any(words in done.err for words in AMID_A_RUN):
        states = [json.loads(text)["state"] for path, text in after.items() if path.endswith("/status.json")]
        assert set(states) <= {"failed"}, done
        return
    assert after == before, (done, sorted(set(after) ^ set(before)))
