"""The image as a cluster runs it: built from docker/Dockerfile by buildah, run by runc under job.yaml's restrictions.

make test-containers      # root, buildah, debootstrap, runc; some minutes and 9 GB
"""

import csv
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = Path(
    os.environ.get("VIT_ATTN_CONTAINERS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_attn/containers"
)
IMAGE = "localhost/vit_attn"
PLANTED = "f00dfeed" * 5  # a W&B key that no layer may hold
TINY = (
    *("data=digits", "trainer=cpu", "logger=csv", "model.depth=2", "model.embed_dim=32", "model.num_heads=2"),
    *("experiment_name=image", "trainer.log_every_n_steps=1", "explain_images=0"),
)

pytestmark = pytest.mark.containers


def output(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def buildah(*arguments: str) -> str:
    script = 'cache=$1; shift; . "$0"; buildah "$@"'
    return output("bash", "-c", script, str(HERE / "storage.sh"), str(CACHE), *arguments).strip()


@pytest.fixture(scope="session")
def image() -> dict[str, Any]:
    """Configuration of the image, built where it is not there or not of this code."""
    output(HERE / "build", env=os.environ | {"WANDB_API_KEY": PLANTED, "VIT_ATTN_CONTAINERS": str(CACHE)})
    return json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]


@pytest.fixture(scope="session")
def root(image) -> Iterator[Path]:
    """The image's files, mounted."""
    working = buildah("from", IMAGE)
    yield Path(buildah("mount", working))
    buildah("rm", working)


def pod() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker/k8s/job.yaml").read_text())["spec"]["template"]["spec"]


class Container:
    """One container: image and command line as Docker would join them, rights and mounts as job.yaml has them."""

    def __init__(self, image: dict[str, Any], root: Path, folder: Path, args: list[str], command: list[str] | None):
        self.name = f"vit-attn-{folder.name}"
        self.runc = ["runc", "--root", str(CACHE / "runc")]
        for volume in ("data", "experiments"):
            (folder / volume).mkdir(exist_ok=True)
            os.chown(folder / volume, -1, pod()["securityContext"]["fsGroup"])
            (folder / volume).chmod(0o2775)  # what fsGroup does
        bundle = folder / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir()
        output(*self.runc, "spec", cwd=bundle)
        spec = json.loads((bundle / "config.json").read_text())
        self.fill(spec, image["config"], root, folder, [*(command or image["config"]["Entrypoint"]), *args])
        (bundle / "config.json").write_text(json.dumps(spec))
        self.process = subprocess.Popen(
            [*self.runc, "run", "--bundle", str(bundle), self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def fill(spec: dict[str, Any], config: dict[str, Any], root: Path, folder: Path, args: list[str]) -> None:
        security, own = pod()["securityContext"], pod()["containers"][0]["securityContext"]
        assert own["capabilities"]["drop"] == ["ALL"]
        spec["root"] = {"path": str(root), "readonly": own["readOnlyRootFilesystem"]}
        spec["process"] |= {
            "terminal": False,
            "args": args,
            "env": [*config["Env"], "OMP_NUM_THREADS=1"],
            "cwd": config["WorkingDir"],
            "user": {
                "uid": security["runAsUser"],
                "gid": security["runAsGroup"],
                "additionalGids": [security["fsGroup"]],
            },
            "noNewPrivileges": not own["allowPrivilegeEscalation"],
            "capabilities": {},
        }
        # A network of its own, with no way out: nothing is downloaded. runc's cgroup mount needs cgroup v2 or v1 alone.
        spec["mounts"] = [
            mount for mount in spec["mounts"] if mount["destination"] not in ("/sys/fs/cgroup", "/dev/shm")
        ]
        # Docker and Kubernetes write this file too; processes of one run find each other by it.
        hosts = folder / "bundle/hosts"
        hosts.write_text(f"127.0.0.1 localhost {spec['hostname']}\n")
        spec["mounts"].append(
            {"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["bind", "ro"]}
        )
        sources = {"data": folder / "data", "experiments": folder / "experiments"}
        for mount in pod()["containers"][0]["volumeMounts"]:
            if mount["name"] in sources:
                kind = {"type": "bind", "source": str(sources[mount["name"]]), "options": ["rbind", "rw"]}
            else:
                kind = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
            spec["mounts"].append({"destination": mount["mountPath"], **kind})

    def kill(self, name: str) -> None:
        output(*self.runc, "kill", self.name, name)

    def first_process(self) -> Path:
        """/proc of what is process 1 inside; waits for it."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            done = subprocess.run([*self.runc, "state", self.name], capture_output=True, text=True)
            if done.returncode == 0 and json.loads(done.stdout)["status"] == "running":
                return Path(f"/proc/{json.loads(done.stdout)['pid']}")
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)
        raise AssertionError(self.process.stderr.read() if self.process.stderr else "")

    def wait(self, timeout: float = 300) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, errors

    def remove(self) -> None:
        subprocess.run([*self.runc, "delete", "--force", self.name], capture_output=True)
        self.process.wait()


@pytest.fixture
def run(image, root, tmp_path) -> Iterator[Any]:
    """``run(*args, command=None)`` starts a container; the volumes are the test's."""
    started: list[Container] = []

    def start(*args: str, command: list[str] | None = None) -> Container:
        started.append(Container(image, root, tmp_path, list(args), command))
        return started[-1]

    yield start
    for container in started:
        container.remove()


def until(condition: Any, container: Container, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if container.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(container.wait(10))
        time.sleep(0.05)


def status_lines(process: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)


def metrics(folder: Path, name: str) -> list[dict[str, str]]:
    path = folder / "experiments/image" / name / "logs/metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def train_steps(rows: list[dict[str, str]]) -> list[int]:
    return [int(row["step"]) for row in rows if row.get("train/loss")]


def test_files_pass_their_checks():
    done = subprocess.run([HERE / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 5


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("Dockerfile", "WORKDIR /workspace", "WORKDIR workspace"),
        ("compose.yaml", "shm_size: 8gb", "shm_sizes: 8gb"),
        ("k8s/job.yaml", "backoffLimit: 3", "backoffLimits: 3"),
        ("k8s/storage.yaml", "storage: 20Gi", "storage: [20Gi]"),
        ("k8s/pytorchjob.yaml", "restartPolicy: ExitCode", "restartPolicy: ExitCodes"),
        ("k8s/pytorchjob.yaml", "nprocPerNode:", "nprocsPerNode:"),
        ("k8s/pytorchjob.yaml", "fsGroup: 1000", "fsgroup: 1000"),
    ],
)
def test_checks_find_a_mistake(tmp_path, file, right, wrong):
    copy = shutil.copytree(ROOT / "docker", tmp_path / "docker") / file
    assert right in copy.read_text()
    copy.write_text(copy.read_text().replace(right, wrong, 1))
    done = subprocess.run([HERE / "check", copy.parents[file.count("/")]], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert f"failed  {file.split('/')[0]}" in done.stdout


def test_image_says_what_a_cluster_needs_to_know(image):
    config = image["config"]
    user, group = (int(number) for number in config["User"].split(":"))  # numbers, or runAsNonRoot cannot tell
    assert user > 0
    assert group > 0
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][:2] == ["tini", "--"]
    assert "Healthcheck" not in config
    assert set(config["Volumes"]) == {"/workspace/data", "/workspace/experiments"}


def test_image_holds_the_code_and_no_key(image, root):
    files = {path.relative_to(root / "workspace").parts[0] for path in (root / "workspace").iterdir()}
    code = {"conf", "constraints.txt", "evaluate.py", "hydra_plugins", "pyproject.toml", "train.py", "vit_attn"}
    assert files == code | {"data", "experiments"}
    assert PLANTED not in json.dumps(image)
    # All but /opt/venv, which is installed before any of the project's own files arrive.
    places = [str(root / place) for place in ("workspace", "etc", "root", "tmp", "run", "var/lib", "home")]
    found = subprocess.run(["grep", "--recursive", "--files-with-matches", PLANTED, *places], capture_output=True)
    assert found.stdout == b""
    assert (root / "etc/pip.conf").stat().st_size == 0  # mounted while building, and empty now
    assert not list((root / "run/pip").iterdir())


def test_two_steps_train_without_root_or_a_writable_image(run, tmp_path):
    container = run(*TINY, "run_name=two", "trainer.max_steps=2")
    process = container.first_process()
    identity = status_lines(process)
    until(lambda: (process / "comm").read_text().strip() == "tini", container, 10)
    assert identity["Uid"].split() == ["1000"] * 4
    assert identity["NSpid"].split()[-1] == "1"
    assert int(status_lines(process)["CapEff"], 16) == 0
    status, out, errors = container.wait()
    assert status == 0, errors
    assert train_steps(metrics(tmp_path, "two")) == [0, 1]
    results = tmp_path / "experiments/image/two/results/metrics.json"
    assert f"results    {results.relative_to(tmp_path)}" in out
    assert results.stat().st_uid == 1000


def test_mistake_ends_with_2_and_one_line(run, tmp_path):
    status, _, errors = run(*TINY, "run_name=wrong", "model.attention=striped").wait()
    assert status == 2
    (line,) = errors.splitlines()
    assert "Did you mean 'strided'?" in line
    assert not (tmp_path / "experiments/image").exists()


def test_launcher_of_the_pytorchjob_ends_with_the_trainings_status(run):
    document = yaml.safe_load((ROOT / "docker/k8s/pytorchjob.yaml").read_text())
    (pytorch,) = document["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    container = run("--standalone", "train.py", *TINY, "model.attention=striped", command=pytorch["command"])
    status, _, errors = container.wait()
    assert status == 2, errors
    assert "Did you mean 'strided'?" in errors


def test_stop_signal_ends_a_container_that_still_imports(run):
    """Process 1 would ignore it: it has no handler yet."""
    container = run(*TINY, "run_name=early")
    until(lambda: (container.first_process() / "comm").read_text().strip() == "tini", container, 10)
    started = time.monotonic()
    container.kill("TERM")
    status, _, _ = container.wait(20)
    assert status == 143
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("name", "status", "launched"), [("TERM", 143, False), ("USR1", 138, False), ("TERM", 143, True)]
)
def test_stopped_container_has_saved_and_another_goes_on(run, tmp_path, name, status, launched):
    args = [*TINY, f"run_name={name}", "trainer.max_epochs=4", "data.batch_size=16"]
    command = None
    if launched:  # as in pytorchjob.yaml, with two processes on one node
        args = ["--standalone", "--nproc-per-node=2", "--shutdown-timeout=110", "train.py", *args, "trainer=ddp_cpu"]
        command = ["tini", "--", "python", "-m", "vit_attn.launch"]
    container = run(*args, command=command)
    until(lambda: len(train_steps(metrics(tmp_path, name))) > 20, container)
    container.kill(name)
    stopped, _, errors = container.wait(120)  # the grace period
    assert stopped == status, errors
    assert "the same command goes on" in errors
    assert (tmp_path / "experiments/image" / name / "checkpoints/last.ckpt").exists()
    before = len(train_steps(metrics(tmp_path, name)))
    container.remove()

    finished, _, errors = run(*args, command=command).wait()
    assert finished == 0, errors
    steps = train_steps(metrics(tmp_path, name))
    assert steps == list(range(len(steps)))  # none missing, none twice
    assert len(steps) > before
