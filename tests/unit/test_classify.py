"""Joining of data, model and training for one task; and what a run leaves to read."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from tiny_run import ALONE

from mosaicbert.config import ClassifyConfig, check
from mosaicbert.data.examples import Examples
from mosaicbert.data.tokens import TokenExamples
from mosaicbert.duration import Progress
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.finetuning import KINDS, classify, print_folds, read_data
from mosaicbert.models.heads import PROBLEM_TYPES
from mosaicbert.models.register import TASKS
from mosaicbert.predict import review
from mosaicbert.train.record import TrainResult

YAML = {
    "max_seq_len": 16,
    "model": {
        "pretrained_model_name": "prajjwal1/bert-tiny",
        "model_config": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1},
    },
    "data": {"train": "a.csv", "validation_fraction": 0.25},
    "train_loader": {"split": "train"},
    "eval_loader": {"split": "validation"},
    "max_duration": "2ba",
    "global_train_batch_size": 8,
    "progress_bar": False,
    "log_to_console": False,
}


def write_rows(folder, num_rows=24, classes="ab"):
    rows = [f"text {i},{classes[i % len(classes)]}\n" for i in range(num_rows)]
    (folder / "a.csv").write_text("text,label\n" + "".join(rows))


def test_kinds_name_what_models_know():
    assert {kind.task for kind in KINDS.values()} <= set(TASKS)
    assert {kind.problem_type for kind in KINDS.values()} == {None, *PROBLEM_TYPES}
    for name, kind in KINDS.items():
        assert kind.metric(kind.scores, *(["O", "B-X"],) * (name == "token_classification"))


def test_a_fold_without_a_score_does_not_keep_the_others_from_being_shown(capsys):
    scores = ({"a": 0.25, "b": 0.5}, {"a": 0.75, "b": math.nan})
    print_folds([TrainResult(Progress(), 1.0, found, None, 1.0, 1.0) for found in scores])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["a", "0.5000", "0.3536"], ["b", "nan", "nan"]]


def test_folds_validate_on_every_row_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    config = check(ClassifyConfig, YAML | {"data": {"train": "a.csv", "folds": 3}})
    parts = read_data(config, lambda split: pytest.fail("the YAML has data"))
    assert sorted(text for _, part in parts for text in part.texts) == sorted(
        f"text {i}" for i in range(24)
    )
    for train, validation in parts:
        assert not set(train.texts) & set(validation.texts)
        assert np.bincount(validation.labels).tolist() == [4, 4]
    with pytest.raises(ConfigError, match="cross_validate"):
        classify(YAML | {"data": {"train": "a.csv", "folds": 3}})


def test_a_run_on_weighed_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, classes="aaab")
    keys = {"class_weights": "balanced", "metrics": ["macro_f1"], "save_folder": "{run_name}/c"}
    result = classify(YAML | keys, ["run_name=x", "keep=best", "best_metric=loss"])
    assert set(result.metrics) == {"metrics/eval/loss", "metrics/eval/macro_f1"}
    assert result.checkpoint == "x/c/ep0-ba2"
    tokenizer = json.loads((tmp_path / "x/c/best/tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 16
    errors = (tmp_path / "runs/x/errors.jsonl").read_text().splitlines()
    with (tmp_path / "runs/x/confusion.csv").open() as file:
        counts = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert sum(map(sum, counts)) == 6
    assert len(errors) == 6 - counts[0][0] - counts[1][1]


# --- the review -----------------------------------------------------------------------------------

LOGITS = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float32))


def errors_of(examples, found, tmp_path, monkeypatch, ranks=ALONE):
    monkeypatch.setattr(review, "outputs", lambda predictor, part: [found[k] for k in keys(part)])
    review.review(tmp_path, examples, None, ranks)
    return [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]


def keys(part):
    return [int(text[-1]) for text in (part.words[:] if hasattr(part, "words") else part.texts)]


def test_the_end_is_saved_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    keys = {"run_folder": None, "save_folder": "ck", "save_interval": "3ba", "max_duration": "4ba"}
    result = classify(YAML | keys | {"save_at_end": False})
    assert [path.name for path in tmp_path.glob("ck/ep*")] == ["ep1-ba3"]
    assert result.checkpoint.endswith("ep1-ba3")
    result = classify(YAML | keys | {"autoresume": True})
    assert result.checkpoint.endswith("-ba4")
    assert not (tmp_path / "runs").exists()


def test_the_share_that_the_console_shows_is_of_the_batches_there_will_be(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    keys = {"train_subset_num_batches": 2, "max_duration": "2ep", "log_to_console": True}
    classify(YAML | keys)
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    shares = [words[2] for words in shown if words[0] == "ba"]
    assert shares == ["25%", "50%", "75%", "100%"]


def test_a_run_that_is_refused_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    keys = {"save_folder": "ck", "run_folder": "run"}
    classify(YAML | keys)
    (tmp_path / "run/report.html").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="another run's checkpoints"):
        classify(YAML | keys)
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_come_most_confident_first(tmp_path, monkeypatch):
    texts = ["text 0", "text 1", "text 2"]
    examples = Examples(texts, texts, np.array([1, 1, 0]), ("no", "yes"), "classification")
    errors = errors_of(examples, LOGITS, tmp_path, monkeypatch)
    assert errors == [
        {
            "probability": 0.9,
            "label": "yes",
            "predicted": "no",
            "text": "text 0",
            "text_2": "text 0",
        },
        {
            "probability": 0.8,
            "label": "no",
            "predicted": "yes",
            "text": "text 2",
            "text_2": "text 2",
        },
    ]
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == ["true \\ predicted,no,yes", "no,0,1", "yes,1,1"]


def test_errors_of_other_kinds(tmp_path, monkeypatch):
    texts = ["text 0", "text 1", "text 2"]
    numbers = Examples(texts, None, np.array([1.0, 2.0, 3.0], np.float32), None, "regression")
    errors = errors_of(numbers, np.array([[1.5], [4.0], [3.0]]), tmp_path, monkeypatch)
    assert [error["text"] for error in errors] == ["text 1", "text 0", "text 2"]
    assert errors[0]["predicted"] == 4.0
    assert not (tmp_path / "confusion.csv").exists()
    switches = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    several = Examples(texts, None, switches, ("a", "b"), "multilabel")
    found = np.array([[2.0, -2.0], [-1.0, -1.0], [-3.0, 1.0]])
    errors = errors_of(several, found, tmp_path, monkeypatch)
    assert [(e["label"], e["predicted"]) for e in errors] == [(["a", "b"], ["b"]), (["b"], [])]
    assert errors[0]["probability"] == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-6)


def test_errors_of_tags(tmp_path, monkeypatch):
    words = [["w", "0"], ["w", "1"]]
    tags = TokenExamples(words, [np.array([0, 1]), np.array([1, 1])], ("O", "B-X"))
    found = {0: np.array([[0.9, 0.1], [0.2, 0.8]]), 1: np.array([[0.7, 0.3], [0.4, 0.6]])}
    monkeypatch.setattr(review, "outputs", lambda predictor, part: [found[i] for i in (0, 1)])
    review.review(tmp_path, tags, None, ALONE)
    (error,) = map(json.loads, (tmp_path / "errors.jsonl").read_text().splitlines())
    assert error == {
        "probability": 0.7,
        "tokens": ["w", "1"],
        "label": ["B-X", "B-X"],
        "predicted": ["O", "B-X"],
    }
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1:] == ["O,1,0", "B-X,1,2"]


class FirstOfThree:
    """Ranks as rank 0 of 3 sees them; what the others send was worked out beforehand."""

    rank, world_size, is_first = 0, 3, True

    def __init__(self, others):
        self.others = others

    def gather(self, mine):
        return [mine, *self.others]


def test_ranks_share_the_review(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(4)]
    found = np.array([[3.0, 0], [0, 3.0], [3.0, 0], [0, 3.0]])
    examples = Examples(texts, None, np.array([0, 1, 0, 0]), ("no", "yes"), "classification")
    ranks = FirstOfThree([[found[1]], [found[2]]])
    errors = errors_of(examples, found, tmp_path, monkeypatch, ranks)
    assert [error["text"] for error in errors] == ["text 3"]


def test_weights_to_start_from(tmp_path, monkeypatch):
    """`{run_name}` and `latest` are understood; where autoresume goes on, they are not needed."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    keys = {"run_folder": None, "run_name": "one", "save_folder": "{run_name}/ck"}
    first = classify(YAML | keys | {"max_duration": "2ba"})
    other = {"save_folder": "other", "load_path": "{run_name}/ck/latest"}
    second = classify(YAML | keys | other | {"max_duration": "2ba"})
    assert first.checkpoint != second.checkpoint
    shutil.rmtree("one")
    resumed = classify(YAML | keys | other | {"max_duration": "4ba", "autoresume": True})
    assert resumed.checkpoint.endswith("-ba4")
    with pytest.raises(CheckpointError, match="one/ck/latest does not exist"):
        classify(YAML | keys | other | {"save_folder": "fresh", "max_duration": "2ba"})
