"""Fine-tuning on one task of labelled texts: a YAML and data in, a classifier out."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mosaicbert import run
from mosaicbert.cli import guarded, parse
from mosaicbert.config import ClassifyConfig, load_config
from mosaicbert.data.classification import build_classification_loader
from mosaicbert.data.examples import Examples, read_examples, sample_examples
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.errors import ConfigError
from mosaicbert.launch import add_launch_arguments, launch
from mosaicbert.models.build import build_model, is_packed
from mosaicbert.models.checkpoints import load_weights
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.metrics import MetricFactory, classification_metric, regression_metric
from mosaicbert.train.record import Logger, TrainResult

DataHook = Callable[[str], Examples]
"""`split -> Examples`: where the data come from when the YAML has no `data` section."""

DEFAULT_METRICS = {
    "classification": ("accuracy", "f1"),
    "regression": ("spearman", "pearson"),
    "multilabel": ("f1",),
}


def classify(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    build_data: DataHook = sample_examples,
) -> TrainResult:
    """Fine-tune as a YAML file (or a mapping of its content) says, in this process.

    Raises:
        ConfigError, DataError, CheckpointError: for what the user can mend.
        TrainingError: the run cannot go on.
    """
    return _classify(load_config(ClassifyConfig, source, overrides), build_data)


def _classify(config: ClassifyConfig, build_data: DataHook) -> TrainResult:
    if config.data is not None:
        train, validation = read_examples(
            config.data, num_labels=config.model.num_labels, seed=config.seed
        )
    else:
        train = build_data(config.train_loader.split)
        validation = build_data(config.eval_loader.split)
    ranks = run.start(config)
    try:
        return finetune(config, train, {"eval": validation}, ranks=ranks)
    finally:
        ranks.close()


def finetune(
    config: ClassifyConfig,
    train: Examples,
    validation: Mapping[str, Examples],
    *,
    ranks: Ranks,
    metrics: Sequence[str] = (),
    new_head: bool = False,
    more_loggers: Sequence[Logger] = (),
) -> TrainResult:
    """Fine-tune on examples and evaluate on each set of `validation`.

    Args:
        metrics: names of the metrics; default: those of the kind of labels.
        new_head: leave the classifier of `load_path` out, as when it is another task's.
    """
    num_labels = config.model.num_labels or train.num_labels
    if num_labels != train.num_labels:
        raise ConfigError(
            f"model.num_labels is {num_labels}, but the data have {train.num_labels}. "
            "Leave the key out to take it from the data."
        )
    tokenizer = load_tokenizer(config.tokenizer_name)
    model: Any = build_model(
        config.model,
        "classification",
        num_labels=num_labels,
        problem_type=_PROBLEM_TYPES[train.kind],
        algorithms=config.algorithms,
        max_seq_len=config.max_seq_len,
        vocab_size=len(tokenizer),
    )
    if train.label_names:
        model.config.id2label = dict(enumerate(train.label_names))
        model.config.label2id = {name: index for index, name in enumerate(train.label_names)}
    if config.load_path:
        load_weights(model, config.load_path, new_head=new_head)

    def loader(examples: Examples, training: bool) -> Any:
        settings = config.train_loader if training else config.eval_loader
        device_samples = (
            run.microbatch_samples(config, ranks, config.max_seq_len)
            if training
            else config.device_eval_batch_size
        )
        global_samples = (
            config.global_train_batch_size if training else device_samples * ranks.world_size
        )
        return build_classification_loader(
            examples,
            tokenizer,
            max_seq_len=settings.max_seq_len or config.max_seq_len,
            batch_size=global_samples,
            microbatch_samples=device_samples,
            rank=ranks.rank,
            world_size=ranks.world_size,
            packed=is_packed(model),
            grid=run.wants_compile(config, ranks),
            shuffle=settings.shuffle,
            drop_last=settings.drop_last,
            seed=config.seed,
        )

    factory = _metric(train, tuple(metrics) or DEFAULT_METRICS[train.kind])
    return run.train(
        model,
        loader(train, True),
        {name: (loader(part, False), factory) for name, part in validation.items()},
        config=config.model_copy(update={"load_path": None}),
        ranks=ranks,
        tokenizer=tokenizer,
        more_loggers=more_loggers,
    )


_PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multilabel": "multi_label_classification",
}


def _metric(examples: Examples, names: tuple[str, ...]) -> MetricFactory:
    if examples.kind == "regression":
        return regression_metric(names)
    return classification_metric(names)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    add_launch_arguments(parser)


def main(args: argparse.Namespace, build_data: DataHook = sample_examples) -> int:
    """Check the YAML, start the ranks there should be, fine-tune."""
    config = load_config(ClassifyConfig, args.config, args.overrides)

    def job() -> int:
        result = _classify(config, build_data)
        run.print_result(result, f"{config.run_name}: fine-tuned")
        return 0

    return launch(args, job, device=config.device)


def command(words: Sequence[str], build_data: DataHook) -> int:
    """The command line of `sequence_classification.py`, with its own `build_my_data`."""
    parser = argparse.ArgumentParser(
        prog="sequence_classification.py", description="Fine-tuning on one task from a YAML."
    )
    add_arguments(parser)
    return guarded(lambda: main(parse(parser, words), build_data))
