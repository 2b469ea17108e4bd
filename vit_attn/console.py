"""What a command shows: our lines, no noise of the libraries, one line for a mistake."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from tqdm import tqdm

from vit_attn.config import hide_secrets, refuse_secrets
from vit_attn.errors import LostRankError, UserError, one_line, printable, unknown_name
from vit_attn.training.stopping import Stopped
from vit_attn.yaml_aliases import bound_aliases

log = logging.getLogger("vit_attn")

# Advice of libraries that does not hold here, by the beginning of the message.
_NOISE = (
    r".*does not have many workers",  # batches come from memory
    r".*`ModelCheckpoint\(monitor=.*could not find the monitored key",
    r".*The number of training batches .* is smaller than the logging interval",
    r".*Checkpoint directory .* exists and is not empty",
    r".*You're resuming from a checkpoint that ended before the epoch ended",  # our loaders resume inside an epoch
    r".*It is recommended to use .*sync_dist=True",  # what is logged without it is the same on every rank
    r".*isinstance\(treespec, LeafSpec\)",
    r".*AMP with fp16 is not supported on CPU",  # said in our own line
    r".*The `srun` command is available",
    r".*weights_only",
    r".*lr_scheduler.step\(\)` before `optimizer.step\(\)",  # a first step that mixed precision skipped
    r".*ambiguous collection",
    r".*decompression bomb",  # up to the size at which PIL refuses an image, it is read
)

_LONGEST_ARGUMENT = 10_000  # characters: Hydra's parser takes minutes over many more
_LONGEST = 1000  # characters of an error: who gave a value of many more need not see all of it


def is_first_process() -> bool:
    """Whether this process writes for all of them; known from the environment before any of them meet."""
    return getattr(rank_zero_only, "rank", 0) == 0


def shows_progress_bar() -> bool:
    """Whether a person watches: a progress bar in a log file is noise."""
    return sys.stderr.isatty() and is_first_process()


def write_log_to(path: Path) -> None:
    """Send the log to this file too, instead of the last run's."""
    handler = _LogFile(path)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(message)s"))
    for old in [old for old in log.handlers if isinstance(old, logging.FileHandler)]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)


def log_paths(paths: Sequence[Path]) -> None:
    """Write a line for each file that a command left."""
    for path in paths:
        log.info("%-10s %s", "picture" if path.suffix == ".png" else "results", path)


class _SafeFormatter(logging.Formatter):
    """Names of files and classes are anybody's: no line obeys them, and none holds a secret."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(printable(super().format(record)))


class _ConsoleHandler(logging.Handler):
    """Write lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A file that a full disk does not turn into a traceback for each line: the lines are on the console too."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True
            print(f"warning: {self.baseFilename} cannot be written: {error.strerror}", file=sys.stderr)


def set_up() -> None:
    """Show our own lines on the first process, and quieten the libraries."""
    # Hydra then raises its errors to us instead of printing them at length.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    bound_aliases()
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        handler = _ConsoleHandler()
        handler.setFormatter(_SafeFormatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    log.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # torch.compile would say so once per run on a machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def explain(error: Exception) -> str:
    """Say on one line what is wrong with the command line or the configuration, with the nearest right spelling."""
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    if isinstance(cause, MissingConfigException) and cause.options is not None:
        group, _, choice = (cause.missing_cfg_file or "").rpartition("/")
        return unknown_name(group, choice, sorted(cause.options))
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(cause.parent_node, DictConfig):
        parent = cause.full_key.rpartition(".")[0] if cause.full_key else ""
        keys = [
            f"{parent}.{key!s}" if parent else str(key) for key in cause.parent_node if not str(key).startswith("_")
        ]
        return unknown_name("key", cause.full_key, keys)
    return one_line(error).removesuffix(" See https://hydra.cc/docs/1.2/advanced/override_grammar/basic for details")


def run_command(command: Callable[[], object], *, resumes: bool = True) -> int:
    """Run a command and return its exit status, with one line on stderr where that is not 0.

    0: done. 2: a mistake, which trying again will not mend. 75: a process of the run was lost, try again. 130: Ctrl-C.
    128 + signal, such as 143 of SIGTERM: stopped, what was done is saved, and the same command goes on.

    Args:
        command: what to run.
        resumes: the same command goes on where it was interrupted.

    An error of the program's own goes on as an exception, with its traceback.
    """
    set_up()
    try:
        refuse_secrets(sys.argv[1:])
        for argument in sys.argv[1:]:
            if len(argument) > _LONGEST_ARGUMENT:
                raise UserError(f"an argument of {len(argument)} characters, {argument[:40]!r}…, is too long")
        command()
    except LostRankError as error:
        if is_first_process():  # speaks for all of them
            _print_error(str(error))
        return error.status
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if is_first_process() or not getattr(error, "everywhere", True):
            _print_error(explain(error))
        return getattr(error, "status", UserError.status)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return _interrupted(resumes)
    except SystemExit as ended:
        # Lightning takes a KeyboardInterrupt for itself and leaves with status 1.
        if isinstance(ended.__context__, KeyboardInterrupt):
            return _interrupted(resumes)
        raise
    return 0


def _print_error(message: str) -> None:
    line = hide_secrets(one_line(message))
    print(f"error: {line if len(line) <= _LONGEST else line[:_LONGEST] + ' …'}", file=sys.stderr)


def _interrupted(resumes: bool) -> int:
    print("interrupted" + ": the same command goes on from the last checkpoint" * resumes, file=sys.stderr)
    return 130
