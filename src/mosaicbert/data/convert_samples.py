"""Texts to MDS samples: as they are, as token ids, or as concatenated token ids."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mosaicbert.data.mds_files import write_whole
from mosaicbert.errors import ConfigError, DataError

TOKENIZATION = "tokenization.json"
"""File beside the index of a tokenised data set that says which tokenizer made it."""
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class SampleForm:
    """What a sample holds: text, or (with `tokenizer`) its ids, or `concat_tokens` ids."""

    tokenizer: str | None = None
    concat_tokens: int | None = None
    bos_text: str = ""
    eos_text: str = ""
    no_wrap: bool = False

    def columns(self) -> dict[str, str]:
        """The MDS columns of such samples."""
        if self.tokenizer is None:
            return {"text": "str"}
        if self.concat_tokens is not None:
            return {"tokens": "bytes"}
        return {"input_ids": f"ndarray:{_id_dtype(self.tokenizer)}"}

    def check(self) -> None:
        """Load the tokenizer, if any.

        Raises:
            DataError: there is no such tokenizer.
            ConfigError: nothing would part the concatenated texts.
        """
        if self.tokenizer is None:
            return
        tokenizer = _tokenizer(self.tokenizer)
        if self.concat_tokens is None or self.bos_text or self.eos_text:
            return
        if not len(tokenizer.backend_tokenizer.encode("")):
            raise ConfigError(
                f'--concat_tokens: the tokenizer "{self.tokenizer}" puts no special tokens around '
                "a text, so nothing would part one from the next. Give --bos_text or --eos_text."
            )


def to_samples(texts: Iterator[str], form: SampleForm) -> Iterator[dict[str, Any]]:
    """The samples that `texts` make.

    A text without a token makes no tokenised sample. Of concatenated ones the last, incomplete
    sample is left out.
    """
    if form.tokenizer is None:
        return ({"text": text} for text in texts)
    if form.concat_tokens is not None:
        return _concatenated(texts, form, form.concat_tokens)
    return _tokenised(texts, form.tokenizer)


def _tokenised(texts: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    dtype = _id_dtype(name)
    for ids in _encode(texts, name, add_special_tokens=False):
        if ids:
            yield {"input_ids": np.array(ids, dtype)}


def _concatenated(
    texts: Iterator[str], form: SampleForm, length: int
) -> Iterator[dict[str, bytes]]:
    """Samples of `length` int64 ids, special tokens and `bos_text`/`eos_text` between the texts."""
    assert form.tokenizer is not None
    backend = _tokenizer(form.tokenizer).backend_tokenizer
    bos = backend.encode(form.bos_text, add_special_tokens=False).ids
    eos = backend.encode(form.eos_text, add_special_tokens=False).ids
    buffer: list[int] = []
    for ids in _encode(texts, form.tokenizer, add_special_tokens=True):
        buffer += [*bos, *ids, *eos]
        whole = len(buffer) // length * length
        for start in range(0, min(whole, length) if form.no_wrap else whole, length):
            yield {"tokens": np.array(buffer[start : start + length], "<i8").tobytes()}
        if whole:
            buffer = [] if form.no_wrap else buffer[whole:]


def _encode(texts: Iterator[str], name: str, add_special_tokens: bool) -> Iterator[list[int]]:
    backend = _tokenizer(name).backend_tokenizer
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)
    while batch := _batch(texts):
        for encoding in encode(batch, add_special_tokens=add_special_tokens):
            yield encoding.ids


def _batch(texts: Iterator[str]) -> list[str]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            break
    return batch


@lru_cache(maxsize=4)
def _tokenizer(name: str) -> Any:
    # Imported here, for it brings transformers along, which plain text does not need. One thread
    # for each process: it is the processes that share the work.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mosaicbert.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(name)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _id_dtype(name: str) -> str:
    return "uint16" if len(_tokenizer(name)) <= 1 << 16 else "uint32"


# --- which tokenizer made a data set -------------------------------------------------------------


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of the tokens and their ids: tokenizers with the same one understand the same ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def write_tokenization(folder: Path, form: SampleForm) -> None:
    """Write `tokenization.json` for a data set of that form; nothing for plain text."""
    if form.tokenizer is None:
        return
    tokenizer = _tokenizer(form.tokenizer)
    note = {
        "tokenizer": form.tokenizer,
        "vocab_size": len(tokenizer),
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "special_tokens": form.concat_tokens is not None,
    }
    with write_whole(folder / TOKENIZATION) as file:
        file.write((json.dumps(note, indent=2) + "\n").encode())


def read_tokenization(folder: Path) -> Mapping[str, Any] | None:
    """The note of a tokenised data set, or None where there is none.

    Raises:
        DataError: the note cannot be read.
    """
    path = folder / TOKENIZATION
    try:
        note = json.loads(path.read_bytes())
        if not isinstance(note["vocabulary_sha256"], str) or not isinstance(note["tokenizer"], str):
            raise TypeError("its fields")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Copy or convert the data anew.") from error
    return dict(note)


def check_tokenization(folder: Path, tokenizer: Any) -> None:
    """Make sure that the ids in a tokenised data set are those of `tokenizer`.

    Raises:
        DataError: another vocabulary made them; names both tokenizers.
    """
    note = read_tokenization(folder)
    if note is not None and note["vocabulary_sha256"] != vocabulary_sha256(tokenizer):
        raise DataError(
            f'{folder} was tokenised with "{note["tokenizer"]}", whose vocabulary is another than '
            f'that of "{tokenizer.name_or_path}". Use that tokenizer, or convert the text anew.'
        )
