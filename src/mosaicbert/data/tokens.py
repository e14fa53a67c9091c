"""Token classification: words with a tag each, such as named entities.

Two forms are read: CoNLL-style text (a word a line, the word first and the tag last, a blank line
after each sentence), and JSONL or parquet with a list of words and a list of tags on each row.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mosaicbert.batch import IGNORE_INDEX
from mosaicbert.config.jobs import OwnDataConfig
from mosaicbert.data.tables import half_character, read_table, text_lines
from mosaicbert.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

CONLL_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt")
SENTENCES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class TokenExamples:
    """Sentences of words; `tags[i]` is `(num_words,)` int64, an index into `label_names`."""

    words: list[list[str]]
    tags: list[NDArray[np.int64]]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @property
    def num_labels(self) -> int:
        """Tags there are."""
        return len(self.label_names)

    @property
    def kind(self) -> Literal["token_classification"]:
        """What tells these examples from `Examples`."""
        return "token_classification"

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> "TokenExamples":
        """Some of the sentences, in the order of `rows`."""
        words = [self.words[row] for row in rows]
        return TokenExamples(words, [self.tags[row] for row in rows], self.label_names)


def read_token_examples(
    config: OwnDataConfig, *, num_labels: int | None = None, seed: int = 17
) -> tuple[TokenExamples, TokenExamples]:
    """Training and validation sentences; the tags are learned from the training file, O first.

    Columns of JSONL and parquet are `data.text` and `data.label`, by default `tokens` and `tags`.

    Raises:
        DataError: what is wrong with a file, and where.
        ConfigError: `model.num_labels` is not the number of tags.
    """
    train = read_sentences(config, num_labels=num_labels)
    if config.validation is not None:
        sentences = _sentences(config.validation, config)
        return train, _encode(config.validation, sentences, train.label_names)
    held_out = round(len(train) * config.validation_fraction)
    if not 0 < held_out < len(train):
        raise DataError(
            f"data.validation_fraction {config.validation_fraction:g} of {len(train)} sentences "
            f"leaves {held_out} to validate. Use another fraction, or name a validation file."
        )
    order = np.random.default_rng(seed).permutation(len(train))
    return train.take(np.sort(order[held_out:])), train.take(np.sort(order[:held_out]))


def read_sentences(config: OwnDataConfig, *, num_labels: int | None = None) -> TokenExamples:
    """The whole training file. Raises what `read_token_examples` does."""
    sentences = list(_sentences(config.train, config))
    counts = Counter(tag for _, _, tags in sentences for tag in tags)
    names = tuple(sorted(counts, key=lambda tag: (tag != "O", tag)))
    if len(names) < 2:
        raise DataError(f'{config.train}: every tag is "{names[0]}". Two are needed.')
    if num_labels not in (None, len(names)):
        raise ConfigError(
            f"model.num_labels is {num_labels}, but {config.train} has {len(names)} tags "
            f"({', '.join(names)}). Leave the key out: the number is learned."
        )
    return _encode(config.train, sentences, names)


Sentence = tuple[str, list[str], list[str]]  # where it stands, words, tags


def _sentences(path: str, config: OwnDataConfig) -> Iterator[Sentence]:
    if path == "sample":
        raise ConfigError("data.train: the bundled sample has no tags; name a file.")
    is_conll = path.lower().removesuffix(".gz").endswith(CONLL_SUFFIXES)
    found = False
    for where, words, tags in _conll(path) if is_conll else _rows(path, config):
        found = True
        if not words or len(words) != len(tags):
            raise DataError(f"{where}: {len(words)} words and {len(tags)} tags.")
        empty = [i + 1 for i, pair in enumerate(zip(words, tags, strict=True)) if not all(pair)]
        if empty:
            raise DataError(f"{where}: word {empty[0]} or its tag is empty.")
        yield where, words, tags
    if not found:
        raise DataError(f"{path} has no sentences.")


def _conll(path: str | Path) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    num_columns = first_line = 0
    for number, line in enumerate(text_lines(path), 1):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            if words:
                yield f"{path}, line {first_line}", words, tags
            words, tags = [], []
            continue
        num_columns = num_columns or len(cells)
        if len(cells) < 2 or len(cells) != num_columns:
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns where "
                f"{'two or more' if num_columns < 2 else num_columns} are expected: a word first, "
                "its tag last, blank lines between sentences."
            )
        first_line = first_line if words else number
        words.append(cells[0])
        tags.append(cells[-1])
    if words:
        yield f"{path}, line {first_line}", words, tags


def _rows(path: str, config: OwnDataConfig) -> Iterator[Sentence]:
    text = config.text if "text" in config.model_fields_set else "tokens"
    label = config.label if "label" in config.model_fields_set else "tags"
    if not isinstance(text, str) or not isinstance(label, str):
        raise ConfigError("data.text and data.label: token classification takes one column each.")
    table = read_table(path, [text, label])
    for row, (words, tags) in enumerate(zip(table[text], table[label], strict=True), 1):
        where = f"{path}, row {row}"
        for name, values, kinds in ((text, words, str), (label, tags, str | int)):
            if not isinstance(values, list) or not all(isinstance(v, kinds) for v in values):
                raise DataError(f'{where}, column "{name}": {values!r:.80} is no list of words.')
        if half := half_character(" ".join(words)):
            raise DataError(f'{where}, column "{text}": half a character ({half}). Mend the row.')
        yield where, words, [str(tag) for tag in tags]


def _encode(path: str, sentences: Any, names: tuple[str, ...]) -> TokenExamples:
    index = {name: i for i, name in enumerate(names)}
    all_words, all_tags = [], []
    for where, words, tags in sentences:
        unseen = next((tag for tag in tags if tag not in index), None)
        if unseen is not None:
            raise DataError(
                f'{where}: the tag "{unseen}" is not among those of the training data.'
                f"{did_you_mean(unseen, names)} Those are: {', '.join(names)}."
            )
        all_words.append(words)
        all_tags.append(np.array([index[tag] for tag in tags], np.int64))
    return TokenExamples(all_words, all_tags, names)


def tokenize_words(
    examples: TokenExamples, tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int64]]]:
    """Token ids and labels of samples: the tag at the first token of each word, else no label.

    A sentence that is too long goes on in further samples, so that no word is lost.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.enable_truncation(max_seq_len)
    ids: list[NDArray[np.int32]] = []
    labels: list[NDArray[np.int64]] = []
    num_labelled = 0
    for start in range(0, len(examples), SENTENCES_AT_ONCE):
        part = examples.words[start : start + SENTENCES_AT_ONCE]
        encodings = backend.encode_batch(part, is_pretokenized=True)
        for tags, encoding in zip(examples.tags[start:], encodings, strict=False):
            last = None
            for piece in (encoding, *encoding.overflowing):
                own = np.full(len(piece.ids), IGNORE_INDEX, np.int64)
                for position, word in enumerate(piece.word_ids):
                    if word is not None and word != last:
                        own[position] = tags[word]
                        num_labelled += 1
                        last = word
                ids.append(np.array(piece.ids, np.int32))
                labels.append(own)
    num_words = sum(map(len, examples.words))
    if num_labelled != num_words:
        logger.warning(
            "%d of %d words give no token (they hold nothing that the tokenizer knows): their "
            "tags are not used.",
            num_words - num_labelled,
            num_words,
        )
    return ids, labels
