"""In what each number of a YAML is counted, by the key's own name: the unit column of the
configuration reference.
"""

NO_UNIT = "-"
"""Of a name, a switch, a path, a section, and of a number that is only a number."""

UNITS = {
    "alpha_f": "share of the peak",
    "batch_size": "samples",
    "betas": "share",
    "cache_limit": "bytes, or as `50gb`",
    "clipping_threshold": "as the gradients",
    "cost_per_hour": "currency an hour",
    "default_seed": NO_UNIT,
    "device_eval_batch_size": "samples",
    "device_train_microbatch_size": "samples",
    "dist_timeout": "seconds",
    "download_retry": "tries",
    "download_timeout": "seconds",
    "early_stopping": "evaluations",
    "bos_token_id": "token id",
    "eos_token_id": "token id",
    "eps": NO_UNIT,
    "eval_subset_num_batches": "batches",
    "folds": "runs",
    "global_train_batch_size": "samples",
    "gpu_flops_available": "FLOP/s",
    "jobs_per_gpu": "jobs",
    "lr": "a step",
    "max_seq_len": "tokens",
    "mlm_probability": "share of tokens",
    "muon_lr": "a step",
    "muon_momentum": "share",
    "num_canonical_nodes": "machines",
    "num_labels": "classes",
    "num_workers": "processes",
    "predownload": "samples",
    "prefetch_factor": "batches",
    "proportion": "share",
    "repeat": "times an epoch",
    "samples": "samples an epoch",
    "save_num_checkpoints_to_keep": "checkpoints",
    "seed": NO_UNIT,
    "seeds": NO_UNIT,
    "shuffle_block_size": "samples",
    "shuffle_seed": NO_UNIT,
    "spike_factor": "times the median",
    "start": "samples",
    "timeout": "seconds",
    "train_subset_num_batches": "batches",
    "validation_fraction": "share",
    "weight_decay": "a step",
    "window_size": "batches",
}


def unit(key: str, kind: str) -> str:
    """The unit of a key by its dotted name and its kind (`reference.kind`).

    Raises:
        KeyError: a number's unit is not told here.
    """
    if kind == "time":
        return "as written"
    name = key.rpartition(".")[2]
    return UNITS[name] if "number" in kind or name in UNITS else NO_UNIT
