"""What is in `deploy/`: valid by its own schemas, consistent with Troupe, and the batch script does what it says.

Not checked here, because it needs the real thing: that the images build, that KubeRay's operator and Ray's launcher
make clusters of these files. Rules that KubeRay's CRDs state in CEL are not evaluated.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError

from orchestrator.config.loading import load_config
from orchestrator.config.schema import RunConfig
from orchestrator.planning.bundles import ClusterView, Node
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan, problems
from orchestrator.planning.resolve import build_pipeline

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CRDS = ROOT / "tests" / "data" / "kuberay-1.7.0"
MANIFESTS = ("raycluster", "rayjob")
SBATCH = DEPLOY / "slurm" / "troupe.sbatch"


def closed(schema: Any) -> Any:
    """A structural schema of Kubernetes that refuses unknown keys, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and "type" in schema
    if known and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner["additionalProperties"] = False
    return inner


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / f"{name}.yaml").read_text()))


def crd(name: str) -> Draft202012Validator:
    schema = closed(json.loads(gzip.decompress((CRDS / f"{name}.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which a CRD does not repeat
    return Draft202012Validator(schema)


def cluster_of(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid_by_kuberays_own_schema_which_refuses_a_misspelt_key(name: str):
    manifest, *others = documents(name)
    assert manifest["kind"].lower() == name and manifest["apiVersion"] == "ray.io/v1"
    crd(name).validate(manifest)
    assert [each["kind"] for each in others] == (["ConfigMap"] if name == "rayjob" else [])
    spec = manifest["spec"]
    spec.get("rayClusterSpec", spec)["workerGroupSpecs"][0]["lables"] = {}
    with pytest.raises(ValidationError, match="lables"):
        crd(name).validate(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_ray_of_a_manifest_is_the_pinned_one_asks_for_a_token_and_scales_by_labels(name: str):
    [pinned] = re.findall(r"^ray==(.+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == pinned
    assert cluster["authOptions"] == {"mode": "token"}
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")


def test_the_job_has_the_clusters_groups():
    groups = [[group["groupName"] for group in cluster_of(name)["workerGroupSpecs"]] for name in MANIFESTS]
    assert groups[0] == groups[1] == ["trainer", "rollout"]


def pods(cluster: dict[str, Any]) -> ClusterView:
    """The nodes of a manifest with every group at its largest."""
    nodes: list[Node] = []
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        for index in range(group.get("maxReplicas", 1)):
            nodes.append(Node(f"{group.get('groupName', 'head')}-{index}", resources, group["labels"]))
    return ClusterView(tuple(nodes))


def recipe_of_the_job(folder: Path) -> RunConfig:
    _, config_map = documents("rayjob")
    file = folder / "recipe.yaml"
    file.write_text(config_map["data"]["recipe.yaml"])
    return load_config(file)


def test_the_recipe_of_the_job_fits_on_its_cluster_and_each_role_on_the_group_of_its_label(tmp_path: Path):
    config = recipe_of_the_job(tmp_path)
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    plan = draft_plan(config, pipelines, parameters=1_500_000_000, machine=Machine(32))
    cluster = pods(cluster_of("rayjob"))
    assert problems(plan, cluster) == []
    unlabelled = ClusterView(tuple(Node(node.name, node.resources) for node in cluster.nodes))
    said = "\n".join(problems(plan, unlabelled))
    assert "role=trainer" in said and "role=rollout" in said


def test_the_job_runs_its_recipe_where_the_cluster_keeps_runs_and_its_output_is_the_shared_volume():
    job = documents("rayjob")[0]["spec"]
    command, _, recipe, output, *_ = job["entrypoint"].split()
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert command == "troupe" and mounts[str(Path(recipe).parent)] == "recipe"
    assert mounts[str(Path(output.removeprefix("output=")).parent)] == "runs"
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        assert "/shared" in {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}


def test_the_file_of_rays_launcher_is_valid_by_rays_schema_and_its_labels_are_those_of_the_other_files():
    found = find_spec("ray")
    assert found is not None and found.origin is not None
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    Draft7Validator(schema).validate(cluster)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert {name: kind["labels"] for name, kind in types.items()} == {name: {"role": name} for name in types}
    groups = {group["groupName"]: group["labels"] for group in cluster_of("raycluster")["workerGroupSpecs"]}
    assert groups == {name: types[name]["labels"] for name in ("trainer", "rollout")}
    with pytest.raises(ValidationError, match="lables"):
        Draft7Validator(schema).validate({**cluster, "lables": {}})


DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_every_package_is_copied_into_both_images_and_let_through_by_the_ignore_file():
    lines = DOCKERFILE.replace("\\\n", "").splitlines()
    stages: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("FROM"):
            stages[line.split()[-1]] = []
        elif line.startswith("COPY"):
            stages[list(stages)[-1]] += line.split()[1:-1]
    packages = {"actors", "rollout", "rewards", "orchestrator", "deploy", "troupe.py", "pyproject.toml", "README.md"}
    for target in ("cpu", "gpu"):
        assert packages <= set(stages[target]), target
    let_through = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {source for sources in stages.values() for source in sources}
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)


def test_the_images_end_as_an_unprivileged_user_with_the_commands_where_a_login_shell_finds_them():
    for stage in DOCKERFILE.split("\nFROM ")[-2:]:
        assert "\nUSER troupe\n" in stage
        assert "ln -s /opt/troupe/bin/ray /opt/troupe/bin/troupe /usr/local/bin/" in stage


class Slurm:
    """A job of the batch script, with commands of Slurm and Ray that write down how they were called."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.said = folder, folder / "said.txt"
        self.tools = folder / "tools"
        self.tools.mkdir()
        names = " ".join(f"n{index}" for index in range(nodes))
        self.tool("srun", 'echo "srun $*" >>"$SAID"; exec sleep 600')
        # The head answers when Ray was started everywhere: what is written down has an order.
        self.tool("ray", f'until (($(grep -c ^srun "$SAID") == {nodes})); do sleep 0.01; done')
        self.tool("scontrol", f'echo "scontrol $*" >>"$SAID"; [[ $1 != show ]] || printf "%s\\n" {names}')
        self.tool("troupe", 'echo "troupe $*" >>"$SAID"')

    def tool(self, name: str, body: str) -> None:
        file = self.tools / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_SUBMIT_DIR": str(self.folder)}
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        return {**job, "SAID": str(self.said), "PATH": path, "RUNS": str(self.folder / "runs"), "VENV": "/nowhere"}

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """(exit code, calls). The script ends what it started."""
        done = subprocess.run(
            ["bash", str(SBATCH), *arguments],
            env={**self.environment, **environment}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        self.errors = done.stderr
        return done.returncode, self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, nodes=3)


def test_the_batch_script_starts_ray_on_every_node_with_its_label_and_then_the_run(slurm: Slurm):
    code, said = slurm.run("my.yaml", "train.steps=5", ROLLOUT_NODES="2")
    assert code == 0
    rays = sorted(line for line in said if line.startswith("srun"))
    assert [re.findall(r"--nodelist=(\S+).*--labels (\S+)", line)[0] for line in rays] == [
        ("n0", "role=trainer"), ("n1", "role=rollout"), ("n2", "role=rollout"),
    ]  # fmt: skip
    assert "--head" in rays[0] and all("--address=n0:20077" in line for line in rays[1:])
    output = f"output={slurm.folder}/runs/slurm-77"
    assert said[-1] == (
        f"troupe run my.yaml {output} checkpoint.grace_s=120 cluster.placement_timeout_s=300 train.steps=5"
    )
    token = slurm.folder / "runs" / "slurm-77" / "token"
    assert len(token.read_text()) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_job_that_is_requeued_continues_the_run_that_it_finds(slurm: Slurm):
    kept = slurm.folder / "runs" / "slurm-77" / "run-1" / "checkpoints" / "step-00000004"
    kept.mkdir(parents=True)
    _, said = slurm.run("my.yaml")
    assert said[-1] == f"troupe resume {slurm.folder}/runs/slurm-77/run-1"


def test_a_run_that_fails_by_itself_gives_the_job_its_exit_code_and_is_not_queued_again(slurm: Slurm):
    slurm.tool("troupe", "exit 7")
    code, said = slurm.run("my.yaml")
    assert code == 7 and not any("requeue" in line for line in said)


def test_slurms_signal_reaches_the_run_which_ends_before_the_job_is_queued_again(slurm: Slurm):
    """The run itself sends the signal, as Slurm would, once it can receive one."""
    saved = 'echo "troupe saved" >>"$SAID"; kill "$child"; exit 143'
    slurm.tool("troupe", f"sleep 60 & child=$!; trap '{saved}' TERM; kill -TERM \"$PPID\"; wait")
    code, said = slurm.run("my.yaml")
    assert code == 143
    assert said[-2:] == ["troupe saved", "scontrol requeue 77"]


def test_more_rollout_nodes_than_the_job_can_spare_are_refused_before_ray_starts(slurm: Slurm):
    code, said = slurm.run("my.yaml", ROLLOUT_NODES="3")
    assert code == 2 and "ROLLOUT_NODES=3 of 3 nodes" in slurm.errors
    assert not any(line.startswith("srun") for line in said)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say_about_the_batch_script():
    done = subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_guide_names_only_files_and_commands_that_exist():
    from typer.main import get_command

    from orchestrator.cli import app

    guide = (ROOT / "docs" / "deploy.md").read_text()
    named = re.findall(r"deploy/[\w./-]*\w", guide)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    commands = set(re.findall(r"^(?:RAY_ADDRESS=\S+ )?troupe ([a-z-]+)", guide, re.MULTILINE))
    assert commands and commands <= set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
