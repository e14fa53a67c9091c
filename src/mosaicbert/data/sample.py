"""Where the data lie that come with the package: demos and tests need no network.

bundled/
├── sample/en/           a corpus of 1.4 MB in C4's form, for pre-training
├── sample/source-kind/  a classification task: which kind of source is a passage from?
├── sample/glue/         a miniature GLUE, written for this package
└── bert-base-uncased/   the WordPiece vocabulary and the configurations

`NOTICE` names every source; `scripts/make_sample.py` and `scripts/make_mini_glue.py` make them.
"""

from pathlib import Path

from mosaicbert.errors import ConfigError, did_you_mean

BUNDLED_DIR = Path(__file__).parent / "bundled"
SAMPLE_DIR: Path = BUNDLED_DIR / "sample"
SPLITS = ("train", "validation")
# Names on the hub that share the vocabulary of bert-base-uncased.
SAME_VOCABULARY = ("bert-base-uncased", "google-bert/bert-base-uncased", "prajjwal1/bert-tiny")


def corpus_files(split: str) -> list[Path]:
    """The files of the bundled corpus: JSON lines with `text`, `timestamp`, `url`, compressed."""
    return [SAMPLE_DIR / "en" / f"c4-{_checked(split)}.00000-of-00001.json.gz"]


def classification_file(split: str) -> Path:
    """Compressed JSON lines: `text`, `label` (`abstract`, `address`, `agency` or `book`)."""
    return SAMPLE_DIR / "source-kind" / f"{_checked(split)}.jsonl.gz"


def glue_dir() -> Path:
    """The folder of the miniature GLUE: `<task>/<split>.tsv`, columns as on the hub."""
    return SAMPLE_DIR / "glue"


def bundled_tokenizer_dir(name: str) -> Path | None:
    """The folder of the tokenizer that the hub calls `name`, or None where it is not bundled."""
    return BUNDLED_DIR / "bert-base-uncased" if name in SAME_VOCABULARY else None


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ConfigError(
            f'The bundled sample has no split "{split}".{did_you_mean(split, SPLITS)} '
            f"Its splits: {', '.join(SPLITS)}."
        )
    return split
