"""Fine-tuning on one task of labelled texts: a YAML and data in, a classifier out."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mosaicbert import run
from mosaicbert.batch import Loader
from mosaicbert.cli import guarded, parse
from mosaicbert.config import ClassifyConfig, load_config
from mosaicbert.data.classification import build_classification_loader
from mosaicbert.data.examples import (
    Examples,
    class_weights,
    folds,
    read_examples,
    read_training,
    sample_examples,
)
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.data.tokens import TokenExamples, read_sentences, read_token_examples
from mosaicbert.errors import ConfigError
from mosaicbert.launch import add_launch_arguments, launch
from mosaicbert.models.build import build_model, is_packed
from mosaicbert.models.checkpoints import load_weights
from mosaicbert.models.register import Task
from mosaicbert.predict.predictor import Predictor
from mosaicbert.predict.review import review
from mosaicbert.train.best import Best
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.metrics import (
    MetricFactory,
    classification_metric,
    multilabel_metric,
    regression_metric,
    token_metric,
)
from mosaicbert.train.record import Logger, TrainResult

log = logging.getLogger(__name__)

Labelled = Examples | TokenExamples
DataHook = Callable[[str], Examples]
"""`split -> Examples`: where the data come from when the YAML has no `data` section."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of labels needs: a head, a loss, scores."""

    task: Task
    problem_type: str | None
    metric: Callable[..., MetricFactory]
    scores: tuple[str, ...]


KINDS = {
    "classification": Kind(
        "classification", "single_label_classification", classification_metric, ("accuracy", "f1")
    ),
    "multilabel": Kind(
        "classification", "multi_label_classification", multilabel_metric, ("micro_f1", "macro_f1")
    ),
    "regression": Kind(
        "classification", "regression", regression_metric, ("spearman", "pearson", "mse")
    ),
    "token_classification": Kind(
        "token-classification", None, token_metric, ("entity_f1", "accuracy")
    ),
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
    config = load_config(ClassifyConfig, source, overrides)
    if config.data is not None and config.data.folds is not None:
        raise ConfigError("data.folds makes several runs: call cross_validate, or leave it out.")
    return _classify(config, build_data)[0]


def cross_validate(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> list[TrainResult]:
    """The runs of `data.folds`, one after the other. Raises what `classify` does."""
    return _classify(load_config(ClassifyConfig, source, overrides), sample_examples)


def _classify(config: ClassifyConfig, build_data: DataHook) -> list[TrainResult]:
    parts = read_data(config, build_data)
    ranks = run.start(config)
    try:
        if len(parts) == 1:
            return [_finetune_and_review(config, *parts[0], ranks)]
        results = []
        for number, (train, validation) in enumerate(parts, 1):
            log.info("Fold %d of %d.", number, len(parts))
            named = config.model_copy(update={"run_name": f"{config.run_name}-fold{number}"})
            results.append(_finetune_and_review(named, train, validation, ranks))
        return results
    finally:
        ranks.close()


def read_data(config: ClassifyConfig, build_data: DataHook) -> list[tuple[Labelled, Labelled]]:
    """Pairs (train, validation): one, or one for each of `data.folds`.

    Raises:
        ConfigError, DataError: what is wrong with keys or files.
    """
    data, num_labels, seed = config.data, config.model.num_labels, config.seed
    if data is None:
        train, validation = (
            build_data(loader.split) for loader in (config.train_loader, config.eval_loader)
        )
        if train.label_names != validation.label_names:
            raise ConfigError(
                f"The classes of the training data are {train.label_names}, those of the "
                f"validation data {validation.label_names}: give both the same names."
            )
        return [(train, validation)]
    of_tokens = data.task == "token_classification"
    if data.folds is None:
        read = read_token_examples if of_tokens else read_examples
        return [read(data, num_labels=num_labels, seed=seed)]
    if data.validation is not None:
        raise ConfigError(
            f"data.folds: {data.folds} validates on parts of data.train, so data.validation "
            f"({data.validation}) would not be used. Leave one of the two keys out."
        )
    for key in ("run_folder", "save_folder"):
        folder = getattr(config, key)
        if folder is not None and "{run_name}" not in folder:
            raise ConfigError(f"{key}: {folder} must have {{run_name}} in it, to tell folds apart.")
    if of_tokens:
        return list(folds(read_sentences(data, num_labels=num_labels), data.folds, seed))
    return list(folds(read_training(data, num_labels=num_labels), data.folds, seed))


def _finetune_and_review(
    config: ClassifyConfig, train: Labelled, validation: Labelled, ranks: Ranks
) -> TrainResult:
    def after(predictor: Predictor) -> None:
        if config.run_folder is None:
            return
        limit = len(validation)
        if config.eval_subset_num_batches not in (None, -1):
            batch = config.device_eval_batch_size * ranks.world_size
            limit = min(limit, config.eval_subset_num_batches * batch)
        folder = Path(config.run_folder.replace("{run_name}", config.run_name))
        review(folder, validation.take(range(limit)), predictor, ranks)

    return finetune(config, train, {"eval": validation}, ranks=ranks, after=after)


def finetune(
    config: ClassifyConfig,
    train: Labelled,
    validation: Mapping[str, Labelled],
    *,
    ranks: Ranks,
    metrics: Sequence[str] = (),
    new_head: bool = False,
    more_loggers: Sequence[Logger] = (),
    after: Callable[[Predictor], None] | None = None,
) -> TrainResult:
    """Fine-tune on examples and evaluate on each set of `validation`.

    Args:
        metrics: names of the metrics; default: the configuration's, or those of the kind of labels.
        new_head: leave the classifier of `load_path` out, as when it is another task's.
        after: called with the model that the run ended with (`keep`).
    """
    kind = KINDS[train.kind]
    scores, factory = _scores(kind, train, tuple(metrics or config.metrics))
    best = _best(config, scores, next(iter(validation)))
    tokenizer = load_tokenizer(config.tokenizer_name)
    tokenizer.model_max_length = config.max_seq_len  # what `predict` cuts texts to
    model = _model(config, train, len(tokenizer))
    if start := run.starting_weights(config):
        with run.naming("load_path"):
            load_weights(model, start, new_head=new_head)
    if config.class_weights is not None:
        model.class_weights = _weights(train)

    graphs = run.wants_graphs(config, ranks, is_packed(model))
    config = config.model_copy(update={"cuda_graphs": graphs})
    loader = partial(_loader, config, ranks, tokenizer, model)
    result = run.train(
        model,
        loader(train, training=True),
        {name: (loader(part, training=False), factory) for name, part in validation.items()},
        config=config.model_copy(update={"load_path": None}),
        ranks=ranks,
        tokenizer=tokenizer,
        more_loggers=more_loggers,
        best=best,
    )
    if best is not None:
        log.info("Best evaluation: %s.", best.summary())
    if after is not None:
        if best is not None and best.keep and result.checkpoint:
            checkpoint = result.checkpoint
            ranks.from_first(lambda: load_weights(model, checkpoint))
            ranks.broadcast_(list(model.state_dict().values()))
        compiled = run.wants_compile(config, ranks)  # other shapes here, run once: not worth it
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            after(Predictor(model, kind.task, tokenizer, config.max_seq_len))
    return result


def _scores(
    kind: Kind, train: Labelled, asked: tuple[str, ...]
) -> tuple[tuple[str, ...], MetricFactory]:
    """The names of the metrics (`asked`, else those of the kind of labels), and their factory."""
    if not isinstance(train, TokenExamples):
        return asked or kind.scores, kind.metric(asked or kind.scores)
    has_entities = "O" in train.label_names  # else parts of speech and the like
    scores = asked or (kind.scores if has_entities else ("accuracy", "macro_f1"))
    return scores, kind.metric(scores, train.label_names)


def _loader(
    config: ClassifyConfig,
    ranks: Ranks,
    tokenizer: PreTrainedTokenizerFast,
    model: nn.Module,
    examples: Labelled,
    *,
    training: bool,
) -> Loader:
    settings = config.train_loader if training else config.eval_loader
    if training:
        device_samples = run.microbatch_samples(config, ranks, config.max_seq_len, model)
        global_samples = config.global_train_batch_size
    else:
        device_samples = config.device_eval_batch_size
        global_samples = device_samples * ranks.world_size
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
        multiple=run.GRAPH_MULTIPLE if training and config.cuda_graphs else 1,
    )


def _model(config: ClassifyConfig, train: Labelled, vocab_size: int) -> nn.Module:
    kind, num_labels = KINDS[train.kind], config.model.num_labels or train.num_labels
    if num_labels != train.num_labels:
        raise ConfigError(
            f"model.num_labels is {num_labels}, but the data have {train.num_labels}. "
            "Leave the key out to take it from the data."
        )
    with run.naming_model(config.model):
        model: Any = build_model(
            config.model,
            kind.task,
            num_labels=num_labels,
            problem_type=kind.problem_type,
            algorithms=config.algorithms,
            max_seq_len=config.max_seq_len,
            vocab_size=vocab_size,
        )
    if train.label_names:
        model.config.id2label = dict(enumerate(train.label_names))
        model.config.label2id = {name: index for index, name in enumerate(train.label_names)}
    return model  # type: ignore[no-any-return]


def _best(config: ClassifyConfig, scores: Sequence[str], evaluation: str) -> Best | None:
    """What `keep`, `early_stopping` and `best_metric` ask for."""
    if config.keep == "last" and config.early_stopping is None:
        if config.best_metric is not None:
            raise ConfigError("best_metric is used by keep: best and early_stopping; set one.")
        return None
    metric = config.best_metric or scores[0]
    if metric not in ("loss", *scores):
        raise ConfigError(
            f"best_metric: {metric} is not measured. Choose loss, {', '.join(scores)}, or add it "
            "to metrics."
        )
    if config.keep == "best" and (
        config.save_folder is None or config.save_num_checkpoints_to_keep == 0
    ):
        raise ConfigError(
            "keep: best needs a save_folder for checkpoints (and save_num_checkpoints_to_keep "
            "above 0, or -1 for all)."
        )
    return Best(f"metrics/{evaluation}/{metric}", config.keep == "best", config.early_stopping)


def _weights(train: Labelled) -> Tensor:
    """`(num_labels,)`, 1 in the mean over the samples: the scale of the loss stays as it is."""
    if train.kind != "classification":
        raise ConfigError(f"class_weights: balanced is for classification, not {train.kind}.")
    return torch.from_numpy(class_weights(train))


# --- command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value words that win over the file")
    add_launch_arguments(parser)


def main(args: argparse.Namespace, build_data: DataHook = sample_examples) -> int:
    """Check the YAML, start the ranks there should be, fine-tune."""
    config = load_config(ClassifyConfig, args.config, args.overrides)

    def job() -> int:
        results = _classify(config, build_data)
        for number, result in enumerate(results, 1):
            fold = f", fold {number}" if len(results) > 1 else ""
            run.print_result(result, f"{config.run_name}: fine-tuned{fold}")
        if len(results) > 1:
            print_folds(results)
        return 0

    return launch(args, job, device=config.device)


def print_folds(results: Sequence[TrainResult]) -> None:
    """Mean and standard deviation (of a sample) of each metric over the folds."""
    width = max(map(len, results[0].metrics))
    print(f"{len(results)} folds: mean and standard deviation")
    for name in sorted(results[0].metrics):
        values = torch.tensor([result.metrics[name] for result in results], dtype=torch.float64)
        print(f"  {name:<{width}}  {values.mean():.4f}  {values.std():.4f}")


def command(words: Sequence[str], build_data: DataHook) -> int:
    """The command line of `sequence_classification.py`, with its own `build_my_data`."""
    parser = argparse.ArgumentParser(
        prog="sequence_classification.py", description="Fine-tuning on one task from a YAML."
    )
    add_arguments(parser)
    return guarded(lambda: main(parse(parser, words), build_data))
