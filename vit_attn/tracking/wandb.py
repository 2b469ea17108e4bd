"""Start runs of Weights & Biases: online where that works, offline otherwise, and never with a question."""

import configparser
import hashlib
import logging
import netrc
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from vit_attn.config import without_secrets
from vit_attn.errors import UserError, one_line, unknown_name
from vit_attn.tracking.background import within
from vit_attn.tracking.wandb_run import CHECKPOINTS, STEP, WandbRunLogger, sync_command, tear_down

log = logging.getLogger("vit_attn")

MODES = ("online", "offline", "disabled")
# An answer of any kind within this time, and the service is there. Then this long for the start of a run.
_ANSWER_SECONDS, _START_SECONDS = 3, 20
_NAME, _TAG = 128, 64  # the service's limits, in characters

_current: WandbRunLogger | None = None
_data_dir: str | None = None


def wandb_mode(mode: str | None = None) -> str:
    """Decide between "online", where the user is logged in, and "offline", so that nothing asks a question.

    Raises:
        UserError: a mode that does not exist.
    """
    mode = mode or os.environ.get("WANDB_MODE") or None
    if mode is None:
        return "online" if _logged_in() else "offline"
    if mode not in MODES:
        raise UserError(unknown_name("logger.mode", mode, MODES))
    return mode


def checkpoint_choice(value: str | None) -> str:
    """Check which checkpoints are to be uploaded; null means none.

    Raises:
        UserError: not one of none, best, last and all.
    """
    if value is not None and value not in CHECKPOINTS:
        raise UserError(unknown_name("logger.log_checkpoints", str(value), CHECKPOINTS))
    return value or "none"


def wandb_logger(
    folder: Path,
    run_name: str,
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    mode: str | None,
    job_type: str | None = "train",
    log_checkpoints: str | None = "none",
    finish_timeout: float = 60,
) -> Logger:
    """Log to Weights & Biases, in logs/wandb. The same run folder is always the same W&B run.

    In a sweep, the run is the one that `wandb agent` has opened.

    Args:
        finish_timeout: seconds that uploading may take at the end of the run.

    Returns:
        A logger that does nothing where not even an offline run can be started.

    Raises:
        UserError: a mode or a choice of checkpoints that does not exist.
    """
    mode, checkpoints = wandb_mode(mode), checkpoint_choice(log_checkpoints)
    birth = (folder / "config.yaml").stat().st_mtime_ns  # tells it from an earlier run in a folder of the same name
    identity = hashlib.sha256(f"{folder.parent.name}/{run_name}/{birth}".encode()).hexdigest()[:12]
    where: dict[str, Any] = {"project": project, "entity": entity, "id": identity}
    if os.environ.get("WANDB_SWEEP_ID"):
        where = {}  # the agent's
    options = {"name": run_name, "group": group, "job_type": job_type, "tags": tags, "resume": "allow", **where}
    return _start(folder / "logs", mode, options, checkpoints, finish_timeout) or DummyLogger()


@rank_zero_only
def log_report(
    html: Path,
    files: Sequence[Path],
    *,
    experiment: str,
    project: str,
    entity: str | None,
    mode: str | None,
    finish_timeout: float = 60,
) -> None:
    """Show a report as a W&B run of its own, in the group of its experiment, with its files as an artifact.

    Raises:
        UserError: a mode that does not exist.
    """
    where = {"project": project, "entity": entity, "group": experiment}
    options = {"name": f"{experiment} report", "job_type": "report", "tags": ["report"], **where}
    logger = _start(html.parent, wandb_mode(mode), options, "none", finish_timeout)
    if logger is not None:
        logger.log_html("report", html)
        logger.log_files(f"report-{experiment}", "report", [html, *files])
        logger.finish(failed=False)


def _start(
    folder: Path, mode: str, options: dict[str, Any], checkpoints: str, finish_timeout: float
) -> WandbRunLogger | None:
    global _current
    # Nothing beyond the run itself goes over the network, and the one line that matters is ours.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    if _current is not None:
        _current.finish(failed=True)  # an earlier run of this process that nobody ended
    _keep_artifacts_in(folder / "wandb" / "artifacts")
    mode = _attainable(mode)
    options |= {"dir": folder, "reinit": "finish_previous"}
    options |= {key: options[key][:_NAME] for key in ("name", "group", "job_type") if options[key]}
    options["tags"] = list(dict.fromkeys(str(tag).strip()[:_TAG] for tag in _tags(options["tags"])))
    with _command_line_without_secrets():
        try:
            run = _init(mode, options, finish_timeout)
        except Exception as error:  # W&B's own, and what its parts raise
            tear_down()  # the failed attempt still holds the run's id
            log.warning("W&B        cannot be started (%s): this run is logged offline", one_line(error)[:200])
            try:
                run = _init("offline", options, finish_timeout)
            except Exception as again:
                log.warning("W&B        cannot be started offline either (%s)", one_line(again)[:200])
                return None
    _current = WandbRunLogger(run, checkpoints=checkpoints, finish_timeout=finish_timeout)
    _say_where(_current)
    return _current


def _init(mode: str, options: dict[str, Any], finish_timeout: float) -> Any:
    import wandb

    # Uncaught output: the log is in logs/train.log. No code, no diff.
    settings: dict[str, Any] = {"console": "off", "disable_code": True, "save_code": False, **_git()}
    settings |= {"init_timeout": _START_SECONDS, "finish_timeout": finish_timeout, "finish_timeout_raises": True}
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(**settings))  # type: ignore[arg-type]
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    # In the table of runs: val/acc.max, val/acc.last, val/loss.min. What a sweep aims at stands in its own file.
    run.define_metric("val/acc", step_metric=STEP, step_sync=True, summary="max,last")
    run.define_metric("val/loss", step_metric=STEP, step_sync=True, summary="min,last")
    return run


def _say_where(logger: WandbRunLogger) -> None:
    settings = logger.experiment.settings
    if settings.mode == "offline":
        log.info("W&B        offline; to upload it: %s", sync_command(logger.wandb_folder, online=False))
    else:
        log.info("W&B        %s%s", settings.mode, f": {logger.experiment.url}" if settings.mode == "online" else "")


def _attainable(mode: str) -> str:
    """Leave "online" where nobody is logged in or nobody answers: either would cost a question or a long wait."""
    if mode != "online":
        return mode
    if not _logged_in():
        log.warning("W&B        nobody is logged in (`wandb login`, or WANDB_API_KEY): this run is logged offline")
        return "offline"
    url = _base_url()
    why = _no_answer(url)
    if why is not None:
        log.warning("W&B        %s does not answer (%s): this run is logged offline", url, why)
        return "offline"
    return mode


def _no_answer(url: str) -> str | None:
    """Say why the service cannot be reached; None where it can, or where a proxy makes that hard to tell."""
    if set(urllib.request.getproxies()) - {"no"}:
        return None
    why: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except (OSError, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            # Certificates are W&B's own affair: it has settings for them.
            if not isinstance(cause, ssl.SSLError):
                why.append(one_line(str(cause))[:100])

    # Looking up a name knows no time limit of its own.
    if not within(_ANSWER_SECONDS + 1, ask):
        return f"no answer in {_ANSWER_SECONDS} s"
    return why[0] if why else None


def _base_url() -> str:
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        settings = configparser.ConfigParser(default_section="default", interpolation=None)
        folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
        try:
            settings.read(folder / "settings")  # where `wandb login --host` writes it
            url = settings.defaults().get("base_url")
        except (configparser.Error, OSError, UnicodeDecodeError):
            url = None
    return url or "https://api.wandb.ai"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(urlsplit(_base_url()).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _tags(tags: Sequence[str]) -> list[str]:
    also = os.environ.get("WANDB_TAGS", "").split(",")
    return [str(tag) for tag in (*tags, *also) if str(tag).strip()]


def _keep_artifacts_in(folder: Path) -> None:
    """Let W&B copy an artifact's files into the run's folder, so that they go when it goes."""
    global _data_dir
    if os.environ.get("WANDB_DATA_DIR") in (None, "", _data_dir):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_DATA_DIR"] = _data_dir = str(folder.absolute())


def _git() -> dict[str, Any]:
    """Commit and origin; W&B's own look at them leaves a user's name, which may be a token, in the address."""
    if os.environ.get("WANDB_DISABLE_GIT", "").lower() in ("1", "true"):
        return {"disable_git": True}
    answers = []
    for command in (["rev-parse", "HEAD"], ["config", "--get", "remote.origin.url"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            return {"disable_git": True}
        answers.append(done.stdout.strip() if done.returncode == 0 else "")
    commit, remote = answers
    if not commit:
        return {"disable_git": True}
    address = urlsplit(remote)
    if address.scheme:
        remote = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment=""))
    # An address of its own keeps W&B from asking git; "none" where there is no origin.
    return {"git_commit": commit, "git_remote_url": remote or "none"}


@contextmanager
def _command_line_without_secrets() -> Iterator[None]:
    """W&B records sys.argv: let it see what config.yaml shows."""
    argv = sys.argv
    shown = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        shown.append(f"{key}{equals}{without_secrets(value, key.lstrip('+~').rpartition('.')[2])}")
    sys.argv = shown
    try:
        yield
    finally:
        sys.argv = argv
