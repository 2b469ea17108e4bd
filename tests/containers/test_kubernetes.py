"""docker/k8s: what the files say, and that it is what train.py's exit statuses need. No tool, no cluster."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from vit_attn.errors import LostRankError, UserError
from vit_attn.launch import parse_launch
from vit_attn.training.stopping import SIGNALS

ROOT = Path(__file__).parents[2]
STOPPED = {128 + signum for signum in SIGNALS}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "docker/k8s" / name).read_text()))


def job() -> dict[str, Any]:
    return documents("job.yaml")[0]["spec"]


def pytorchjob() -> dict[str, Any]:
    return documents("pytorchjob.yaml")[0]["spec"]


def pods() -> dict[str, dict[str, Any]]:
    replicas = pytorchjob()["pytorchReplicaSpecs"]
    return {"job": job()["template"]["spec"]} | {name: spec["template"]["spec"] for name, spec in replicas.items()}


@pytest.fixture(params=["job", "Master", "Worker"])
def pod(request) -> dict[str, Any]:
    return pods()[request.param]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def overrides(pod: dict[str, Any]) -> list[str]:
    args = container(pod)["args"]
    return args[args.index("train.py") + 1 :] if "train.py" in args else args


def action(status: int) -> str:
    """What the Job does about a pod that ended with ``status``."""
    for rule in job()["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and status in codes["values"]:
            assert codes["operator"] == "In"
            assert codes["containerName"] == container(pods()["job"])["name"]
            return rule["action"]
    return "Count"


def test_job_gives_up_on_mistakes_and_goes_on_after_signals():
    assert action(UserError.status) == "FailJob"
    assert {action(status) for status in STOPPED} == {"Ignore"}
    # A crash, a kill for want of memory and a lost rank may come again: so many times, and no more.
    assert {action(status) for status in (1, 137, LostRankError.status)} == {"Count"}
    assert job()["backoffLimit"] > 0
    assert job()["template"]["spec"]["restartPolicy"] == "Never"


def test_job_forgives_disruptions_and_never_runs_two_pods():
    (disrupted,) = [rule for rule in job()["podFailurePolicy"]["rules"] if "onPodConditions" in rule]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert disrupted["action"] == "Ignore"
    assert job()["podReplacementPolicy"] == "Failed"


def test_pytorchjob_retries_what_is_worth_it():
    """Of the operator's rule for ExitCode: 128 and above is tried again, 1 to 127 is not."""
    spec = pytorchjob()
    assert {replica["restartPolicy"] for replica in spec["pytorchReplicaSpecs"].values()} == {"ExitCode"}
    for name in ("Master", "Worker"):
        options, _ = parse_launch(container(pods()[name])["args"])
        assert options.lost_rank_status >= 128
        assert options.lost_rank_status not in STOPPED
    assert min(STOPPED) >= 128
    assert UserError.status < 128


def test_pytorchjob_counts_its_nodes_and_gpus_alike():
    spec = pytorchjob()
    nodes = sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values())
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for name in ("Master", "Worker"):
        pod = pods()[name]
        gpus = container(pod)["resources"]["limits"]["nvidia.com/gpu"]
        assert container(pod)["name"] == "pytorch"
        assert spec["nprocPerNode"] == str(gpus)
        assert f"trainer.num_nodes={nodes}" in overrides(pod)
        assert f"trainer.devices={gpus}" in overrides(pod)
    assert pods()["Master"] == pods()["Worker"]


def test_launcher_leaves_time_to_save_before_the_pod_is_killed():
    for name in ("Master", "Worker"):
        _, torchrun = parse_launch(container(pods()[name])["args"])
        assert 60 <= torchrun.shutdown_timeout < pods()[name]["terminationGracePeriodSeconds"]


def test_pod_goes_on_with_the_same_run(pod, compose):
    names = dict(override.split("=", 1) for override in overrides(pod))
    assert {"experiment_name", "run_name", "seed"} <= set(names)
    config = compose(*overrides(pod))
    assert (config.experiment_name, config.run_name) == (names["experiment_name"], names["run_name"])
    assert not config.overwrite
    assert config.experiments_dir == "experiments"


def test_pod_has_no_more_rights_than_it_needs(pod):
    security, own = pod["securityContext"], container(pod)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["fsGroup"] == security["runAsGroup"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_pod_keeps_what_it_writes_and_has_time_to(pod):
    claims = {claim["metadata"]["name"] for claim in documents("storage.yaml")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}
    for kept in ("/workspace/data", "/workspace/experiments"):
        assert mounts[kept]["persistentVolumeClaim"]["claimName"] in claims
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"]
    assert set(mounts) == {"/workspace/data", "/workspace/experiments", "/dev/shm", "/tmp"}
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_key_comes_from_a_secret_that_may_be_missing(pod):
    (key,) = [entry for entry in container(pod)["env"] if entry["name"] == "WANDB_API_KEY"]
    assert "value" not in key
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True


def test_every_exit_status_is_documented():
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for status in {0, 1, UserError.status, LostRankError.status, 130, *STOPPED}:
        assert f"| {status} |" in text, status


@pytest.mark.parametrize("script", ["build", "check"])
def test_scripts_are_valid_and_executable(script):
    path = ROOT / "tests/containers" / script
    assert path.stat().st_mode & 0o100
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
