"""The shell around the code: Makefile, Docker files, pins. Nothing here installs, builds or trains."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def run_make(*args: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    # Under `make test` these would hand the outer call's options and ARGS on to the inner one.
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    return subprocess.run(["make", *args], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=30)


def make(*args: str, **env: str) -> str:
    done = run_make(*args, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def instructions(name: str) -> list[str]:
    """Arguments of one instruction of the Dockerfile, in order, continuation lines joined."""
    lines = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.removeprefix(f"{name} ").strip() for line in lines if line.startswith(f"{name} ")]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dependencies() -> list[str]:
    extras = project()["optional-dependencies"]
    return project()["dependencies"] + extras["dev"] + extras["slurm"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def train_service() -> dict:
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["train"]


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make (\S+) +\S", make(), re.MULTILINE)
    assert listed == phony.group(1).split()
    assert make() == make("help")


def test_demo_trains_anew_and_evaluates_that_run():
    commands = make("-n", "demo").splitlines()
    assert commands[-2:] == [
        ".venv/bin/python train.py experiment=demo run_name=strided overwrite=true",
        ".venv/bin/python evaluate.py ckpt=experiments/demo/strided",
    ]


@pytest.mark.parametrize(
    "target", ["compare", "train", "evaluate", "explain", "report", "masks", "test", "test-slow", "test-containers"]
)
def test_arguments_reach_the_command(target):
    args = "model.attention=[strided,full] 'run_name=two words'"
    assert make("-n", target, f"ARGS={args}").rstrip().endswith(args)


def test_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python3.10"
    pretend = f'{sys.executable} -c "import sys; sys.version_info = (3, 10, 14); $2"'
    old.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.14 || {pretend}\n')
    old.chmod(0o755)
    done = run_make("-f", ROOT / "Makefile", ".venv/bin/python", f"PYTHON={old}", cwd=tmp_path)
    message, stopped = done.stderr.splitlines()
    assert "needs Python 3.11 or newer" in message
    assert "Python 3.10.14" in message
    assert stopped.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()


def test_docker_train_shows_its_command_without_the_key():
    args = "model.attention=[strided,full] 'run_name=two words'"
    shown = make("docker-train", "DRY_RUN=1", f"ARGS={args}", WANDB_API_KEY="0123456789abcdef" * 3)
    assert shown.rstrip().endswith(f"docker compose -f docker/compose.yaml run --rm train {args}")
    assert shown.startswith("mkdir -p data experiments")
    assert "0123456789abcdef" not in shown


def test_container_is_not_root_and_gets_its_signals():
    user = instructions("USER")[-1]
    defaults = dict(arg.split("=") for arg in instructions("ARG"))
    uid, gid = (int(defaults[name.strip("${}")]) for name in user.split(":"))
    assert uid > 0
    assert gid > 0
    assert instructions("ENTRYPOINT") == ['["tini", "--", "python", "train.py"]']  # the exec form: no shell in between
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert not instructions("HEALTHCHECK")
    (packages,) = [line for line in instructions("RUN") if "apt-get install" in line]
    assert " tini " in packages


def test_image_declares_no_secret():
    names = [name for line in instructions("ENV") + instructions("ARG") for name in re.findall(r"(\w+)=", line)]
    assert "HOME" in names
    assert not [name for name in names if SECRET.search(name)]


def test_image_is_given_what_it_copies_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert "*" in lines
    assert admitted == copied


def test_compose_gives_gpus_and_shared_memory():
    service = train_service()
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service["shm_size"] == "8gb"


def test_compose_stops_as_the_image_does_and_gives_it_time_to_save():
    service = train_service()
    assert service["stop_signal"] == "SIGTERM"
    assert service["stop_grace_period"] == "2m"
    assert "init" not in service  # a second one would only warn that it is not process 1
    assert not {"entrypoint", "command", "healthcheck", "restart"} & set(service)


def test_compose_passes_the_key_by_name_and_mounts_what_the_image_leaves_writable():
    service = train_service()
    assert service["environment"] == ["WANDB_API_KEY"]
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert mounted == set(yaml.safe_load(instructions("VOLUME")[0]))


@pytest.mark.parametrize("dependency", dependencies())
def test_dependency_has_a_lower_bound_and_a_pin_within_it(dependency):
    requirement = Requirement(dependency)
    assert any(bound.operator == ">=" for bound in requirement.specifier), "no lower bound"
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_fit_every_platform():
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-"))]
    assert not [version for version in pins().values() if "+" in version]
