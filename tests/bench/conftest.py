"""Run a benchmark in this process, as its command line does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(monkeypatch, capsys) -> Any:
    """``bench(*arguments)`` → status, out and err; threads and random numbers are left as they were."""
    from vit_attn.bench.__main__ import main

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # run_command sets it for good
    threads = torch.get_num_threads()

    def run(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        with torch.random.fork_rng(devices=[]):
            status = main(arguments)
        streams = capsys.readouterr()
        return SimpleNamespace(status=status, out=streams.out, err=streams.err)

    yield run
    torch.set_num_threads(threads)
