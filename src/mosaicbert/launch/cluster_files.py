"""The three kinds of cluster file: a Slurm batch script, a Kubernetes JobSet, a SkyPilot task.

In each, one command a machine starts that machine's ranks (`mosaicbert.launch`), and a job that is
restarted goes on from its last checkpoint where it has a `save_folder`.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from mosaicbert.errors import ConfigError

PORT = 29500
DEFAULT_IMAGE = "mosaicbert:latest"
WORKSPACE = "/workspace"
CONFIG_FOLDER = "/etc/mosaicbert"


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """A job and the machines it wants."""

    command: list[str]
    """With `{config}` where the path of the configuration goes."""
    config: str
    name: str
    nodes: int
    gpus: int
    gpu_type: str | None
    image: str | None
    environ: dict[str, str]
    preparation: list[str]
    """Commands before the job, one a line."""
    left_out: list[str]
    cpus: int
    time: str
    partition: str | None
    account: str | None
    volume: str | None
    secret: str | None

    @property
    def group(self) -> dict[str, str]:
        """Variables that make the machines one run; GLUE's jobs share a machine on their own."""
        is_one_run = self.command[1] != "glue"
        sizes = {"WORLD_SIZE": str(self.nodes * self.gpus), "MASTER_PORT": str(PORT)}
        return sizes if is_one_run else {}

    def words(self, config_path: str) -> list[str]:
        """The command with the path of the configuration in it."""
        return [config_path if word == "{config}" else word for word in self.command]

    def line(self, config_path: str) -> str:
        """The command as a shell takes it; `config_path` may hold a variable."""
        parts = [f'"{config_path}"' if w == "{config}" else shlex.quote(w) for w in self.command]
        return " ".join(parts)

    def exports(self) -> list[str]:
        """Lines that set the job's own variables."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environ.items()]

    def notes(self, kind: str, hand_in: str) -> list[str]:
        """What the head of the file says."""
        lines = [f"Made by mosaicbert launch --to {kind}. Hand it in with {hand_in}"]
        return lines + [f"Not carried over: {' '.join(line.split())}" for line in self.left_out]


def render_slurm(job: ClusterJob) -> str:
    """A batch script: one task a machine; SIGTERM two minutes before the end saves a checkpoint."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus * job.gpus,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": "TERM@120",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    container, prepare = "", ""
    if job.image:
        mounts = '--container-mounts="$PWD" --container-workdir="$PWD"'
        container = f"--container-image={shlex.quote(job.image)} {mounts} "
        prepare = f"srun --nodes=1 --ntasks=1 --cpus-per-task={job.cpus * job.gpus} {container}"
    lines = [
        "#!/bin/bash",
        *(f"# {note}" for note in job.notes("slurm", "sbatch FILE")),
        *head,
        "#SBATCH --requeue",
        "set -euo pipefail",
        "",
        *_write_config('"$config"', job, 'config="$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.yaml"'),
        "",
        *job.exports(),
        *(f"{prepare}{line}" for line in job.preparation),
        f"exec srun --kill-on-bad-exit=1 {container}{job.line('$config')}",
    ]
    return "\n".join(lines) + "\n"


def render_skypilot(job: ClusterJob) -> str:
    """A task; the package is installed from the folder that `sky launch` is called in."""
    if job.gpu_type is None:
        raise ConfigError("--to skypilot needs --gpu_type, such as H100 or A100-80GB.")
    group = [
        "export NODE_RANK=$SKYPILOT_NODE_RANK",
        'export MASTER_ADDR=$(head -n 1 <<< "$SKYPILOT_NODE_IPS")',
        *(f"export {name}={value}" for name, value in job.group.items()),
    ]
    run = [
        "set -euo pipefail",
        *_write_config("config.yaml", job),
        *(group if job.group else []),
        *job.preparation,
        f"exec {job.line('config.yaml')}",
    ]
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{job.gpu_type}:{job.gpus}"},
    }
    if job.image:
        task["resources"]["image_id"] = f"docker:{job.image}"
    else:
        task |= {"workdir": ".", "setup": "pip install .\n"}
    if job.environ:
        task["envs"] = job.environ
    task["run"] = "\n".join(run) + "\n"
    return _yaml([task], job.notes("skypilot", "sky launch FILE (sky jobs launch: it restarts)"))


def render_kubernetes(job: ClusterJob) -> str:
    """A ConfigMap and a JobSet (jobset.x-k8s.io): one pod a machine, restarted whole on failure."""
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {"config.yaml": job.config},
    }
    pods = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": _pod(job)},
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "failurePolicy": {"maxRestarts": 3},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": pods}}],
        },
    }
    return _yaml([config_map, job_set], job.notes("kubernetes", "kubectl apply -f FILE"))


def _pod(job: ClusterJob) -> dict[str, Any]:
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    place: list[dict[str, Any]] = [
        {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "MASTER_ADDR", "value": f"{job.name}-node-0-0.{job.name}"},
    ]
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER},
        {"name": "workspace", "mountPath": WORKSPACE},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": job.name}},
        {"name": "workspace", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    if job.volume:
        claim, colon, path = job.volume.partition(":")
        if not colon or not path.startswith("/"):
            raise ConfigError(f"--volume {job.volume}: write CLAIM:/path.")
        mounts.append({"name": "data", "mountPath": path})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
    container: dict[str, Any] = {
        "image": job.image or DEFAULT_IMAGE,
        "workingDir": WORKSPACE,
        "env": [
            *(place if job.group else []),
            *({"name": name, "value": value} for name, value in (job.group | job.environ).items()),
        ],
        "volumeMounts": mounts,
    }
    if job.secret:
        container["envFrom"] = [{"secretRef": {"name": job.secret}}]
    train = {
        "name": "train",
        "command": job.words(f"{CONFIG_FOLDER}/config.yaml"),
        **container,
        "resources": {
            "requests": {"cpu": job.cpus * job.gpus},
            "limits": {"nvidia.com/gpu": job.gpus},
        },
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # for a checkpoint
        # The image's user must be able to write to the volumes.
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000},
        "containers": [train],
        "volumes": volumes,
    }
    if job.preparation:
        script = "\n".join(["set -eu", *job.preparation]) + "\n"
        prepare = {"name": "prepare", "command": ["sh", "-c", script], **container}
        pod["initContainers"] = [prepare]
    return pod


def _write_config(path: str, job: ClusterJob, *before: str) -> list[str]:
    """Shell lines that write the configuration to a file; no YAML of a job has the end mark."""
    lines = job.config.rstrip("\n").split("\n")
    return [*before, f"cat > {path} <<'END_OF_CONFIG'", *lines, "END_OF_CONFIG"]


class _Dumper(yaml.SafeDumper):
    """Longer texts as blocks, and no anchors, as one would write them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _yaml(documents: list[dict[str, Any]], notes: list[str]) -> str:
    for document in documents:
        _forbid_trailing_blanks(document)
    dumped = [
        yaml.dump(d, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
        for d in documents
    ]
    return "".join(f"# {note}\n" for note in notes) + "---\n".join(dumped)


def _forbid_trailing_blanks(value: Any) -> None:
    """YAML cannot write a text as a block where a line of it ends in a blank: strip those."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, str) and "\n" in inner:
            value[key] = "\n".join(line.rstrip() for line in inner.expandtabs(2).split("\n"))
        else:
            _forbid_trailing_blanks(inner)


@dataclass(frozen=True, slots=True)
class Renderer:
    """A kind of file, and the command that takes it."""

    render: Callable[[ClusterJob], str]
    command: str


RENDERERS = {
    "slurm": Renderer(render_slurm, "sbatch {file}"),
    "kubernetes": Renderer(render_kubernetes, "kubectl apply -f {file}"),
    "skypilot": Renderer(render_skypilot, "sky launch {file}"),
}
