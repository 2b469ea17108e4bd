"""How the jobs of a multirun ended, wherever they ran: train.py's exit status is made of it."""

from vit_attn.errors import UserError

# Of the whole command: jobs in this process are noted by train.py, those on a cluster by their launcher.
mistakes: list[UserError] = []
crashes: list[Exception] = []
