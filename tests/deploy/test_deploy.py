"""What deploy/ holds for clusters, read by the tools that would: Kubernetes, Dagster, shellcheck, torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted((DEPLOY / "slurm").glob("*.sbatch"))
KUBERNETES = "1.34"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def pod_specs(tree: Any) -> Iterator[dict[str, Any]]:
    """All specs with containers, at any depth: custom resources have them, too."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pod_specs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pod_specs(value)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_takes(path: Path) -> None:
    """Strictly: a misspelled field is an error. Of custom resources the pods in them are."""
    for document in documents(path):
        if document["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        for spec in pod_specs(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_misspelled_field_is_found() -> None:
    claim = documents(DEPLOY / "kubernetes" / "storage.yaml")[0]
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, KUBERNETES, strict=True)


def test_pods_mount_what_they_declare() -> None:
    for path in MANIFESTS:
        for document in documents(path):
            for spec in pod_specs(document):
                volumes = {volume["name"] for volume in spec["volumes"]}
                mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
                assert mounted == volumes, path


def instance_config() -> dict[str, Any]:
    maps = [found for found in documents(DEPLOY / "kubernetes" / "dagster.yaml") if found["kind"] == "ConfigMap"]
    told: dict[str, Any] = yaml.safe_load(
        next(found["data"]["dagster.yaml"] for found in maps if "dagster.yaml" in found["data"])
    )
    return told


def test_dagsters_instance_is_what_dagster_takes() -> None:
    """And lets in as many rounds and steps at once as the one for a single machine."""
    from dagster import Shape
    from dagster._config import validate_config
    from dagster._core.instance.config import dagster_instance_config_schema

    told = instance_config()
    checked = validate_config(Shape(dagster_instance_config_schema()), told)
    assert checked.success, checked.errors
    usual = yaml.safe_load((DEPLOY.parent / "dagster.yaml").read_text(encoding="utf-8"))
    assert (told["concurrency"], told["run_retries"]) == (usual["concurrency"], usual["run_retries"])


def test_the_launcher_makes_a_job_that_kubernetes_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's own launcher, with the settings it has there, and the Job that it would start for a round."""
    from dagster import DagsterRun, Shape
    from dagster._config import process_config
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.job import construct_dagster_k8s_job
    from kubernetes.client import ApiClient

    place = tmp_path / "kubeconfig"
    names = {"cluster": "here", "user": "nobody"}
    config = {"current-context": "it", "contexts": [{"name": "it", "context": names}]}
    config |= {"clusters": [{"name": "here", "cluster": {"server": "https://localhost:1"}}]}
    place.write_text(yaml.safe_dump({**config, "users": [{"name": "nobody", "user": {}}]}), encoding="utf-8")
    monkeypatch.setenv("OAPL_NAMESPACE", "oapl")
    told = instance_config()["run_launcher"]["config"] | {"load_incluster_config": False, "kubeconfig_file": str(place)}
    checked = process_config(Shape(K8sRunLauncher.config_type()), told)
    assert checked.success, checked.errors
    launcher = K8sRunLauncher.from_config_value(None, checked.value)  # type: ignore[arg-type]
    context = launcher.get_container_context_for_run(DagsterRun(job_name="whole_round"))
    settings = context.get_k8s_job_config("oapl:latest", launcher)
    job = construct_dagster_k8s_job(
        settings, ["round"], "oapl-round", context.run_k8s_config, pod_name="oapl-round", component="run_worker"
    )
    made = ApiClient().sanitize_for_serialization(job)
    kubernetes_validate.validate(made, KUBERNETES, strict=True)
    [container] = made["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": "oapl-environment"}}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {"data", "recipe", "shm"}
    assert made["spec"]["backoffLimit"] == 0


def test_secrets_are_named_and_not_written() -> None:
    for path in MANIFESTS:
        assert all(document["kind"] != "Secret" for document in documents(path))
    for spec in (spec for path in MANIFESTS for document in documents(path) for spec in pod_specs(document)):
        for variable in (variable for container in spec["containers"] for variable in container.get("env", [])):
            assert "URL" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool is not None
    done = subprocess.run([tool, "--shell=bash", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_say_how_they_are_called(path: Path) -> None:
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch ")


def test_the_slurm_learner_calls_torchrun_as_it_wants_to_be(tmp_path: Path) -> None:
    """The script itself, with an srun that only repeats what it was told; torchrun's own parser reads it."""
    from torch.distributed.run import get_args_parser

    for name, body in {"scontrol": 'printf "%s\\n" one two', "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    told = {"JOB_NODELIST": "[one,two]", "JOB_NUM_NODES": "2", "JOB_ID": "7", "CPUS_PER_TASK": "16", "SUBMIT_DIR": "/x"}
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "8"}
    environment |= {f"SLURM_{name}": value for name, value in told.items()}
    script = DEPLOY / "slurm" / "learner.sbatch"
    done = subprocess.run(
        ["bash", str(script), "r.yaml", "rollouts", "policy", "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    flag, torchrun, *words = done.stdout.splitlines()
    assert (flag, torchrun) == ("--kill-on-bad-exit=1", "/x/.venv/bin/torchrun")
    check_torchrun(words, "one:29400", ["--recipe", "r.yaml", "--rollouts", "rollouts", "--policy", "policy"])
    assert get_args_parser().parse_args(words).rdzv_id == "7"


def test_the_kubernetes_learner_calls_torchrun_as_it_wants_to_be() -> None:
    service, job = documents(DEPLOY / "kubernetes" / "learner.yaml")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    command, *words = pod["containers"][0]["command"]
    assert command == "torchrun"
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:29400"
    check_torchrun(words, first, ["--recipe=$(RECIPE)", "--rollouts=$(ROLLOUTS)", "--policy=$(POLICY)"])


def check_torchrun(words: list[str], endpoint: str, first: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert (parsed.module, parsed.training_script, parsed.rdzv_endpoint) == (True, "trainer", endpoint)
    assert parsed.training_script_args[: len(first)] == first
