"""hydra/launcher=slurm: Hydra takes launchers from modules of ``hydra_plugins`` alone. See :mod:`vit_attn.slurm`."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from vit_attn import slurm
from vit_attn.errors import UserError

_Base: Any = Launcher  # the extra may not be installed; Hydra imports this module for every command
with suppress(ImportError):
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as _Base  # type: ignore[no-redef]


class SlurmLauncher(_Base):
    """Submit the jobs of a multirun as one job array, and wait until all have ended, requeued ones too."""

    def __init__(self, **params: Any) -> None:
        if _Base is not Launcher:
            super().__init__(**params)

    def setup(self, **parts: Any) -> None:
        """Take what Hydra gives.

        Raises:
            UserError: this machine cannot submit jobs.
        """
        if _Base is Launcher:
            raise UserError("hydra/launcher=slurm needs one more package: pip install -e '.[slurm]'")
        slurm.check_commands()
        super().setup(**parts)

    def __call__(self, *call: Any) -> dict[str, Any]:
        """Run one job, in a process that Slurm has started; returns what :func:`vit_attn.slurm.run_job` does."""
        # Not by the class's name: Hydra runs this module again to look for plugins, and the name is another's then.
        run = super().__call__
        return slurm.run_job(lambda: run(*call))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit and wait; mistakes and crashes are noted in :mod:`vit_attn.outcomes`.

        Raises:
            UserError: Slurm does not take the jobs.
        """
        slurm.wait(slurm.submit(self, self.params, job_overrides, initial_job_idx))
        return [JobReturn(overrides=list(each), status=JobStatus.COMPLETED) for each in job_overrides]
