"""vit_attn.launch: real torchrun over small scripts; each test starts processes that import torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_attn.launch import combined_status

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("exitcodes", "status"),
    [
        ([1], 1),
        ([-9], 137),
        ([-15, 143], 143),
        ([75, 75], 75),
        ([75, -9], 137),  # the lost rank is the consequence
        ([75, 1], 1),
        ([143, 1], 1),
        ([1, 2, 143, 75], 2),  # a mistake comes again on every retry
    ],
)
def test_the_cause_counts_before_its_consequences(exitcodes, status):
    assert combined_status(exitcodes) == status
    assert combined_status(exitcodes[::-1]) == status


def start(folder: Path, script: str, *options: str) -> subprocess.Popen:
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "vit_attn.launch", "--standalone", "--nproc-per-node=2", *options, "script.py"]
    return subprocess.Popen(
        command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def clean_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("ends", "options", "status"),
    [
        pytest.param("sys.exit(0)", [], 0, marks=pytest.mark.slow),
        pytest.param("sys.exit(2)", [], 2, marks=pytest.mark.slow),
        ("sys.exit(75)", ["--lost-rank-status=203"], 203),
        ("os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)", [], 137),
    ],
)
def test_the_status_is_that_of_the_processes(tmp_path, ends, options, status):
    done = start(tmp_path, f"import os, sys, time\n{ends}\n", *options)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == status, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_reaches_the_processes_before_the_launcher_ends(tmp_path, signum):
    script = (
        "import os, signal, sys, time\n"
        "def save(signum, frame):\n"
        "    open(f'saved-{os.environ[\"RANK\"]}', 'w').write(str(signum))\n"
        "    sys.exit(128 + signum)\n"
        f"signal.signal({int(signum)}, save)\n"
        "open(f'ready-{os.environ[\"RANK\"]}', 'w')\n"
        "time.sleep(60)\n"
    )
    launcher = start(tmp_path, script)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline, launcher.communicate(timeout=5)
        time.sleep(0.1)
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signum, errors
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [str(int(signum))] * 2


@pytest.mark.slow
def test_a_node_that_never_comes_is_named(tmp_path):
    # Node 1 of 2, and nobody listens where node 0 should.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vit_attn.launch", "--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1"),
            *("--master-port=9", "--rdzv-conf=timeout=3", "--lost-rank-status=203", "script.py"),
        ],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 203, done.stderr
    assert "launch: lost, or did not find, another node" in done.stderr


@pytest.mark.slow
def test_two_nodes_meet_by_what_the_training_operator_tells_them(tmp_path):
    """Kubeflow's operator sets PET_… for torchrun, and per pod what other launchers read."""
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "open(f'{os.environ[\"RANK\"]}-of-{os.environ[\"WORLD_SIZE\"]}', 'w')\n"
        "dist.barrier()\n"
        "sys.exit(75 if os.environ['GROUP_RANK'] == '1' else 143)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    count = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "WORLD_SIZE": "4", "PYTHONUNBUFFERED": "0"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "vit_attn.launch", "--lost-rank-status=203", "script.py"],
            cwd=tmp_path,
            env=clean_environment() | address | count | {"PET_NODE_RANK": node, "RANK": node},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in ("0", "1")
    ]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [143, 203], errors
    assert {path.name for path in tmp_path.glob("*-of-*")} == {f"{rank}-of-4" for rank in range(4)}
