"""Make the bundled miniature GLUE: eight tasks in GLUE's form, from templates and word lists.

    python scripts/make_mini_glue.py [--output FOLDER]

Every sentence is put together here; none comes from GLUE. A label follows from how its row was
made (a changed word, a dropped part, a question about another fact), so it is right by
construction. Columns and label integers are those of `nyu-mll/glue`. One TSV file a split, with
a header and without quoting; the labels of a file are balanced, and no two rows of a task are
equal. The rows show that a pipeline runs and learns; they say nothing of a model's quality on
GLUE. Seeded: each run writes the same bytes.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

Row = tuple[str, ...]  # the texts of a row, then its label
Maker = Callable[[random.Random], Row]

SEED = 20
OUTPUT = Path(__file__).parent.parent / "src/mosaicbert/data/bundled/sample/glue"

# --- words -----------------------------------------------------------------------------------

PEOPLE = ["teacher", "farmer", "nurse", "painter", "student", "baker", "sailor", "driver"]
PLACES = ["near the river", "in the village", "behind the house", "at the station", "by the sea"]
# third person, plain form, past, past participle
VERBS = [
    ("draws", "draw", "drew", "drawn"),
    ("writes", "write", "wrote", "written"),
    ("likes", "like", "liked", "liked"),
    ("finds", "find", "found", "found"),
    ("sells", "sell", "sold", "sold"),
    ("takes", "take", "took", "taken"),
    ("keeps", "keep", "kept", "kept"),
]
OBJECTS = ["the letter", "the book", "the old map", "this story", "that paper", "the report"]

FILM_PARTS = ["film", "plot", "script", "story", "ending", "dialogue", "music", "second half"]
FILM_KINDS = ["comedy", "drama", "thriller", "romance", "documentary", "western", "mystery"]
GOOD = ["charming", "moving", "funny", "clever", "warm", "gripping", "honest", "delightful"]
BAD = ["dull", "clumsy", "tedious", "shallow", "messy", "lifeless", "forgettable", "boring"]
GOOD_VERBS = ["delights", "shines", "works", "surprises", "touches the heart", "rewards patience"]
BAD_VERBS = ["drags", "disappoints", "falls flat", "wastes its cast", "fails", "bores to tears"]
MANNERS = ["surprisingly", "quietly", "truly", "often", "thoroughly", "rather"]

# Of the news: a phrase, the same in other words.
ORGANISATIONS = ["the city council", "the museum", "the airline", "the bank", "the university"]
NEWS_VERBS = [
    ("announced", "made public"),
    ("approved", "agreed to"),
    ("rejected", "turned down"),
    ("postponed", "put off"),
    ("cancelled", "called off"),
]
NEWS_THINGS = [
    ("a new budget", "a new spending plan"),
    ("the sale of its headquarters", "a deal to sell its main building"),
    ("a merger with its rival", "a plan to join its competitor"),
    ("higher fees for visitors", "a rise in visitor charges"),
    ("a training programme for staff", "a scheme to train employees"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
REASONS = [
    ("after weeks of talks", "following long negotiations"),
    ("because of rising costs", "as expenses grew"),
    ("despite public protest", "although many people objected"),
]

# subject (with its hypernym), action (with its hypernym), place (with its hypernym)
SUBJECTS = [
    ("A man", "A person"),
    ("A woman", "A person"),
    ("A boy", "A child"),
    ("A girl", "A child"),
    ("A dog", "An animal"),
    ("A horse", "An animal"),
]
HUMAN_ACTIONS = [
    ("playing the violin", "making music", "performing for tourists"),
    ("singing a song", "making music", "rehearsing for a wedding"),
    ("eating an apple", "having some food", "waiting for a friend"),
    ("painting a fence", "doing some work", "earning money for a trip"),
    ("riding a bicycle", "moving", "going to visit a relative"),
]
ANIMAL_ACTIONS = [
    ("running", "moving", "looking for its owner"),
    ("drinking water", "having a drink", "resting after a long race"),
    ("jumping over a log", "moving", "being trained for a show"),
]
SPOTS = [
    ("in a park", "outdoors", "indoors"),
    ("on a beach", "outdoors", "indoors"),
    ("in a field", "outdoors", "indoors"),
    ("in a kitchen", "indoors", "outdoors"),
    ("in a large hall", "indoors", "outdoors"),
]

SKILLS = ["play chess", "speak Italian", "bake bread", "swim", "draw portraits", "write poetry"]
GOODS = ["a used car", "a mattress", "a bicycle", "a laptop", "a guitar", "a tent"]
CITIES = ["Lisbon", "Vienna", "Kyoto", "Dublin", "Oslo", "Naples", "Boston"]

# name, kind of thing, year, place, maker, what it is known for
FACTS = [
    ("The Alder Bridge", "bridge", "1874", "Marlow", "Edwin Carr", "its nine stone arches"),
    ("The Halden Museum", "museum", "1921", "Halden", "Clara Voss", "its old clocks"),
    ("The Pine Street Theatre", "theatre", "1899", "Calder", "Henry Lund", "its painted ceiling"),
    ("The Thorn Library", "library", "1936", "Brackley", "Agnes Thorn", "its rare maps"),
    ("The Weir Observatory", "observatory", "1958", "Upton", "Paul Weir", "its large telescope"),
    ("The Rowan Garden", "garden", "1812", "Selby", "Lucy Hart", "its red roses"),
    ("The Castor Tower", "tower", "1767", "Easton", "John Mead", "its winding stair"),
    ("The Fenwick Market", "market", "1903", "Fenwick", "Rose Amery", "its iron roof"),
    ("The Dunmore Canal", "canal", "1830", "Dunmore", "Thomas Pike", "its deep locks"),
    ("The Quill Palace", "palace", "1749", "Norwick", "George Ames", "its blue rooms"),
    ("The Sable Mill", "mill", "1841", "Dale", "Mary Finch", "its great wheel"),
    ("The Beacon Station", "station", "1867", "Corby", "Ralph Denn", "its tall clock"),
    ("The Ivory School", "school", "1913", "Langton", "Ellen Bright", "its bright hall"),
    ("The Lark Hall", "hall", "1885", "Ashby", "Ida Stone", "its fine organ"),
]


def article(word: str) -> str:
    """The indefinite article that `word` takes."""
    return "an" if word[0] in "aeio" else "a"


def capitalise(text: str) -> str:
    """`text` with a capital first letter, the rest as it is."""
    return text[0].upper() + text[1:]


def cola(rng: random.Random) -> Row:
    """A sentence that is grammatical (1) or breaks one rule of grammar (0)."""
    noun = rng.choice(PEOPLE)
    person = (noun, f"{noun}s")
    verb = rng.choice(VERBS)
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    number = rng.choice([0, 1])
    subject = f"{'The' if rng.random() < 0.5 else ('This', 'These')[number]} {person[number]}"
    other = f"{('These', 'This')[number]} {person[number]}"
    good = [
        f"{subject} {place} {verb[number]} {thing}.",
        f"{subject} has {verb[3]} {thing}."
        if number == 0
        else f"{subject} have {verb[3]} {thing}.",
        f"{subject} did not {verb[1]} {thing} {place}.",
        f"Which {person[number]} {verb[2]} {thing}?",
        f"{subject} {verb[2]} {thing} without help.",
    ]
    bad = [
        f"{subject} {place} {verb[1 - number]} {thing}.",
        f"{subject} can {verb[0]} {thing} {place}.",
        f"{subject} did not {verb[0]} {thing} {place}.",
        f"{other} {verb[2]} {thing} without help.",
        f"{subject} {thing} {verb[2]} {place}.",
        f"{subject} {verb[2]} without {thing} help.",
    ]
    label = rng.choice([0, 1])
    return rng.choice(good if label else bad), str(label)


def sst2(rng: random.Random) -> Row:
    """A phrase on a film: positive (1) or negative (0); some turn a word round by `not`."""
    label = rng.choice([0, 1])
    like, unlike = (GOOD, BAD) if label else (BAD, GOOD)
    first, second = rng.sample(like, 2)
    verb = rng.choice(GOOD_VERBS if label else BAD_VERBS)
    part, manner = rng.choice(FILM_PARTS), rng.choice(MANNERS)
    kind = rng.choice(FILM_KINDS)
    return rng.choice(
        [
            f"{article(manner)} {manner} {first} and {second} {kind}",
            f"the {part} is {manner} {first}",
            f"the {part} is {first} , and the {kind} {verb}",
            f"this {kind} is never {rng.choice(unlike)} ; it is {first}",
            f"far from {rng.choice(unlike)} , the {part} is {first}",
            f"it starts {rng.choice(unlike)} , but in the end the {kind} {verb}",
            f"{article(first)} {first} {kind} whose {part} {verb}",
        ]
    ), str(label)


def mrpc(rng: random.Random) -> Row:
    """Two news sentences: the same in other words (1), or with one fact changed (0)."""
    who, day = rng.choice(ORGANISATIONS), rng.choice(DAYS)
    verb, thing, reason = rng.choice(NEWS_VERBS), rng.choice(NEWS_THINGS), rng.choice(REASONS)
    first = capitalise(f"{who} {verb[0]} {thing[0]} on {day} {reason[0]}.")
    label = rng.choice([0, 1])
    if not label:
        changed = rng.choice(["who", "verb", "thing"])
        if changed == "who":
            who = rng.choice([other for other in ORGANISATIONS if other != who])
        elif changed == "verb":
            verb = rng.choice([other for other in NEWS_VERBS if other != verb])
        else:
            thing = rng.choice([other for other in NEWS_THINGS if other != thing])
    second = rng.choice(
        [
            f"On {day}, {who} {verb[1]} {thing[0]} {reason[1]}.",
            f"{who} {verb[1]} {thing[1]} on {day} {reason[0]}.",
            f"{reason[1]}, {who} {verb[0]} {thing[1]} on {day}.",
        ]
    )
    return first, capitalise(second), str(label)


def stsb(rng: random.Random) -> Row:
    """Two sentences of five facts each; the score is 5 times the share of facts kept."""
    facts = [
        [name for name, _ in SUBJECTS[:4]],
        [action for action, _, _ in HUMAN_ACTIONS],
        [spot for spot, _, _ in SPOTS],
        ["in the morning", "in the evening", "at noon"],
        ["with a friend", "alone", "with a teacher"],
    ]
    first = [rng.choice(choices) for choices in facts]
    num_changed = rng.randrange(len(facts) + 1)
    changed = set(rng.sample(range(len(facts)), num_changed))
    second = [
        rng.choice([choice for choice in choices if choice != kept]) if place in changed else kept
        for place, (choices, kept) in enumerate(zip(facts, first, strict=True))
    ]

    def sentence(subject: str, action: str, spot: str, time: str, company: str) -> str:
        return f"{subject} is {action} {spot} {company} {time}."

    def turned(subject: str, action: str, spot: str, time: str, company: str) -> str:
        return (
            f"{capitalise(time)}, {subject[0].lower()}{subject[1:]} is {action} {company} {spot}."
        )

    score = 5.0 * (1 - num_changed / len(facts))
    return sentence(*first), turned(*second), f"{score:.1f}"


def qqp(rng: random.Random) -> Row:
    """Two questions that ask for the same (1), or for something else (0)."""
    intents = [
        (SKILLS, ["How can I learn to {}?", "What is the best way to learn to {}?"]),
        (SKILLS, ["How long does it take to learn to {}?", "How soon can one learn to {}?"]),
        (SKILLS, ["Why do people {}?", "What makes people want to {}?"]),
        (GOODS, ["Where can I buy {}?", "Which is the best shop for {}?"]),
        (GOODS, ["How much does {} cost?", "What is the price of {}?"]),
        (GOODS, ["How do I clean {}?", "What is a good way to clean {}?"]),
        (CITIES, ["What should I see in {}?", "Which sights in {} are worth a visit?"]),
        (CITIES, ["Is it expensive to live in {}?", "How high is the cost of living in {}?"]),
        (CITIES, ["When is the best time to visit {}?", "In which month should I go to {}?"]),
    ]
    topics, forms = rng.choice(intents)
    topic = rng.choice(topics)
    first, second = rng.sample(forms, 2)
    label = rng.choice([0, 1])
    other = topic
    if not label and rng.random() < 0.5:
        other = rng.choice([choice for choice in topics if choice != topic])
    elif not label:
        second = rng.choice(
            [
                form
                for same, others in intents
                if same is topics and others != forms
                for form in others
            ]
        )
    return first.format(topic), second.format(other), str(label)


def mnli(rng: random.Random) -> Row:
    """A scene: what follows (0), what may be (1), what cannot be (2)."""
    subject, general_subject = rng.choice(SUBJECTS)
    animal = general_subject == "An animal"
    actions = ANIMAL_ACTIONS if animal else HUMAN_ACTIONS
    action, general_action, purpose = rng.choice(actions)
    spot, general_spot, opposite_spot = rng.choice(SPOTS[:3] if animal else SPOTS)
    noun = subject.split(" ", 1)[1]
    follows = [
        f"{general_subject} is {general_action} {general_spot}.",
        f"{general_subject} is {action}.",
        f"{subject} is {general_spot}.",
        f"The {noun} is {general_action}.",
    ]
    may_be = [
        f"{subject} is {action} while {purpose}.",
        f"The {noun} is {purpose}.",
        f"The {noun} often comes to this place.",
        f"The {noun} is {action} for the first time.",
    ]
    cannot_be = [
        f"{subject} is {action} {opposite_spot}.",
        f"The {noun} is asleep.",
        f"The {noun} is not {action}.",
        f"No {general_subject.split(' ', 1)[1]} is {general_action}.",
    ]
    label = rng.choice([0, 1, 2])
    return (
        f"{subject} is {action} {spot}.",
        rng.choice([follows, may_be, cannot_be][label]),
        str(label),
    )


def mnli_news(rng: random.Random) -> Row:
    """The same three relations in sentences of news: another genre, for `mismatched`."""
    who, day = rng.choice(ORGANISATIONS), rng.choice(DAYS)
    verb, thing, reason = rng.choice(NEWS_VERBS[1:]), rng.choice(NEWS_THINGS), rng.choice(REASONS)
    other_day = rng.choice([other for other in DAYS if other != day])
    follows = [
        f"{who} {verb[1]} {thing[1]}.",
        f"on {day}, {who} made a decision.",
        f"{reason[1]}, {who} {verb[1]} {thing[0]}.",
    ]
    may_be = [
        f"{who} {verb[0]} {thing[0]} to please its staff.",
        f"the decision of {day} surprised the press.",
        f"{who} will discuss {thing[0]} again next year.",
    ]
    cannot_be = [
        f"{who} never {verb[0]} {thing[0]}.",
        f"{who} {verb[0]} {thing[0]} only on {other_day}, not on {day}.",
        f"{who} made no decision on {day}.",
    ]
    label = rng.choice([0, 1, 2])
    hypothesis = rng.choice([follows, may_be, cannot_be][label])
    premise = f"{who} {verb[0]} {thing[0]} on {day} {reason[0]}."
    return capitalise(premise), capitalise(hypothesis), str(label)


def statements(fact: tuple[str, ...]) -> dict[str, str]:
    """What is known of a place -> a sentence that says so."""
    name, kind, year, town, maker, pride = fact
    return {
        "year": f"{name} was opened to the public in {year}.",
        "town": f"{name} is {article(kind)} {kind} that stands in the town of {town}.",
        "maker": f"{name} was planned by {maker}, who also paid for the work.",
        "pride": f"Most visitors come to {name} to see {pride}.",
    }


def qnli(rng: random.Random) -> Row:
    """A question, and a sentence that answers it (0) or says something else (1)."""
    fact = rng.choice(FACTS)
    name = fact[0].replace("The", "the")
    questions = {
        "year": [f"When was {name} opened?", f"In what year did {name} open?"],
        "town": [f"Where is {name}?", f"In which town does {name} stand?"],
        "maker": [f"Who planned {name}?", f"Whose plan did {name} follow?"],
        "pride": [f"What do visitors see at {name}?", f"What is {name} known for?"],
    }
    asked = rng.choice(list(questions))
    label = rng.choice([0, 1])
    told = rng.choice([key for key in questions if key != asked]) if label else asked
    return rng.choice(questions[asked]), statements(fact)[told].replace(" The", " the"), str(label)


def rte(rng: random.Random) -> Row:
    """Two sentences on a place, and one that follows from them (0) or does not (1)."""
    fact = rng.choice(FACTS)
    name, kind, year, town, maker, pride = fact
    other = rng.choice([candidate for candidate in FACTS if candidate[0] != name])
    told = rng.sample(["year", "town", "maker", "pride"], 2)
    text = " ".join(statements(fact)[key] for key in told).replace(" to The", " to the")
    true = {
        "year": [f"{name} dates from {year}.", f"The public could enter {name} in {year}."],
        "town": [f"There is {article(kind)} {kind} in {town}.", f"{name} is in {town}."],
        "maker": [f"{maker} planned {article(kind)} {kind}.", f"{maker} spent money on {name}."],
        "pride": [f"{name} has visitors.", f"People want to see {pride}."],
    }
    false = {
        "year": [f"{name} dates from {other[2]}.", f"{name} was closed in {year}."],
        "town": [f"{name} is in {other[3]}.", f"There is no {kind} in {town}."],
        "maker": [f"{other[4]} planned {name}.", f"{maker} sold {name}."],
        "pride": [f"{name} has no visitors.", f"People come to {name} to see {other[5]}."],
    }
    label = rng.choice([0, 1])
    hypothesis = rng.choice((false if label else true)[rng.choice(told)])
    hypothesis = hypothesis[:1] + hypothesis[1:].replace(" The ", " the ")
    return text, hypothesis, str(label)


# --- files -----------------------------------------------------------------------------------

# task -> columns of text, maker and number of rows by split
TASKS: dict[str, tuple[tuple[str, ...], dict[str, tuple[Maker, int]]]] = {
    "cola": (("sentence",), {"train": (cola, 160), "validation": (cola, 48)}),
    "sst2": (("sentence",), {"train": (sst2, 160), "validation": (sst2, 48)}),
    "mrpc": (("sentence1", "sentence2"), {"train": (mrpc, 160), "validation": (mrpc, 48)}),
    "stsb": (("sentence1", "sentence2"), {"train": (stsb, 162), "validation": (stsb, 48)}),
    "qqp": (("question1", "question2"), {"train": (qqp, 160), "validation": (qqp, 48)}),
    "mnli": (
        ("premise", "hypothesis"),
        {
            "train": (mnli, 192),
            "validation_matched": (mnli, 48),
            "validation_mismatched": (mnli_news, 48),
        },
    ),
    "qnli": (("question", "sentence"), {"train": (qnli, 160), "validation": (qnli, 48)}),
    "rte": (("sentence1", "sentence2"), {"train": (rte, 160), "validation": (rte, 48)}),
}


def balanced_rows(maker: Maker, num_rows: int, seen: set[Row], rng: random.Random) -> list[Row]:
    """`num_rows` new rows, equally many of each label, in mixed order; notes them in `seen`."""
    labels = {maker(rng)[-1] for _ in range(400)}
    by_label: dict[str, list[Row]] = defaultdict(list)
    for _ in range(200_000):
        row = maker(rng)
        if row[:-1] not in seen and len(by_label[row[-1]]) < num_rows // len(labels):
            seen.add(row[:-1])
            by_label[row[-1]].append(row)
        if sum(len(rows) for rows in by_label.values()) == num_rows:
            break
    else:
        raise SystemExit(f"{maker.__name__}: too few different rows, {num_rows} wanted")
    rows = [row for label in sorted(by_label) for row in by_label[label]]
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write every split of every task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output: Path = parser.parse_args().output
    for task, (columns, splits) in TASKS.items():
        rng = random.Random(f"{SEED} {task}")
        seen: set[Row] = set()
        for split, (maker, num_rows) in splits.items():
            rows = balanced_rows(maker, num_rows, seen, rng)
            lines = [(*columns, "label", "idx"), *((*row, str(i)) for i, row in enumerate(rows))]
            path = output / task / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
            print(f"{path}: {num_rows} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
