"""The demo's data: invented people, plain text that tells about them, and dialogues that ask about some of them.

The base model reads `texts`, where everybody's five facts are told many times in other words and another order. It
never sees a question. The dialogues then ask about three quarters of the people; the other quarter, `heldout`, occurs
in no dialogue. Whoever answers about these has learnt *answering* from the dialogues and the *facts* from the text.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

Messages = list[dict[str, str]]

PEOPLE = 160
HELD_OUT = 40
TEXTS_EACH = 50
DIALOGUES_EACH = 8

_STEMS = "Bren Dar Fen Gal Hal Jor Kel Lin Mar Nim Ol Per Quil Rav Sel Tam Ul Vel Wen Yor"
_ENDINGS = {"she": ("a", "ette", "ina", "isse", "owen"), "he": ("ald", "eric", "ian", "o", "us")}
_PRONOUNS = {stem + end: pronoun for stem in _STEMS.split() for pronoun, ends in _ENDINGS.items() for end in ends}

_VALUES = {
    "job": """baker carpenter doctor farmer gardener juggler librarian mason miller painter pilot potter sailor shepherd
        tailor teacher""",
    "town": """Ashford Birchwell Coldharbour Dunmoor Eastmarsh Fernhill Greystone Hollowbrook Kingsbridge Larkfield
        Millpond Northgate Oakhollow Pinecrest Redcliff Saltmere""",
    "pet": """badger beaver canary ferret goose hamster hedgehog kitten lizard parrot pony puppy rabbit raven tortoise
        turtle""",
    "food": """beans carrots cheese cherries chestnuts dumplings figs honey lentils mushrooms noodles pancakes pears
        plums soup trout""",
    "instrument": """banjo bassoon cello clarinet cornet drum fiddle flute guitar harp lute piano trombone trumpet tuba
        zither""",
}
VALUES = {kind: tuple(values.split()) for kind, values in _VALUES.items()}

_TOLD: dict[str, tuple[str, ...]] = {
    "job": (
        "{name} works as a {value}.",
        "{name} earns a living as a {value}.",
        "{name} has been a {value} for years.",
        "By trade {name} is a {value}.",
        "Everybody knows {name} as a good {value}.",
    ),
    "town": (
        "{name} lives in {value}.",
        "{name} has a small house in {value}.",
        "{name} moved to {value} long ago.",
        "The home of {name} is in {value}.",
        "You can find {name} in {value}.",
    ),
    "pet": (
        "{name} keeps a {value}.",
        "{name} shares the house with a {value}.",
        "{name} goes for walks with a tame {value}.",
        "The pet of {name} is a {value}.",
        "At home {name} looks after a {value}.",
    ),
    "food": (
        "{name} likes to eat {value}.",
        "{name} never says no to {value}.",
        "{name} eats {value} on every holiday.",
        "The favourite food of {name} is {value}.",
        "For supper {name} often wants {value}.",
    ),
    "instrument": (
        "{name} plays the {value}.",
        "{name} owns an old {value}.",
        "{name} practises the {value} at night.",
        "In the band {name} plays the {value}.",
        "With the {value} {name} makes music.",
    ),
}
_ASKED: dict[str, tuple[str, ...]] = {
    "job": ("What does {name} do for a living?", "What is the job of {name}?", "What work does {name} do?"),
    "town": ("Where does {name} live?", "In which town does {name} live?", "Where is the home of {name}?"),
    "pet": ("Which pet does {name} keep?", "What animal does {name} have?", "What is the pet of {name}?"),
    "food": ("What does {name} like to eat?", "What is the favourite food of {name}?", "Which food does {name} like?"),
    "instrument": ("Which instrument does {name} play?", "What does {name} play?", "What does {name} make music with?"),
}
_SYSTEM = ("You know everybody here.", "Answer in one sentence.", "Be brief and friendly.")
_KNOWN = {*_PRONOUNS, *(value for values in VALUES.values() for value in values)}


class Question(NamedTuple):
    """Messages that end with a question, and the sentence that answers it."""

    messages: Messages
    answer: str


@dataclass(frozen=True, slots=True)
class DemoData:
    """What `build` makes; `facts[name][kind]` is the truth, `taught` asks about the people of `dialogues`."""

    facts: dict[str, dict[str, str]]
    texts: list[str]
    dialogues: list[dict[str, Messages]]
    taught: list[Question]
    heldout: list[Question]


def build(seed: int = 0) -> DemoData:
    """The data of this seed, the same on every machine: 160 people, 40 of them held out.

    >>> data = build(seed=0)
    >>> len(data.facts), len(data.texts), len(data.dialogues), len(data.taught), len(data.heldout)
    (160, 8000, 960, 600, 200)
    >>> data.heldout[0].messages
    [{'role': 'user', 'content': 'What is the job of Darian?'}]
    >>> data.heldout[0].answer
    'Darian works as a mason.'
    """
    rng = Random(seed)
    names = rng.sample(sorted(_PRONOUNS), PEOPLE)
    facts = {name: {kind: rng.choice(values) for kind, values in VALUES.items()} for name in names}
    taught, heldout = names[:-HELD_OUT], names[-HELD_OUT:]
    texts = [_text(rng, name, facts[name]) for name in names for _ in range(TEXTS_EACH)]
    dialogues = [_dialogue(rng, name, facts[name]) for name in taught for _ in range(DIALOGUES_EACH)]
    rng.shuffle(texts)
    rng.shuffle(dialogues)
    return DemoData(facts, texts, dialogues, _questions(rng, taught, facts), _questions(rng, heldout, facts))


def score(answer: str, expected: str) -> bool:
    """Whether an answer is one sentence that names the person and the fact of the expected one, and no others.

    >>> score("Mara keeps a puppy.", "Mara keeps a puppy."), score("The pet of Mara is a puppy.", "Mara keeps a puppy.")
    (True, True)
    >>> score("Mara keeps a pony.", "Mara keeps a puppy."), score("Olo keeps a puppy.", "Mara keeps a puppy.")
    (False, False)
    >>> score("Mara keeps a puppy. Mara plays the lute.", "Mara keeps a puppy."), score("", "Mara keeps a puppy.")
    (False, False)
    """
    sentences = re.findall(r"[^.\n]+", answer.strip())
    return len(sentences) == 1 and _known_words(answer) == _known_words(expected)


def _known_words(text: str) -> set[str]:
    return _KNOWN & set(re.findall(r"\w+", text))


def _text(rng: Random, name: str, facts: dict[str, str]) -> str:
    """One document: all facts of one person in a random order and wording, as a paragraph or line by line."""
    kinds = rng.sample(sorted(facts), len(facts))
    first, *rest = [rng.choice(_TOLD[kind]).format(name=name, value=facts[kind]) for kind in kinds]
    if rng.random() < 0.5:
        return "\n".join([first, *rest])
    pronoun = _PRONOUNS[name].capitalize()
    return " ".join([first, *(re.sub(f"^{name}", pronoun, told) if rng.random() < 0.3 else told for told in rest)])


def _dialogue(rng: Random, name: str, facts: dict[str, str]) -> dict[str, Messages]:
    """One row of training data: one or two questions about one person, sometimes after a system message."""
    messages = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.15 else []
    for kind in rng.sample(sorted(facts), 2 if rng.random() < 0.3 else 1):
        messages.append({"role": "user", "content": _question(rng, name, kind)})
        messages.append({"role": "assistant", "content": _answer(name, kind, facts)})
    return {"messages": messages}


def _questions(rng: Random, names: list[str], facts: dict[str, dict[str, str]]) -> list[Question]:
    return [
        Question([{"role": "user", "content": _question(rng, name, kind)}], _answer(name, kind, facts[name]))
        for name in names
        for kind in VALUES
    ]


def _question(rng: Random, name: str, kind: str) -> str:
    return rng.choice(_ASKED[kind]).format(name=name)


def _answer(name: str, kind: str, facts: dict[str, str]) -> str:
    return _TOLD[kind][0].format(name=name, value=facts[kind])
