"""Tokenizers by name, and token ids of texts without tokenising what truncation drops."""

import json
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from numpy.typing import NDArray
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from mosaicbert.data.sample import bundled_tokenizer_dir
from mosaicbert.errors import DataError

Ids = NDArray[np.int32]

CHARACTERS_PER_TOKEN = 6
"""Of a long text, so many characters for each token wanted are tried first (English web text: 4.6
on average, 5.8 at the 99th percentile; with 126 tokens wanted, 0.4 % of texts need a second try).
"""
# Pre-tokenizers that never let a token reach across a space, so that the text before a space has
# the same tokens whatever follows.
_SPLIT_AT_SPACES = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
_SPACE_AFTER_WORD = re.compile(r"\S ")

log = logging.getLogger(__name__)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that comes with the package, lies in a folder, or is named on the hub.

    Raises:
        DataError: there is none of that name, the hub cannot be reached, or it has no fast form.
    """
    bundled = bundled_tokenizer_dir(name)
    try:
        # AutoTokenizer would give the same, and take seconds to import.
        tokenizer = BertTokenizerFast.from_pretrained(bundled) if bundled else _with_auto(name)
    except Exception as error:  # transformers and the hub's client raise every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = (
            "The folder must hold a tokenizer as save_pretrained writes it."
            if Path(name).is_dir()
            else "It is no folder here and not in the local hub cache. Without network, give a "
            "folder or a bundled name such as bert-base-uncased."
        )
        raise DataError(f'Cannot load the tokenizer "{name}": {reason} {hint}') from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f'The tokenizer "{name}" has no fast form (tokenizer.json); convert it with '
            "transformers, save it to a folder and give that folder."
        )
    return tokenizer


def _with_auto(name: str) -> PreTrainedTokenizerFast:
    """From a folder, or from the hub or its cache."""
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        # Fails at once where the hub is out of reach; from_pretrained would try for 45 seconds.
        HfApi().model_info(name, timeout=10)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def special_affixes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that stand before and after a single text, such as `[CLS]` and `[SEP]`."""
    (bare,) = _encode(tokenizer, ["a"])
    whole = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise DataError(f"{tokenizer.name_or_path}: special tokens do not simply surround a text.")


def encode_truncated(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_seq_len: int
) -> list[Ids]:
    """Ids of each text with its special tokens, cut to `max_seq_len`.

    The same ids as tokenising whole texts gives, but the tokenizer sees only as much of a text as
    is needed: a piece that ends at a space well behind the limit, and twice as much where that
    gave too few tokens.
    """
    prefix, suffix = _affix_arrays(tokenizer, max_seq_len)
    limit = max_seq_len - len(prefix) - len(suffix)
    found: list[Ids] = [prefix] * len(texts)
    todo = list(range(len(texts)))
    characters = limit * CHARACTERS_PER_TOKEN if _cuts_at_spaces(tokenizer) else None
    while todo:
        pieces = [_start_of(texts[i], characters) for i in todo]
        again = []
        for i, piece, ids in zip(todo, pieces, _encode(tokenizer, pieces), strict=True):
            if len(ids) < limit and len(piece) < len(texts[i]):
                again.append(i)
            else:
                found[i] = np.concatenate([prefix, np.array(ids[:limit], np.int32), suffix])
        todo = again
        characters = characters and characters * 2
    return found


def encode_chunks(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_seq_len: int
) -> list[list[Ids]]:
    """All of each text as successive samples of at most `max_seq_len` ids, special ones included.

    An empty text is one sample of special tokens alone.
    """
    return [
        surround(tokenizer, np.array(ids, np.int32), max_seq_len)
        for ids in _encode(tokenizer, texts)
    ]


def surround(
    tokenizer: PreTrainedTokenizerFast, ids: NDArray[np.integer], max_seq_len: int
) -> list[Ids]:
    """Bare ids of one text, cut into successive samples with special tokens around each."""
    prefix, suffix = _affix_arrays(tokenizer, max_seq_len)
    limit = max_seq_len - len(prefix) - len(suffix)
    starts = range(0, max(len(ids), 1), limit)
    return [np.concatenate([prefix, ids[at : at + limit], suffix], dtype=np.int32) for at in starts]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens; `encode_batch_fast` leaves the offsets out."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call of the tokenizer itself may have left one behind
    backend.no_padding()
    encode: Any = getattr(backend, "encode_batch_fast", backend.encode_batch)
    try:
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]
    except Exception as error:  # the tokenizers library raises no other kind
        raise DataError(f"{tokenizer.name_or_path} cannot tokenise: {error}.") from error


def _start_of(text: str, characters: int | None) -> str:
    """The text up to the first space behind so many characters; all of it where there is none."""
    if characters is None or len(text) <= characters:
        return text
    match = _SPACE_AFTER_WORD.search(text, characters)
    return text[: match.start() + 1] if match else text


@cache
def _affix_arrays(tokenizer: PreTrainedTokenizerFast, max_seq_len: int) -> tuple[Ids, Ids]:
    prefix, suffix = special_affixes(tokenizer)
    if max_seq_len <= len(prefix) + len(suffix):
        raise DataError(
            f"max_seq_len {max_seq_len} leaves no room beside the {len(prefix) + len(suffix)} "
            f"special tokens of {tokenizer.name_or_path}."
        )
    return np.array(prefix, np.int32), np.array(suffix, np.int32)


@cache
def _cuts_at_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokens of a text up to a space do not depend on the rest."""
    first = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {"type": None}
    while first["type"] == "Sequence":
        first = first["pretokenizers"][0]
    splits = first["type"] in _SPLIT_AT_SPACES
    splits &= first.get("use_regex", True) and first.get("split", True)
    if not splits:
        log.info(
            "%s: pre-tokenizer %s may join words, so whole texts are tokenised before they are cut",
            tokenizer.name_or_path,
            first["type"],
        )
    return bool(splits)
