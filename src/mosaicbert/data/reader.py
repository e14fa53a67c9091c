"""Token ids of samples, whatever the shards hold: text, concatenated tokens, or bare ids.

With `long_documents: chunk` a sample is a piece of at most `max_seq_len` ids of a document, and how
many pieces a document has must be known to number them. They are counted once, when the data are
first read: cheap for ids, one tokenisation of everything for text (`mosaicbert convert --tokenize`
spares it). The counts lie beside each shard in a small file named by tokenizer and `max_seq_len`;
processes that start together share the work.
"""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mosaicbert.data.download import BusyError, only_one
from mosaicbert.data.mds import Shard, ShardInfo
from mosaicbert.data.mds_files import write_whole
from mosaicbert.data.order import Ints, Located
from mosaicbert.data.stream import ShardSet
from mosaicbert.data.tokenizers import Ids, encode_chunks, encode_truncated, surround
from mosaicbert.errors import DataError

COLUMNS = ("input_ids", "tokens", "text")
"""Columns that are read, the first that is there: bare ids, ids with special tokens, or text."""
DOCUMENTS_AT_ONCE = 1024
_PATIENCE_SECONDS = 3600.0

log = logging.getLogger(__name__)


def column_of(info: ShardInfo) -> str:
    """The column to read. Raises DataError where there is none of `COLUMNS`."""
    for name in COLUMNS:
        if name in info.column_names:
            return name
    raise DataError(
        f"Shard {info.raw_basename} has the columns {', '.join(info.column_names)}; one of "
        f"{', '.join(COLUMNS)} is needed. `mosaicbert convert --text_column NAME` makes it."
    )


class TokenReader:
    """Samples at given places of shards, as token ids with special tokens.

    Args:
        shards: where they lie.
        tokenizer: for text, for the special tokens, and for the range of ids.
        max_seq_len: most ids of a sample, special ones included.
        chunk: a sample is a piece of a document, not its start; the pieces of all documents are
            counted here.
    """

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int,
        chunk: bool = False,
    ) -> None:
        self.shards = shards
        self._tokenizer = tokenizer
        self._vocab_size = len(tokenizer)
        self._max_seq_len = max_seq_len
        self._columns = [column_of(info) for info in shards.infos]
        self._chunk = chunk
        self._chunk_ends = self._count_chunks() if chunk else []

    def num_samples(self, shard: int) -> int:
        """Samples of a shard."""
        if not self._chunk:
            return self.shards.infos[shard].samples
        return int(self._chunk_ends[shard][-1]) if len(self._chunk_ends[shard]) else 0

    def document_of(self, shard: int, indices: Ints) -> Ints:
        """The documents that samples of a shard are pieces of."""
        return np.searchsorted(self._chunk_ends[shard], indices, "right")

    def read(self, places: Located) -> list[Ids]:
        """The ids of the samples, `(length,)` int32 each.

        Raises:
            DataError: a shard cannot be had or is damaged, or ids are not the tokenizer's.
        """
        if not self._chunk:
            return [pieces[0] for pieces in self._documents(places.shards, places.indices)]
        documents, numbers = np.empty_like(places.indices), np.empty_like(places.indices)
        for shard in np.unique(places.shards).tolist():
            here = places.shards == shard
            documents[here] = self.document_of(shard, places.indices[here])
            starts = np.concatenate([[0], self._chunk_ends[shard]])[documents[here]]
            numbers[here] = places.indices[here] - starts
        both = np.stack([places.shards, documents], axis=1)
        unique, which = np.unique(both, axis=0, return_inverse=True)
        found = self._documents(unique[:, 0], unique[:, 1])
        return [
            found[document][number]
            for document, number in zip(which.reshape(-1).tolist(), numbers.tolist(), strict=True)
        ]

    def _documents(self, shards: Ints, indices: Ints) -> list[list[Ids]]:
        """All pieces of documents, or without `chunk` the first piece of each."""
        found: list[list[Ids]] = [[]] * len(shards)
        texts: dict[int, str] = {}
        numbers, within = shards.tolist(), indices.tolist()
        for at in np.argsort(shards, kind="stable").tolist():  # one shard after another
            shard = self.shards.open(numbers[at])
            column = self._columns[numbers[at]]
            if column == "text":
                texts[at] = _text(shard, within[at])
            else:
                found[at] = self._pieces(shard, within[at], column)
        if self._chunk:
            encoded = encode_chunks(self._tokenizer, list(texts.values()), self._max_seq_len)
        else:
            cut = encode_truncated(self._tokenizer, list(texts.values()), self._max_seq_len)
            encoded = [[ids] for ids in cut]
        for at, pieces in zip(texts, encoded, strict=True):
            found[at] = pieces
        return found

    def _pieces(self, shard: Shard, index: int, column: str) -> list[Ids]:
        """The samples of a document of ids."""
        limit = self._max_seq_len
        ids: NDArray[np.integer]
        if column == "tokens":
            data = shard.raw(index, column)
            if len(data) % 8:
                raise DataError(f"{shard.path}: sample {index}: `tokens` are not int64 ids.")
            ids = np.frombuffer(data, "<i8")
        else:
            ids = shard[index][column]
        ids = ids if self._chunk else ids[:limit]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(
                f"{shard.path}: sample {index} has ids up to {ids.max()}, but the tokenizer "
                f"{self._tokenizer.name_or_path} has {self._vocab_size}. Use the tokenizer that "
                "the data were converted with."
            )
        if column == "input_ids":
            return surround(self._tokenizer, ids, limit)
        return [ids[at : at + limit].astype(np.int32) for at in range(0, max(len(ids), 1), limit)]

    def _count_chunks(self) -> list[Ints]:
        """For each shard, how many pieces its documents make up to and with each one."""
        identity = f"{self._tokenizer.backend_tokenizer.to_str()}{self._max_seq_len}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        found: dict[int, Ints] = {}
        todo = list(range(len(self.shards.infos)))
        for wait_seconds in (0.0, _PATIENCE_SECONDS):  # first what nobody else is at work on
            for number in todo:
                path = self.shards.path_beside(number, f"{key}.chunks.npy")
                try:
                    with only_one(path, wait_seconds):
                        found[number] = self._count_shard(number, path)
                except BusyError:
                    continue
            todo = [number for number in todo if number not in found]
        return [found[number] for number in range(len(self.shards.infos))]

    def _count_shard(self, number: int, path: Path) -> Ints:
        num_documents = self.shards.infos[number].samples
        if (counts := _load(path)) is None or len(counts) != num_documents:
            log.info(
                "counting the pieces of %s's documents", self.shards.infos[number].raw_basename
            )
            parts = [
                self._documents(np.full(len(part), number), part)
                for part in np.array_split(
                    np.arange(num_documents), max(1, -(-num_documents // DOCUMENTS_AT_ONCE))
                )
            ]
            counts = np.array([len(pieces) for part in parts for pieces in part], np.int32)
            if os.access(path.parent, os.W_OK):
                with write_whole(path) as file:
                    np.save(file, counts)
            else:
                log.warning("%s is read-only: chunks are counted at every start", path.parent)
        return np.cumsum(counts, dtype=np.int64)


def _text(shard: Shard, index: int) -> str:
    try:
        return shard.raw(index, "text").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{shard.path}: sample {index} is no UTF-8 text ({error}).") from error


def _load(path: Path) -> NDArray[np.int32] | None:
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.dtype == np.int32 and counts.ndim == 1 else None
