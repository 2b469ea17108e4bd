"""Every test stays offline and leaves the process as it was; runs are composed from the real configuration, tiny."""

import importlib.util
import logging
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
# Two small layers, the digits, no explanations, no pictures but the last ones.
TINY = (
    *("data=digits", "trainer=cpu", "logger=none", "model.depth=2", "model.embed_dim=32", "model.num_heads=2"),
    *("trainer.max_epochs=1", "trainer.log_every_n_steps=1", "callbacks.attention_probe.pictures_every_n_epochs=1000"),
    "explain_images=0",
)


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path_factory):
    """W&B finds no login, so that it stays offline unless a test says otherwise."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path_factory.getbasetemp() / "netrc"
    empty.touch()
    monkeypatch.setenv("NETRC", str(empty))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@contextmanager
def log_as_before():
    """Take away the handlers that a run adds to the project's log."""
    log = logging.getLogger("vit_attn")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    try:
        yield
    finally:
        for handler in [handler for handler in log.handlers if handler not in handlers]:
            log.removeHandler(handler)
            handler.close()
        log.level, log.propagate = level, propagate


@pytest.fixture(autouse=True)
def _log_as_before():
    with log_as_before():
        yield


_faults: dict[str, list[int]] = {}  # what was done to runs → how often, and how often nothing was lost


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what the tests marked ``faults`` have tried: each once, or what it says under "tried"."""
    properties = dict(report.user_properties)
    if report.when == "call" and "fault" in properties and not report.skipped:
        counts = _faults.setdefault(properties["fault"], [0, 0])
        tried = properties.get("tried", 1)
        counts[0] += tried
        counts[1] += tried if report.passed else 0


@pytest.fixture(autouse=True)
def _name_the_fault(request, record_property):
    marker = request.node.get_closest_marker("faults")
    if marker is not None:
        record_property("fault", marker.args[0])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table that `make test-faults` is for."""
    if _faults:
        terminalreporter.section("faults: what was done to runs, and what survived")
        width = max(map(len, _faults))
        terminalreporter.write_line(f"{'fault':{width}}  tried  nothing lost")
        for what, (tried, survived) in sorted(_faults.items()):
            terminalreporter.write_line(f"{what:{width}}  {tried:5}  {survived:12}")
        tried, survived = (sum(counts) for counts in zip(*_faults.values(), strict=True))
        terminalreporter.write_line(f"{'all':{width}}  {tried:5}  {survived:12}")


@dataclass
class Run:
    """What a training left behind."""

    root: Path
    config: Any
    results: dict[str, Any]

    @property
    def best(self) -> Path:
        return self.root / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.root / "checkpoints" / "last.ckpt"


def compose_config(*overrides: str, name: str = "config") -> Any:
    """The real configuration with ``overrides``."""
    from hydra import compose, initialize_config_dir

    import vit_attn.config  # noqa: F401  # registers the resolver of run names

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def run_train(folder: Path, *overrides: str) -> Run:
    """Train in this process, in ``folder``."""
    from vit_attn.training.run import train

    logging.getLogger("vit_attn").setLevel(logging.INFO)  # as the command sets it
    config = compose_config(*TINY, f"experiments_dir={folder}", *overrides)
    with log_as_before():  # a module's fixture outlives the test that asks for it first
        results = train(config)
    return Run(folder / config.experiment_name / config.run_name, config, results)


def run_evaluate(*overrides: str, **data: Any) -> dict[str, Any]:
    """Evaluate in this process; ``data`` are changes to the data of the checkpoint."""
    from vit_attn.training.evaluation import evaluate

    return evaluate(compose_config("accelerator=cpu", *overrides, name="evaluate"), data)


@pytest.fixture(scope="session")
def compose() -> Any:
    """``compose(*overrides, name="config")``."""
    return compose_config


@pytest.fixture(scope="session")
def train_in() -> Any:
    """``train_in(folder, *overrides)`` → :class:`Run`."""
    return run_train


@pytest.fixture
def train(tmp_path) -> Any:
    """``train(*overrides)`` → :class:`Run`, in the test's own folder."""
    return lambda *overrides: run_train(tmp_path / "runs", *overrides)


@pytest.fixture(scope="session")
def evaluate() -> Any:
    """``evaluate("ckpt=…", …, **data)`` → results."""
    return run_evaluate


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the final pictures and reports, for tests that train often and look at other things."""
    for module in ("vit_attn.training.run", "vit_attn.training.evaluation"):
        monkeypatch.setattr(f"{module}.write_panels", lambda *args, **kwargs: {})
        monkeypatch.setattr(f"{module}.write_masks", lambda *args, **kwargs: [])
    for name in ("confusion_figure", "reliability_figure"):
        monkeypatch.setattr(f"vit_attn.training.evaluation.{name}", lambda *args, **kwargs: None)
    monkeypatch.setattr("vit_attn.training.evaluation.save_figure", lambda figure, path: path)
    monkeypatch.setattr("vit_attn.report.write.write_report", lambda paths: paths[0] / "report" / "report.html")


def load_command(name: str) -> ModuleType:
    """train.py or evaluate.py as a module, fresh."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch, capsys) -> Any:
    """``command("train", *arguments)`` → status, out and err, as the command line gives them, in this process."""

    def run(name: str, *arguments: str) -> SimpleNamespace:
        from vit_attn.console import run_command

        module = load_command(name)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # run_command sets it for good
        monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # conf/ is then beside the file
        capsys.readouterr()
        status = run_command(module.main)
        streams = capsys.readouterr()
        return SimpleNamespace(status=status, out=streams.out, err=streams.err)

    return run


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """The overrides that make a run small."""
    return TINY
