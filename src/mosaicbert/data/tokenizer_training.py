"""`mosaicbert tokenizer train`: a WordPiece vocabulary for another language or domain."""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from mosaicbert.data.documents import documents
from mosaicbert.data.sample import SAMPLE_DIR
from mosaicbert.data.sources import FilePart, find_files
from mosaicbert.errors import ConfigError, DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNICODE_FORMS = {
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "nfkd": normalizers.NFKD,
}
CHECKED_DOCUMENTS = 1000
"""First documents over which tokens a word are counted when training is done."""


@dataclass(frozen=True)
class Settings:
    """What a WordPiece tokenizer is to be like; the defaults are those of bert-base-uncased."""

    vocab_size: int = 30_522
    lowercase: bool = True
    strip_accents: bool | None = None
    """None: with lower case only."""
    split_chinese: bool = True
    """Each Chinese character is a word."""
    unicode_form: str | None = None
    """One of `UNICODE_FORMS`, before all else."""
    min_frequency: int = 2
    """A token must occur so many times."""
    alphabet_size: int = 1000
    """The most frequent characters; words with others become `[UNK]`."""
    extra_tokens: Sequence[str] = ()
    """More special tokens, which are never cut."""


def train_tokenizer(
    texts: Iterable[str], settings: Settings = Settings(), *, show: bool = False
) -> PreTrainedTokenizerFast:
    """Learn a WordPiece vocabulary (Schuster & Nakajima 2012; as BERT uses it) from texts.

    Each character of the alphabet is a token both as a word's beginning and within words. The same
    texts give the same tokenizer. `texts` is read twice; `show`: a progress bar.

    Raises:
        ConfigError: the settings contradict one another.
        DataError: there is no text, or its characters alone exceed the vocabulary.
    """
    for name in ("min_frequency", "alphabet_size"):
        _check_positive(name, getattr(settings, name))
    special = _special_tokens(settings)
    normalizer = _normalizer(settings)
    alphabet = _alphabet(texts, normalizer, settings)
    base = [*special, *alphabet, *(f"##{c}" for c in alphabet)]
    if len(base) > settings.vocab_size:
        raise DataError(
            f"The {len(alphabet)} characters of the text alone make {len(base)} tokens. Raise "
            f"--vocab_size {settings.vocab_size}, or lower --alphabet_size."
        )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # As special tokens the characters have fixed ids: the trainer's own depend on chance, and so
    # would the order of merges of equal count.
    trainer = WordPieceTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=base,
        show_progress=show,
    )
    learner.train_from_iterator(iter(texts), trainer)
    return _with_vocabulary(learner.get_vocab(), special, normalizer)


def _alphabet(
    texts: Iterable[str], normalizer: normalizers.Normalizer, settings: Settings
) -> list[str]:
    """The most frequent characters of the texts, in the order of their code points."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    found = [c for c in counts if not c.isspace()]
    if not found:
        raise DataError("There is not a word of text to learn a vocabulary from.")
    found.sort(key=lambda c: (-counts[c], c))
    return sorted(found[: settings.alphabet_size])


def _with_vocabulary(
    vocabulary: dict[str, int], special: list[str], normalizer: normalizers.Normalizer
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=special[len(SPECIAL_TOKENS) :],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
    )


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"--{name} {number} is too small: 1 is the least.")


def _special_tokens(settings: Settings) -> list[str]:
    tokens = [*SPECIAL_TOKENS, *settings.extra_tokens]
    doubled = [token for token in settings.extra_tokens if tokens.count(token) > 1]
    if doubled:
        raise ConfigError(f"--extra_tokens: {doubled[0]} is there already. Leave it out.")
    if settings.vocab_size <= len(tokens):
        raise ConfigError(
            f"--vocab_size {settings.vocab_size} leaves no room beside the {len(tokens)} special "
            "tokens. BERT has 30522."
        )
    return tokens


def _normalizer(settings: Settings) -> normalizers.Normalizer:
    bert = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.split_chinese,
        strip_accents=settings.strip_accents,
        lowercase=settings.lowercase,
    )
    if settings.unicode_form is None:
        return bert
    if settings.unicode_form not in UNICODE_FORMS:
        raise ConfigError(
            f"--unicode_form {settings.unicode_form!r}: choose one of {', '.join(UNICODE_FORMS)}."
        )
    return normalizers.Sequence([UNICODE_FORMS[settings.unicode_form](), bert])


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder for `tokenizer_name` and Hugging Face's classes, whole or not at all.

    `vocab.txt`, a token a line by id, is for other programs.

    Raises:
        ConfigError: the folder is there already.
    """
    check_absent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(part)
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        lines = "".join(f"{token}\n" for token, _ in tokens)
        (part / "vocab.txt").write_text(lines, encoding="utf-8")
        part.chmod(0o755)  # mkdtemp's are private
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_absent(folder: Path) -> None:
    """Raise ConfigError where `folder` exists."""
    if folder.exists():
        raise ConfigError(f"--out {folder} exists already. Name a new folder, or remove it.")


def tokens_per_word(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[float, float]:
    """Tokens for each word of `texts` (as the tokenizer sees words), and the share of unknowns."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    num_tokens = sum(len(encoding.ids) for encoding in encodings)
    num_words = sum(len(set(encoding.word_ids)) for encoding in encodings)
    unknown = sum(encoding.ids.count(tokenizer.unk_token_id) for encoding in encodings)
    return num_tokens / max(num_words, 1), unknown / max(num_tokens, 1)


# --- command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("action", choices=("train",), help="learn a WordPiece vocabulary")
    add("--input", nargs="+", required=True, help="files or folders of text, or sample (bundled)")
    add("--out", required=True, type=Path, help="folder to make, for tokenizer_name")
    add("--vocab_size", type=int, default=Settings.vocab_size, help="tokens (default: %(default)s)")
    add("--cased", action="store_true", help="keep capitals (default: all lower case)")
    add("--strip_accents", choices=("yes", "no"), help="default: yes in lower case, else no")
    add(
        "--unicode_form", choices=tuple(UNICODE_FORMS), help="bring characters into this form first"
    )
    add("--keep_chinese_words", action="store_true", help="do not cut at each Chinese character")
    add(
        "--min_frequency", type=int, default=Settings.min_frequency, help="of a token (%(default)s)"
    )
    add("--alphabet_size", type=int, default=Settings.alphabet_size, help="characters to keep")
    add("--extra_tokens", nargs="+", default=[], metavar="TOKEN", help="more special tokens")
    add("--max_documents", type=int, help="learn from the first so many")
    add("--text_column", default="text", help="column of the text (default: text)")
    add("--paragraphs", action="store_true", help=".txt: blank lines part documents, not lines")


def main(args: argparse.Namespace) -> int:
    """Train on the files and write the tokenizer's folder."""
    check_absent(args.out)
    if args.max_documents is not None:
        _check_positive("max_documents", args.max_documents)
    accents = {"yes": True, "no": False, None: None}[args.strip_accents]
    settings = Settings(
        vocab_size=args.vocab_size,
        lowercase=not args.cased,
        strip_accents=accents,
        split_chinese=not args.keep_chinese_words,
        unicode_form=args.unicode_form,
        min_frequency=args.min_frequency,
        alphabet_size=args.alphabet_size,
        extra_tokens=args.extra_tokens,
    )
    texts = _Texts(args)
    tokenizer = train_tokenizer(texts, settings, show=sys.stderr.isatty())
    save_tokenizer(tokenizer, args.out)
    first = list(islice(texts, CHECKED_DOCUMENTS))
    per_word, unknown = tokens_per_word(tokenizer, first)
    print(
        f"{args.out}: {len(tokenizer):,} tokens; {per_word:.2f} a word and {unknown:.3%} unknown "
        f"in the first {len(first):,} documents"
    )
    if len(tokenizer) < args.vocab_size:
        print(
            f"mosaicbert: the text gives no more than {len(tokenizer):,} of {args.vocab_size:,} "
            "tokens that occur --min_frequency times.",
            file=sys.stderr,
        )
    return 0


class _Texts:
    """The documents of the files, as often as they are asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._files = [
            file
            for name in args.input
            for file in find_files(SAMPLE_DIR / "en" if name == "sample" else Path(name))
        ]

    def __iter__(self) -> Iterator[str]:
        return islice(self._all(), self._args.max_documents)

    def _all(self) -> Iterator[str]:
        for file in self._files:
            part = FilePart(str(file), file.stat().st_size)
            yield from documents(part, self._args.text_column, self._args.paragraphs)
