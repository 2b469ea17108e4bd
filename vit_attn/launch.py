"""torchrun with the training's own exit status, for schedulers that decide by it whether to try again.

python -m vit_attn.launch --nproc-per-node 4 train.py trainer=ddp trainer.devices=4
python -m vit_attn.launch --lost-rank-status 203 train.py …     # nodes and addresses: torchrun's PET_… variables

torchrun ends with 1 whatever its processes ended with, and does not pass SIGUSR1 and SIGUSR2 on.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from vit_attn.errors import LostRankError, UserError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def combined_status(exitcodes: Collection[int]) -> int:
    """The status that says most about why a node's processes failed.

    Args:
        exitcodes: of the failed ones; -9 is one that SIGKILL ended.

    A mistake (2), which no retry mends, comes before crashes, those before signals (128 + signal), and all before
    having lost another rank (75), which is a consequence.
    """

    def weight(status: int) -> tuple[bool, bool, bool]:
        return status != UserError.status, status == LostRankError.status, status >= 128

    return min((code if code > 0 else 128 - code for code in exitcodes), key=weight)


def parse_launch(arguments: Sequence[str]) -> tuple[Namespace, Namespace]:
    """The launcher's own options, and torchrun's with the command that it is to run."""
    own = ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--lost-rank-status", type=int, default=LostRankError.status)
    options, rest = own.parse_known_args(arguments)
    return options, parse_args(["--signals-to-handle", SIGNALS, *rest])


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with ``arguments`` and return the status of what it ran.

    0; that of :func:`combined_status`; 128 + signal where the launcher itself was signalled, after its processes have
    ended; 75, or what ``--lost-rank-status`` says, where another node was lost or not found.
    """
    options, torchrun = parse_launch(arguments)
    try:
        run(torchrun)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            print(f"launch: rank {rank} ended with {failure.exitcode}", file=sys.stderr)
        status = combined_status([failure.exitcode for failure in error.failures.values()])
        return options.lost_rank_status if status == LostRankError.status else status
    except SignalException as error:
        print(f"launch: {error.sigval.name} was passed on, and all ranks of this node have ended", file=sys.stderr)
        return 128 + error.sigval
    except (RendezvousError, DistError) as error:
        print(f"launch: lost, or did not find, another node: {error}", file=sys.stderr)
        return options.lost_rank_status
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
