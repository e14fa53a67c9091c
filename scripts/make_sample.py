"""Make the bundled sample: a small pre-training corpus and a classification task from it.

    python scripts/make_sample.py CORPUS [--output FOLDER]

CORPUS holds JSON lines files in C4's form (`*.json.gz`; keys `text`, `timestamp`, `url`). Only
documents that anyone may redistribute are taken, chosen by `url`:

- books by authors who wrote in English and died before 1955, from classic-books-markdown,
- abstracts of arXiv (metadata under CC0 1.0),
- web pages of digital.gov and 18F (CC0 1.0), the World Factbook and presidential addresses
  before 2001 (public domain).

Written, with the same bytes at each run over the same corpus:

- `en/c4-train.00000-of-00001.json.gz`, `en/c4-validation.00000-of-00001.json.gz`: passages as they
  are in the corpus;
- `source-kind/{train,validation}.jsonl.gz`: `text` of one to three sentences, `label` one of
  `abstract`, `address`, `agency`, `book`. Every class has the same number of rows of each length,
  white space and punctuation are made uniform, and passages with quotation marks, formulas or
  letters outside ASCII are left out, so that the words alone tell the classes apart;
- `source-kind/sources.json.gz`: the `url` of each of those rows, in order, by split.

Each document serves one of the four files only, and so does each author of books.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

Split = Literal["train", "validation", "task-train", "task-validation"]
SEED = "mosaicbert-sample-1"
OUTPUT = Path(__file__).parent.parent / "src/mosaicbert/data/bundled/sample"

BOOKS_URL = "https://github.com/mlschmitt/classic-books-markdown/blob/main/"
# How the url of a document begins -> its kind.
KINDS = {
    BOOKS_URL: "book",
    "https://arxiv.org/abs/": "abstract",
    "https://github.com/GSA/digitalgov.gov/blob/main/": "agency",
    "https://github.com/18F/18f.gsa.gov/blob/main/": "agency",
    "https://github.com/factbook/factbook.json/blob/master/": "factbook",
    "https://github.com/nltk/nltk_data/inaugural/": "address",
    "https://github.com/nltk/nltk_data/state_union/": "address",
}
FIRST_YEAR_LEFT_OUT = 2001  # of the presidential addresses

# `author: titles`, by the file that a book serves.
BOOKS: dict[Split, dict[str, list[str]]] = {
    "train": {
        "Anna Sewell": ["Black Beauty"],
        "Arthur Conan Doyle": ["A Study in Scarlet", "The Hound of the Baskervilles"],
        "Benjamin Franklin": ["The Autobiography of Benjamin Franklin"],
        "Bram Stoker": ["Dracula"],
        "Charles Darwin": ["On the Origin of Species"],
        "Charles Dickens": ["A Tale of Two Cities", "David Copperfield", "Great Expectations"],
        "Charlotte Bronte": ["Jane Eyre", "Villette"],
        "Daniel Defoe": ["Robinson Crusoe"],
        "Edith Nesbit": ["Five Children and It", "The Railway Children"],
        "Elizabeth Gaskell": ["Cranford", "North and South"],
        "Ernest Shackleton": ["South!"],
        "Frances Hodgson Burnett": ["A Little Princess", "The Secret Garden"],
        "G.K. Chesterton": ["The Innocence of Father Brown", "The Man Who Was Thursday"],
        "George Eliot": ["Middlemarch", "Silas Marner"],
        "H.G. Wells": ["The First Men in the Moon", "The Time Machine", "War of the Worlds"],
        "Henry David Thoreau": ["Walden"],
        "Herman Melville": ["Bartleby, the Scrivener", "Moby-Dick"],
        "Howard Pyle": ["The Merry Adventures of Robin Hood"],
        "J. Meade Falkner": ["Moonfleet"],
        "Jane Addams": ["Twenty Years at Hull House"],
        "Jane Austen": ["Emma", "Persuasion", "Pride and Prejudice"],
        "Jerome K. Jerome": ["Three Men in a Boat"],
        "John Stuart Mill": ["On Liberty"],
        "Jonathan Swift": ["Gulliver's Travels"],
        "Kenneth Grahame": ["The Wind in the Willows"],
        "Lewis Carroll": ["Alice's Adventures in Wonderland", "Through the Looking-Glass"],
        "Louisa May Alcott": ["Little Women"],
        "Lucy Maud Montgomery": ["Anne of Green Gables"],
        "Mary Hunter Austin": ["The Land of Little Rain"],
        "Mary Wollstonecraft Shelley": ["Frankenstein"],
        "Okakura Kakuzo": ["The Book of Tea"],
        "Ralph Waldo Emerson": ["Essays"],
        "Robert Louis Stevenson": ["Kidnapped", "Treasure Island"],
        "Thomas Hardy": ["Far from the Madding Crowd"],
        "Ulysses S. Grant": ["Personal Memoirs of Ulysses S. Grant"],
        "Wilkie Collins": ["The Moonstone", "The Woman in White"],
        "Willa Cather": ["My Ántonia", "O Pioneers!"],
    },
    "validation": {
        "Anthony Trollope": ["The Warden"],
        "Edith Wharton": ["The Age of Innocence"],
        "Sarah Orne Jewett": ["The Country of the Pointed Firs"],
    },
    "task-train": {
        "Adam Smith": ["The Wealth of Nations"],
        "Anne Bronte": ["Agnes Grey"],
        "Booker T. Washington": ["Up from Slavery"],
        "Booth Tarkington": ["Alice Adams"],
        "Edward Bellamy": ["Looking Backward"],
        "Emily Bronte": ["Wuthering Heights"],
        "Erskine Childers": ["The Riddle of the Sands"],
        "Frederick Jackson Turner": ["The Frontier in American History"],
        "George MacDonald": ["The Princess and the Goblin"],
        "Henry Adams": ["The Education of Henry Adams"],
        "Henry James": ["The Portrait of a Lady"],
        "Jack London": ["The Call of the Wild", "White Fang"],
        "John Buchan": ["The Thirty-Nine Steps"],
        "Joseph Conrad": ["Lord Jim", "Typhoon"],
        "L. Frank Baum": ["The Wonderful Wizard of Oz"],
        "Mary Wollstonecraft": ["A Vindication of the Rights of Woman"],
        "Nathaniel Hawthorne": ["The House of the Seven Gables"],
        "Publius": ["The Federalist Papers"],
        "R.D. Blackmore": ["Lorna Doone"],
        "Virginia Woolf": ["Night and Day"],
        "Washington Irving": ["Old Christmas", "The Legend of Sleepy Hollow"],
        "William Makepeace Thackeray": ["Vanity Fair"],
    },
    "task-validation": {
        "Charles Hazelius Sternberg": ["The Life of a Fossil Hunter"],
        "Mark Twain": ["The Prince and the Pauper"],
        "Oscar Wilde": ["The Picture of Dorian Gray"],
        "Rafael Sabatini": ["Captain Blood"],
        "Rudyard Kipling": ["Captains Courageous"],
        "Sinclair Lewis": ["Main Street"],
        "Thomas Paine": ["Rights of Man"],
        "Walter Scott": ["Ivanhoe"],
    },
}
# Share of the other kinds' documents that each file draws from.
SHARES: dict[Split, float] = {
    "train": 0.44,
    "validation": 0.06,
    "task-train": 0.34,
    "task-validation": 0.16,
}
# Words of each kind in the pre-training files, and how many passages a document may give.
TRAIN_WORDS = {
    "book": 178_000,
    "abstract": 178_000,
    "agency": 97_000,
    "address": 65_000,
    "factbook": 18_000,
}
VALIDATION_SHARE = 0.05
PASSAGES_PER_DOCUMENT = {"book": 16, "abstract": 1, "agency": 3, "address": 6, "factbook": 2}
PASSAGES_PER_VALIDATION_BOOK = 44

LABELS = ("abstract", "address", "agency", "book")
# Lengths of the task's rows in words: [first, first + width), and so on.
FIRST_LENGTH, LENGTH_WIDTH, NUM_LENGTHS = 12, 5, 6
ROWS_PER_LENGTH: dict[Split, int] = {"task-train": 150, "task-validation": 21}
ROWS_PER_DOCUMENT = {"book": 60, "abstract": 2, "agency": 3, "address": 40}

# A document that speaks of another rights holder or publisher (and may quote it) is left out.
OTHER_RIGHTS = re.compile(
    r"guest (?:post|blog|author|column)|(?:originally|first) (?:posted|published|appeared)"
    r"|cross-?posted|reprinted|re-?published|©|\(c\)|copyright|all rights reserved"
    r"|New York Times|Washington Post|Wall Street Journal|Associated Press",
    re.IGNORECASE,
)
# A passage with an address, a telephone number, damaged letters or a slur of its day is left out.
UNWANTED = re.compile(
    r"@\w|https?:|www\.|\d{3}[-.) ]+\d{3}[-. ]\d{4}|Ã|â€|\ufffd|\b(?i:darkie|squaw|nigg)"
)
UNIFORM = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "\xa0": " "})
SENTENCE_BORDER = re.compile(r"(?<=[a-z\d)][.!?])\s+(?=[A-Z])")
ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|No|Gen|Col|Capt|Lt|Prof|Rev|Hon|Mt|vs|cf|et al|etc|e\.g|i\.e"
    r"|Fig|Eq|Ref|Sec|Inc|Co|Corp|approx|viz)\.$"
)
# What a row of the task looks like: a whole sentence, plain letters and punctuation.
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()!?%&/-]+[.!?]")


@dataclass(frozen=True)
class Passage:
    """One line of the corpus."""

    text: str
    timestamp: str
    url: str
    kind: str

    @property
    def num_words(self) -> int:
        """Words between white space."""
        return len(self.text.split())

    @property
    def rank(self) -> float:
        """Its place in a fixed shuffle."""
        return rank(self.url, self.text)


def rank(*parts: str) -> float:
    """A number in [0, 1) that is fixed by `parts`: the order of a shuffle that needs no state."""
    digest = hashlib.sha256("\n".join((SEED, *parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def kind_of(url: str) -> str | None:
    """The kind of a document that may be bundled, else None."""
    kind = next((kind for start, kind in KINDS.items() if url.startswith(start)), None)
    if kind == "address":
        year = re.search(r"/(\d{4})-", url)
        return kind if year and int(year[1]) < FIRST_YEAR_LEFT_OUT else None
    return kind


def book_splits() -> dict[str, Split]:
    """`author/title` of each chosen book -> the file it serves."""
    return {
        f"{author}/{title}": split
        for split, authors in BOOKS.items()
        for author, titles in authors.items()
        for title in titles
    }


def split_of(url: str, books: dict[str, Split]) -> Split | None:
    """The one file that a document serves: a book by the table, another by its rank."""
    if url.startswith(BOOKS_URL):
        name = unquote(url.removeprefix(BOOKS_URL)).removesuffix(".md").strip()
        return books.get(name)
    place = rank("split", url)
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return None


def read_corpus(corpus: Path) -> Iterator[Passage]:
    """Every passage of a kind that may be bundled."""
    files = sorted(corpus.rglob("*.json.gz"))
    if not files:
        raise SystemExit(f"No *.json.gz in {corpus}: give the folder of a corpus in C4's form.")
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if kind := kind_of(row["url"]):
                    yield Passage(row["text"], row["timestamp"], row["url"], kind)


def choose_documents(passages: Iterable[Passage]) -> dict[Split, dict[str, list[Passage]]]:
    """Per file, `url` -> that document's passages in the order of their ranks."""
    books = book_splits()
    by_url: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        by_url[passage.url].append(passage)
    chosen: dict[Split, dict[str, list[Passage]]] = {split: {} for split in SHARES}
    for url in sorted(by_url, key=lambda url: rank("document", url)):
        split = split_of(url, books)
        of_document = by_url[url]
        foreign = of_document[0].kind != "book" and any(
            OTHER_RIGHTS.search(passage.text) for passage in of_document
        )
        clean = [passage for passage in of_document if not UNWANTED.search(passage.text)]
        if split and clean and not foreign:
            chosen[split][url] = sorted(clean, key=lambda passage: passage.rank)
    missing = set(books) - {
        unquote(url.removeprefix(BOOKS_URL)).removesuffix(".md").strip()
        for documents in chosen.values()
        for url in documents
    }
    if missing:
        raise SystemExit(f"Books that the corpus lacks: {', '.join(sorted(missing))}")
    return chosen


def pretraining_passages(documents: dict[str, list[Passage]], split: Split) -> list[Passage]:
    """Passages up to each kind's number of words, a few of each document, in mixed order."""
    share = VALIDATION_SHARE if split == "validation" else 1.0
    words: Counter[str] = Counter()
    taken: list[Passage] = []
    limits = dict(PASSAGES_PER_DOCUMENT)
    if split == "validation":
        limits["book"] = PASSAGES_PER_VALIDATION_BOOK
    for round_number in range(max(limits.values())):  # one passage of every document, then a second
        for of_document in documents.values():
            kind = of_document[0].kind
            if round_number >= min(limits[kind], len(of_document)):
                continue
            if words[kind] < share * TRAIN_WORDS[kind]:
                taken.append(of_document[round_number])
                words[kind] += of_document[round_number].num_words
    return sorted(taken, key=lambda passage: passage.rank)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, white space and punctuation made uniform."""
    text = re.sub(r"\s*(?:---?|—|―)\s*", " - ", paragraph.translate(UNIFORM))
    text = re.sub(r"\s+", " ", text.replace("…", "...").replace("_", "")).strip()
    found: list[str] = []
    for piece in SENTENCE_BORDER.split(text):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def task_texts(passage: Passage) -> Iterator[str]:
    """Non-overlapping runs of one to three sentences of a passage that are fit for the task."""
    longest = FIRST_LENGTH + LENGTH_WIDTH * NUM_LENGTHS
    for paragraph in passage.text.split("\n"):
        left = sentences(paragraph)
        while left:
            count = 1 + int(3 * rank("count", passage.url, left[0]))
            text = " ".join(left[:count])
            left = left[count:]
            num_words = len(text.split())
            if FIRST_LENGTH <= num_words < longest and PLAIN.fullmatch(text):
                yield text


def task_rows(documents: dict[str, list[Passage]], split: Split) -> list[tuple[Passage, str]]:
    """`(passage, text)` rows: for each label and length equally many, in mixed order."""
    counts: Counter[tuple[str, int]] = Counter()
    per_document: Counter[str] = Counter()
    rows: list[tuple[Passage, str]] = []
    seen: set[str] = set()
    candidates = [
        (rank("row", passage.url, text), passage, text)
        for of_document in documents.values()
        for passage in of_document
        if passage.kind in LABELS
        for text in task_texts(passage)
    ]
    for _, passage, text in sorted(candidates, key=lambda candidate: candidate[0]):
        cell = (passage.kind, (len(text.split()) - FIRST_LENGTH) // LENGTH_WIDTH)
        full = counts[cell] >= ROWS_PER_LENGTH[split]
        if full or text in seen or per_document[passage.url] >= ROWS_PER_DOCUMENT[passage.kind]:
            continue
        seen.add(text)
        counts[cell] += 1
        per_document[passage.url] += 1
        rows.append((passage, text))
    wanted = len(LABELS) * NUM_LENGTHS * ROWS_PER_LENGTH[split]
    if len(rows) != wanted:
        raise SystemExit(f"{split}: {len(rows)} rows of {wanted}; rows by kind and length {counts}")
    return rows


def write_gzip(path: Path, lines: Iterable[Any]) -> None:
    """JSON lines, compressed, without a time or a name in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def report(path: Path, kinds: Iterable[str]) -> None:
    """Print what a file holds."""
    print(f"{path}: {path.stat().st_size:,} bytes, {dict(sorted(Counter(kinds).items()))}")


def main() -> None:
    """Read the corpus once, write the five files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of a corpus in C4's form")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    documents = choose_documents(read_corpus(arguments.corpus))

    pretraining: tuple[Split, ...] = ("train", "validation")
    for split in pretraining:
        passages = pretraining_passages(documents[split], split)
        path = arguments.output / "en" / f"c4-{split}.00000-of-00001.json.gz"
        write_gzip(
            path, ({"text": p.text, "timestamp": p.timestamp, "url": p.url} for p in passages)
        )
        report(path, (passage.kind for passage in passages))

    sources: dict[str, list[str]] = {}
    task: tuple[Split, ...] = ("task-train", "task-validation")
    for split in task:
        name = split.removeprefix("task-")
        rows = task_rows(documents[split], split)
        path = arguments.output / "source-kind" / f"{name}.jsonl.gz"
        write_gzip(path, ({"text": text, "label": passage.kind} for passage, text in rows))
        report(path, (passage.kind for passage, _ in rows))
        sources[name] = [passage.url for passage, _ in rows]
    write_gzip(arguments.output / "source-kind" / "sources.json.gz", [sources])


if __name__ == "__main__":
    main()
