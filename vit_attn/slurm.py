"""What ``hydra/launcher=slurm`` does: submit a job array through submitit, run a job of it, wait for all.

submitit alone waits for the first job that fails, shows its pickled traceback, and waits for ever for a job that Slurm
has ended on a cluster without accounting (sacct).
"""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit_attn import outcomes
from vit_attn.console import explain, set_up
from vit_attn.errors import UserError, one_line
from vit_attn.training.stopping import Stopped

log = logging.getLogger("vit_attn")

_COMMANDS = ("sbatch", "scontrol", "squeue", "srun")
# States in which Slurm does nothing more for a job, unless it is requeued within a moment.
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT", "GONE"),
}
_FIRST_RANK = 60.0  # seconds that the first rank of a stopped run has, while the others stay
_QUEUE_POLL, _RESULT_POLL = 15.0, 1.0  # seconds: asking Slurm is dear where many ask, looking for a file is not


def check_commands() -> None:
    """See that jobs can be submitted from here.

    Raises:
        UserError: commands of Slurm are missing.
    """
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        raise UserError(f"hydra/launcher=slurm: no {', '.join(missing)} here; run it on a login node of the cluster")


def submit(launcher: Any, params: dict[str, Any], job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
    """Submit one job per list of overrides; several are one job array.

    Args:
        launcher: what a job calls, a Hydra launcher.
        params: what ``conf/hydra/launcher/slurm.yaml`` describes.
        job_overrides: of each job.
        first: number of the first job in its multirun.

    Returns:
        submitit's jobs.

    Raises:
        UserError: Slurm does not take them, or a parameter is wrong.
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

    common = set(OmegaConf.structured(BaseQueueConf).keys())
    own = ("submitit_folder", "max_num_timeout", "setup")
    options = {name if name in common else f"slurm_{name}": value for name, value in params.items() if name not in own}
    # A job may begin in any folder, and train.py need not be installed. A rank that fails ends the others, which may
    # wait for it for long.
    root = shlex.quote(str(Path(__file__).parents[1]))
    options["slurm_setup"] = [f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"', *(params["setup"] or [])]
    options["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
    calls = [
        (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
        for number, overrides in enumerate(job_overrides, first)
    ]
    try:
        # Jobs and what they return are pickles: nobody else may put one there.
        JobPaths.get_first_id_independent_folder(params["submitit_folder"]).mkdir(0o700, parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(
            folder=params["submitit_folder"], cluster="slurm", slurm_max_num_timeout=params["max_num_timeout"]
        )
        executor.update_parameters(**options)
        with redirect_stderr(StringIO()):  # submitit prints what sbatch said, besides raising it
            jobs = executor.map_array(launcher, *zip(*calls, strict=True))
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
        raise UserError("hydra/launcher=slurm: " + one_line("; ".join(lines) or error)[:300]) from error
    except (FailedSubmissionError, OSError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"hydra/launcher=slurm: {one_line(error)[:300]}") from error
    log.info("slurm      %s: %s", _ids(jobs), f"{len(jobs)} runs" if len(jobs) > 1 else "1 run")
    log.info("slurm      output of job %s: %s", jobs[0].job_id, _here(jobs[0].task(0).paths.stdout))
    return list(jobs)


def _ids(jobs: Sequence[Any]) -> str:
    first, last = jobs[0].job_id, jobs[-1].job_id
    return f"job {first}" if len(jobs) == 1 else f"job array {first.partition('_')[0]}, {first} to {last}"


def _here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_job(call: Callable[[], JobReturn]) -> dict[str, Any]:
    """Run one job in a process of its own; one that a signal stops does not return but ends the process.

    Returns:
        ``status``, the exit status that train.py would have had: 0, 1 or that of a UserError; and ``message``. Plain,
        so that what waits for it need not be able to rebuild an exception of any library.
    """
    set_up()
    # submitit requeues a job at one signal, SIGUSR2 unless SUBMITIT_PREEMPT_SIGNAL says otherwise; many clusters and
    # people send SIGUSR1. The training takes both, saves, and hands them on to this.
    handlers = [handler for handler in map(signal.getsignal, (signal.SIGUSR1, signal.SIGUSR2)) if callable(handler)]
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        if handlers and not callable(signal.getsignal(signum)):
            signal.signal(signum, handlers[0])
    try:
        error = call().return_value
    except (UserError, HydraException, OmegaConfBaseException) as mistake:
        error = mistake
    except Stopped as stop:
        # Of SIGTERM, which Slurm sends before it ends or requeues a job by itself; SIGUSR1 and 2 have led to submitit.
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    if error is None:
        return {"status": 0, "message": ""}
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)):
        print(f"error: {explain(error)}", file=sys.stderr)
        return {"status": getattr(error, "status", 2), "message": explain(error)}
    return {"status": 1, "message": f"{type(error).__name__}: {one_line(error)[:300]}"}


def let_first_rank_end(status: int) -> None:
    """Where Slurm has started several ranks and a signal stops the run: stay until the first rank has ended.

    srun ends all ranks, by SIGTERM, when one ends with a status other than 0; but the first one has more to do: it
    closes the logs and may requeue the job. Ended so, this process leaves with ``status``, which tells why, and does
    so at once: after KillWait, 30 seconds unless changed, srun kills it and gives that for the status of all.
    """
    if int(os.environ.get("SLURM_PROCID", "0")) == 0:
        return

    def end(signum: int, frame: FrameType | None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    signal.signal(signal.SIGTERM, end)
    time.sleep(_FIRST_RANK)


def wait(jobs: Sequence[Any]) -> None:
    """Wait until all jobs have ended, and note mistakes and crashes in :mod:`vit_attn.outcomes`."""
    watch = _Watch(jobs)
    try:
        while watch.left:
            watch.look()
            time.sleep(_RESULT_POLL)
    except KeyboardInterrupt:
        array = jobs[0].job_id.partition("_")[0]
        log.info("slurm      the jobs go on without this command; scancel %s ends them", array)
        raise


class _Watch:
    """Jobs that have not ended, and what Slurm said of them."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        self.left = {job.job_id: job for job in jobs}
        self._restarts = dict.fromkeys(self.left, 0)
        self._ended: dict[str, int] = {}  # how often in a row Slurm has said so: a network's disk may be late
        self._ask_at = time.monotonic() + _QUEUE_POLL

    def look(self) -> None:
        """Take the jobs out that have ended, and say how."""
        for name, job in list(self.left.items()):
            results = _results(job)
            if results is not None:
                _note(job, max(results, key=lambda result: (result["status"] != 0, -result["status"])))
                del self.left[name]
        if self.left and time.monotonic() >= self._ask_at:
            self._ask()
            self._ask_at = time.monotonic() + _QUEUE_POLL

    def _ask(self) -> None:
        for name, (state, restarts) in _ask_slurm(self.left).items():
            if restarts > self._restarts[name]:
                log.info("slurm      job %s was requeued (%d); it goes on from its checkpoint", name, restarts)
                self._restarts[name] = restarts
            self._ended[name] = self._ended.get(name, 0) + 1 if state in _ENDED else 0
            if self._ended[name] > 1 and _results(self.left[name]) is None:
                _note(self.left.pop(name), {"status": 1, "message": f"ended by Slurm as {state}, without a result"})


def _note(job: Any, result: dict[str, Any]) -> None:
    name, message = job.job_id, result["message"]
    if result["status"] == 0:
        log.info("slurm      job %s has finished", name)
        return
    log.warning("slurm      job %s: %s; see %s", name, message, _here(job.task(0).paths.stderr))
    if result["status"] == 1:
        outcomes.crashes.append(RuntimeError(message))
    else:
        mistake = UserError(message)
        mistake.status = result["status"]
        outcomes.mistakes.append(mistake)


def _results(job: Any) -> list[dict[str, Any]] | None:
    """What the processes of a job returned; None: not all of them have ended."""
    from submitit.core.utils import pickle_load

    paths = [job.task(number).paths.result_pickle for number in range(job.num_tasks)]
    if paths[0].parent.is_dir():
        os.listdir(paths[0].parent)  # a network's disk then looks again whether the files are there
    if not all(path.exists() for path in paths):
        return None
    found = []
    for path in paths:
        how, what = pickle_load(path)  # written by run_job, or a traceback by submitit
        crash = {"status": 1, "message": one_line(str(what).strip().rpartition("\n")[2])}
        found.append(what if how == "success" else crash)
    return found


def _ask_slurm(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Ask for each job's state and how often it was requeued; "GONE" is forgotten. Empty: no answer."""
    arrays = ",".join(sorted({name.partition("_")[0] for name in names}))
    form = "--Format=JobArrayID:60,State:30,RestartCnt:20"
    command = ["squeue", "--noheader", "--array", "--states=all", form, f"--jobs={arrays}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return {}  # slurmctld is busy or being restarted
    told = {name: (state, int(count)) for name, state, count in map(str.split, asked.stdout.splitlines())}
    return {name: told.get(name, ("GONE", 0)) for name in names}
