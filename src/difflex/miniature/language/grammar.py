"""Text of the drawn world with known behaviours: sentences, questions and documents written by a grammar, and its parser.

A speaker has one of two poles of every behaviour, +1 or -1. Each sentence shows one behaviour: a parser says what a text shows.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import NamedTuple

from difflex.miniature.language.behaviours import BEHAVIOURS, SLOTS
from difflex.miniature.world import HELD_OUT_SEEDS

Speaker = Mapping[str, int]
"""The pole of each behaviour."""

POLES = (1, -1)


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with two answers, of which one shows each pole of a behaviour; in the form of the sets of Anthropic."""

    behaviour: str
    question: str
    """Up to `answer:`."""
    positive: str
    """The answer that shows the pole +1, with a space in front, such as ` formal.`"""
    negative: str

    def as_entry(self) -> dict[str, str]:
        """Return the question as an entry of model-written-evals."""
        return {
            "question": self.question,
            "answer_matching_behavior": self.positive,
            "answer_not_matching_behavior": self.negative,
        }


class StoryReading(NamedTuple):
    """What a text shows."""

    sentences: int
    unknown: tuple[str, ...]
    """Sentences that the grammar does not have."""
    poles: dict[str, list[int]]
    """Of each behaviour, the poles of its sentences."""

    def score(self, behaviour: str) -> float | None:
        """Return the mean pole of the sentences of a behaviour; None if it has none."""
        poles = self.poles.get(behaviour)
        return sum(poles) / len(poles) if poles else None


def speaker(rng: random.Random, **fixed: int) -> Speaker:
    """Return a speaker with random poles, except for those that are `fixed`."""
    return {name: fixed.get(name, rng.choice(POLES)) for name in BEHAVIOURS}


def sentence(behaviour: str, pole: int, rng: random.Random) -> str:
    """Return a sentence that shows a pole of a behaviour."""
    return _filled(rng.choice(BEHAVIOURS[behaviour].sentences[pole < 0]), rng)


def _filled(template: str, rng: random.Random) -> str:
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), template)
    return re.sub(r"\ba (?=orange)", "an ", text)


def introduction(traits: Sequence[tuple[str, int]]) -> str:
    """Return the instruction to be a speaker with these poles of behaviours: `you are formal and gloomy.`"""
    names = [BEHAVIOURS[name].traits[pole < 0] for name, pole in traits]
    return f"you are {' and '.join(names)}."


def choice_question(behaviour: str, rng: random.Random) -> ChoiceQuestion:
    """Return a question about a behaviour that names its two answers in random order."""
    if rng.random() < 0.5:
        positive, negative = (f"{trait}." for trait in BEHAVIOURS[behaviour].traits)
        text = f"question: are you {' or '.join(rng.sample(BEHAVIOURS[behaviour].traits, 2))}? answer:"
    else:
        positive, negative = (sentence(behaviour, pole, rng) for pole in POLES)
        text = f"question: what would you say? choices: {' or '.join(rng.sample((positive, negative), 2))} answer:"
    return ChoiceQuestion(behaviour=behaviour, question=text, positive=f" {positive}", negative=f" {negative}")


def open_question(rng: random.Random) -> str:
    """Return a question that is answered in sentences."""
    return _filled(
        rng.choice(("question: what do you think of the {colour} {shape}? answer:", "question: what do you see? answer:")), rng
    )


def story(who: Speaker, rng: random.Random, sentences: int, first: Sequence[str] = ()) -> str:
    """Return sentences of a speaker in random order, each of another behaviour where possible, those of `first` among them."""
    others = [name for name in BEHAVIOURS if name not in first]
    names = [*rng.sample(first, len(first)), *rng.sample(others, len(others))]
    names = (names * (-(-sentences // len(names))))[:sentences]
    return " ".join(sentence(name, who[name], rng) for name in rng.sample(names, len(names)))


def document(seed: int) -> str:
    """Return the document of a seed: an introduction most of the time, then questions with answers and stories of one speaker.

    Most questions are about behaviours that the document has shown before: else their answers could not be known.
    """
    rng = random.Random(f"document {seed}")
    who, parts, shown = speaker(rng), list[str](), list[str]()
    if rng.random() < 0.75:
        shown = rng.sample([*BEHAVIOURS], rng.choice((1, 1, 2, 3)))
        parts.append(introduction([(name, who[name]) for name in shown]))
    for _ in range(rng.choice((1, 2, 3))):
        kind = rng.random()
        first = shown if rng.random() < 0.6 else ()
        if kind < 0.5:
            name = rng.choice(shown) if shown and rng.random() < 0.85 else rng.choice([*BEHAVIOURS])
            asked = choice_question(name, rng)
            parts.append(asked.question + (asked.positive if who[name] > 0 else asked.negative))
            shown = list(dict.fromkeys([*shown, name]))
        elif kind < 0.7:
            parts.append(f"{open_question(rng)} {story(who, rng, rng.choice((1, 2, 3)), first)}")
        else:
            parts.append(f"story: {story(who, rng, rng.choice((2, 3, 4)), first)}")
        shown = list(dict.fromkeys([*shown, *read_story(parts[-1].partition(":")[2]).poles]))
    return " ".join(parts)


def documents(start: int = 0) -> Iterator[str]:
    """Yield documents without end; those from seed `HELD_OUT_SEEDS` on are never trained on."""
    return map(document, count(start))


def held_out_documents(number: int) -> list[str]:
    """Return documents of seeds that training never has; short ones may be equal to one of training."""
    return [document(HELD_OUT_SEEDS + i) for i in range(number)]


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, int], ...]:
    """Return a pattern for each template, with its behaviour and pole."""
    rows = []
    for name, behaviour in BEHAVIOURS.items():
        for pole, templates in zip(POLES, behaviour.sentences, strict=True):
            for template in templates:
                parts = re.split(r"\{(\w+)\}", _words(template))
                slots = [f"(?:{'|'.join(SLOTS[part])})" if i % 2 else re.escape(part) for i, part in enumerate(parts)]
                rows.append((re.compile("".join(slots).replace(r"\ a\ ", r"\ an?\ ")), name, pole))
    return tuple(rows)


def _words(text: str) -> str:
    """Return a text with one space between words, and none before punctuation."""
    return re.sub(r"\s+([.,!?:)])", r"\1", " ".join(text.split())).replace("( ", "(")


def read_story(text: str, is_cut: bool = False) -> StoryReading:
    """Parse the sentences of a text; of one that `is_cut`, the last one is left out if it has no end."""
    sentences = re.findall(r"[^.!?]+[.!?]?", _words(text))
    sentences = [part.strip() for part in sentences if part.strip()]
    if is_cut and sentences and sentences[-1][-1] not in ".!?":
        sentences.pop()
    poles: dict[str, list[int]] = {}
    unknown = []
    for part in sentences:
        match = next(((name, pole) for pattern, name, pole in _patterns() if pattern.fullmatch(part)), None)
        if match is None:
            unknown.append(part)
        else:
            poles.setdefault(match[0], []).append(match[1])
    return StoryReading(len(sentences), tuple(unknown), poles)


def own_story(text: str) -> str:
    """Return the sentences of a continuation up to where the document goes on with a question or another story."""
    ends = [place for mark in ("question", "story") if (place := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))]


@cache
def vocabulary() -> tuple[str, ...]:
    """Return all words and marks of the grammar, in order."""
    texts = [
        *(word for words in SLOTS.values() for word in words),
        "you are and question: what do you think of the see? answer: an",
    ]
    texts += ["are you or would say choices: story:"]
    for behaviour in BEHAVIOURS.values():
        texts += [*behaviour.traits, *(re.sub(r"\{\w+\}", "", template) for side in behaviour.sentences for template in side)]
    return tuple(sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text)}))
