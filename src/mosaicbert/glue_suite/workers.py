"""Who runs the jobs: one process, several a GPU or on a CPU, or a Ray cluster."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from mosaicbert.config import ClassifyConfig, GlueConfig
from mosaicbert.executors import Executor, LocalProcesses, RayTasks, start_service
from mosaicbert.glue_suite.jobs import run_job
from mosaicbert.glue_suite.planning import GlueJob

log = logging.getLogger(__name__)

MOST_JOBS_PER_GPU = 8
"""More of them only take turns: a job alone keeps a GPU busy for about a sixth of the time."""
CONTEXT_BYTES = 1.5e9
"""What a process takes on a GPU before it has a model: CUDA context, workspaces of libraries."""
BYTES_PER_PARAMETER = 18
"""Weight, gradient and two moments in fp32, and a copy of the weight in bf16."""
ACTIVATION_BYTES = 48
"""For each token, layer and hidden unit in bf16 (Korthikanti et al. 2022, arXiv:2205.05198, have 34
of layers without attention matrices; measured with HF BERT base: 38); in fp32 twice that."""
SHARE_OF_FREE = 0.9


def build_executor(config: GlueConfig, jobs: Sequence[GlueJob], engine: str) -> Executor:
    """The workers that `parallel`, `jobs_per_gpu` and `device` ask for, warming up.

    Raises:
        ConfigError: `engine` is `ray`, and there is no Ray or no GPU in its cluster.
    """
    if engine == "ray":
        per_gpu = 1 if config.jobs_per_gpu == "auto" else config.jobs_per_gpu
        share = 0.0 if config.device == "cpu" else 1 / per_gpu
        return RayTasks(run_job, num_gpus=share, or_cpu=config.device is None)
    found = slots(config, jobs)
    service = None
    if config.cuda_mps is not False and _share_a_gpu(found):
        service = start_service(is_asked=config.cuda_mps is True)
    if service is None:
        workers = LocalProcesses(run_job, found)
    else:
        found = [{**slot, **service.environment} for slot in found]
        workers = LocalProcesses(run_job, found, at_end=service.close)
    workers.prepare(import_all)
    return workers


def _share_a_gpu(environments: Sequence[dict[str, str]]) -> bool:
    gpus = [env["CUDA_VISIBLE_DEVICES"] for env in environments if "CUDA_VISIBLE_DEVICES" in env]
    return len(gpus) > len(set(gpus))


def import_all() -> None:
    """Pay for slow imports while the parent still looks at the data."""
    import sklearn.metrics  # noqa: F401

    import mosaicbert.finetuning  # noqa: F401


def slots(config: GlueConfig, jobs: Sequence[GlueJob]) -> list[dict[str, str]]:
    """The environments of the processes to run side by side, no more than there are jobs."""
    import torch

    if not config.parallel:
        return [{}]
    cores = len(os.sched_getaffinity(0))
    num_gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    if not num_gpus:
        return [{"OMP_NUM_THREADS": "1"} for _ in range(min(cores, max(1, len(jobs))))]
    if config.jobs_per_gpu == "auto":
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(num_gpus))
        per_gpu = jobs_that_fit(jobs, free, max(1, cores // num_gpus))
    else:
        per_gpu = config.jobs_per_gpu
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // (per_gpu * num_gpus)))}
    found = [threads | {"CUDA_VISIBLE_DEVICES": name} for _ in range(per_gpu) for name in names]
    return found[: max(1, len(jobs))]


def jobs_that_fit(jobs: Sequence[GlueJob], free_bytes: float, cores_per_gpu: int) -> int:
    """How many jobs to run on one GPU at once: by memory, processor cores, and use."""
    largest = max(jobs, key=lambda job: microbatch_tokens(job.config))
    need = estimate_bytes(largest.config)
    by_memory = int(SHARE_OF_FREE * free_bytes / need)
    found = max(1, min(by_memory, cores_per_gpu, MOST_JOBS_PER_GPU))
    log.info(
        "jobs_per_gpu: auto: %d. The largest job is estimated at %.1f GB of %.1f GB free, there "
        "are %d cores a GPU, and more than %d jobs only take turns.",
        found,
        need / 1e9,
        free_bytes / 1e9,
        cores_per_gpu,
        MOST_JOBS_PER_GPU,
    )
    return found


def microbatch_tokens(config: ClassifyConfig) -> int:
    """Tokens that a job's model takes at a time, were all texts of full length."""
    asked, batch = config.device_train_microbatch_size, config.global_train_batch_size
    samples = batch if isinstance(asked, str) else min(asked, batch)
    return samples * config.max_seq_len


def estimate_bytes(config: ClassifyConfig) -> float:
    """Memory of a GPU that a job takes at most, by its model's shape and its microbatch."""
    import torch

    from mosaicbert.data.tokenizers import load_tokenizer
    from mosaicbert.models.build import build_model

    shape = config.model.model_copy(update={"use_pretrained": False, "pretrained_checkpoint": None})
    with torch.device("meta"):
        model: Any = build_model(
            shape,
            "classification",
            algorithms=config.algorithms,
            max_seq_len=config.max_seq_len,
            vocab_size=len(load_tokenizer(config.tokenizer_name)),
        )
    size = ACTIVATION_BYTES * (2 if config.precision == "fp32" else 1)
    width: int = model.config.num_hidden_layers * model.config.hidden_size
    parameters: int = sum(p.numel() for p in model.parameters())
    activations = microbatch_tokens(config) * width * size
    return CONTEXT_BYTES + BYTES_PER_PARAMETER * parameters + activations
