"""The cases of the attack, made from what the commands really read and write."""

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from . import states
from .process import Conditions, Kill
from .states import Damage
from .subjects import Subject

Group = Literal["damaged", "full", "read-only", "forbidden", "foreign", "arguments", "killed", "twice", "plain"]
BAD_VALUES = ("-1", "0", str(2**64), "nan", "-inf", "", "x" * 300, "../..", "é ☃", "1,1", "2:1", "%s{}", "-")
INPUTS = ("recipe.py", "prompts.txt")
"""Files of the user that may have any content."""
ALTERED: tuple[Damage, ...] = (states.odd, states.swapped, states.flipped, states.newer, states.older)
"""Damages that may make another valid model out of a model."""
FILES = ("study/study.json", "study", "recipe.py")
"""Files that no command may replace, whatever it is given."""
NAMES = ("a b", "ü☃", "-x", "it's", "%s", "{x}", "a\nb", "x" * 250, "x" * 300, "\x1b[31m", ".", "no/such", "recipe.py")
KILLS = 10
"""Renames of a command at which it is killed, at most; spread evenly where there are more."""


class Case(NamedTuple):
    """A command in a state: what it may end with, and what its sentence must name."""

    group: Group
    name: str
    subject: Subject
    words: tuple[str, ...]
    conditions: Conditions = Conditions()
    place: str | None = None
    """The file that something is wrong with."""
    damage: Damage | None = None
    free: int | None = None
    """Bytes left on the disk."""
    read_only: bool = False
    exact: bool = False
    """Whether success must lead to the result of an undisturbed run."""
    altered: bool = False
    """Whether it is another valid input, which may lead to other results that stay."""
    own: bool = True
    """Whether the results are those of the subject, or of other flags."""
    names: tuple[str, ...] = ()
    """A sentence has one of these words; empty: any."""
    codes: tuple[int, ...] = (0, 2)
    plain: bool = False
    renamed: str | None = None
    """Another name of the folder of the study."""


def make_cases(subjects: Sequence[Subject], seed: int, count: int) -> list[Case]:
    """Return about `count` cases and all kills, in random order."""
    rng = random.Random(seed)
    shares = {_damaged: 0.62, _arguments: 0.16, _full: 0.07, _forbidden: 0.07, _foreign: 0.05, _read_only: 0.03}
    cases = [case for make, share in shares.items() for case in _first(make(subjects, rng), round(share * count))]
    cases += [*_killed(subjects, rng), *_twice(subjects, rng), *_plain(subjects, rng)]
    rng.shuffle(cases)
    return cases


def _first(cases: Sequence[Case], count: int) -> list[Case]:
    """Return `count` cases: first one of each pair of file and damage, file and verb, verb and damage; the cheap ones first."""
    pairs: Counter[tuple[str, str]] = Counter()
    chosen, rest = [], list(cases)
    for allowed in (0, 1, 2, 10**9):
        following = []
        for case in rest:
            damage = case.damage.__name__ if case.damage else case.words[-1][:20]
            kind, verb = _kind(case.place or ""), case.subject.verb
            own = [(kind, damage), (kind, verb), (verb, damage)]
            if len(chosen) < count and min(pairs[pair] for pair in own) <= allowed:
                pairs.update(own)
                chosen.append(case)
            else:
                following.append(case)
        rest = following
    return chosen


def _kind(path: str) -> str:
    """Return the path of a file without what numbers and names it."""
    if path.startswith("model/"):
        return f"model {Path(path).suffix}"
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", re.sub(r"(topk|itda|neurons|pca|random)-[^/.]*", "#", path.replace("+neurons", "")))


def _shuffled(cases: Iterator[Case], rng: random.Random) -> list[Case]:
    """Return cases in random order, in which cheap ones are more often in front."""
    return sorted(cases, key=lambda case: rng.random() ** 2 * max(case.subject.outcome.work, 0.1))


def _damaged(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    def every() -> Iterator[Case]:
        for subject in subjects:
            places = {*subject.read, *(subject.after if subject.name.endswith("-again") else ())} & subject.start.keys()
            for place in sorted(places if subject.read else ()):
                if place not in subject.read and rng.random() < 0.9:
                    continue  # it is not read: once in a while is enough
                for damage in states.damages(place):
                    model = place.startswith("model/")
                    altered = place in INPUTS or (model and damage in ALTERED)
                    mild = not model and damage in (states.missing, states.odd)
                    mild |= altered or subject.verb in ("report", "compare")  # their pages list what cannot be used
                    yield Case(
                        "damaged",
                        f"{subject.name} {damage.__name__} {place}",
                        subject,
                        subject.words,
                        place=place,
                        damage=damage,
                        exact=not mild,
                        altered=altered,
                        names=_names(place),
                        plain=rng.random() < 0.02,
                    )

    return _shuffled(every(), rng)


def _names(place: str) -> tuple[str, ...]:
    """Return the words by one of which a sentence may name a file."""
    path = Path(place)
    return (path.name, path.stem, path.parent.name, *((path.parts[0],) if path.parts[0] == "model" else ()))


def _around(place: str) -> tuple[str, ...]:
    """Return the words by one of which a sentence may name a file or one of its folders."""
    return (*_names(place), *Path(place).parts[:-1])


def _full(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    def every() -> Iterator[Case]:
        for subject in _writing(subjects):
            sizes = (0, 4096, *(rng.randrange(2**12, 2**18) for _ in range(3)))
            for free in sizes:
                yield Case("full", f"{subject.name} {free} bytes free", subject, subject.words, free=free, exact=True)
            for limit in (0, rng.randrange(1, 2**13), rng.randrange(1, 2**17)):
                limits = Conditions(file_limit=limit)
                name = f"{subject.name} files of at most {limit} bytes"
                yield Case("full", name, subject, subject.words, conditions=limits, exact=True)

    return _shuffled(every(), rng)


def _read_only(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    return _shuffled(
        (Case("read-only", subject.name, subject, subject.words, read_only=True, exact=True) for subject in subjects), rng
    )


def _forbidden(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    def every() -> Iterator[Case]:
        for subject in subjects:
            for place in [*subject.read, *subject.written]:
                for damage in (states.unreadable, states.locked_folder, states.closed_folder, states.locked_study):
                    if place in subject.start or (damage is not states.unreadable and (subject.before / place).parent.is_dir()):
                        name = f"{subject.name} {damage.__name__} {place}"
                        rights = Conditions(powerless=True)
                        yield Case(
                            "forbidden", name, subject, subject.words, rights, place, damage, exact=True, names=_around(place)
                        )

    return _shuffled(every(), rng)


def _foreign(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    def every() -> Iterator[Case]:
        for subject in subjects:
            for place in subject.written:
                for damage in (states.occupied, states.blocked):
                    name = f"{subject.name} {damage.__name__} {place}"
                    yield Case("foreign", name, subject, subject.words, place=place, damage=damage, names=_around(place))
            for folder in NAMES:
                words = tuple(folder if word == "study" else word for word in subject.words)
                if words != subject.words:
                    name = f"{subject.name} study called {folder[:20]!r} of {len(folder)}"
                    yield Case("foreign", name, subject, words, own=False, renamed=folder)

    return _shuffled(every(), rng)


def _arguments(subjects: Sequence[Subject], rng: random.Random) -> list[Case]:
    def every() -> Iterator[Case]:
        for subject in subjects:
            for flag in _flags(subject.verb):
                for value in BAD_VALUES + FILES:
                    words = _with_flag(subject.words, flag, value)
                    name = f"{subject.name} {flag} {value[:20]!r} of {len(value)}"
                    yield Case("arguments", name, subject, words, own=False, names=(flag, flag[2:].replace("-", " "), value[:40]))
            for number, word in enumerate(subject.words[1:], 1):
                first, rest = subject.words[:number], subject.words[number + 1 :]
                if word.startswith("--"):
                    words, names = (*subject.words, word, rest[0]), (word,)
                    yield Case("arguments", f"{subject.name} {word} twice", subject, words, own=False, names=names, codes=(2,))
                elif not any(before.startswith("--") for before in first):
                    for value in BAD_VALUES + FILES:
                        name = f"{subject.name} {value[:20]!r} of {len(value)} for {word}"
                        yield Case("arguments", name, subject, (*first, value, *rest), own=False)

    return _shuffled(every(), rng)


def _flags(verb: str) -> list[str]:
    """Return the flags of a verb that take a value."""
    from difflex.commands import verb_class

    fields = dataclasses.fields(verb_class(verb))  # pyright: ignore[reportArgumentType]
    return [
        f"--{field.name.replace('_', '-')}"
        for field in fields
        if "Positional" not in str(field.type) and "bool" not in str(field.type)
    ]


def _with_flag(words: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
    if flag not in words:
        return (*words, flag, value)
    start = words.index(flag)
    end = next((number for number in range(start + 1, len(words)) if words[number].startswith("--")), len(words))
    return (*words[: start + 1], value, *words[end:])


def _killed(subjects: Sequence[Subject], rng: random.Random) -> Iterator[Case]:
    for subject in _writing(subjects):
        for event in ("rename", "commit"):
            count = subject.outcome.events[event]
            numbers = range(count) if count <= KILLS else sorted({round(i * (count - 1) / (KILLS - 1)) for i in range(KILLS)})
            for number in numbers:
                moment = "after" if event == "rename" and number == count - 1 else "before"  # after one is before the next
                name = f"{subject.name} {moment} {event} {number}"
                kill = Conditions(kill=Kill(event, number, moment))
                yield Case("killed", name, subject, subject.words, kill, exact=True)
        for _ in range(2):
            seconds = round(rng.uniform(0, subject.outcome.seconds), 3)
            name = f"{subject.name} after {seconds} s"
            yield Case("killed", name, subject, subject.words, Conditions(kill_after=seconds), exact=True)


def _twice(subjects: Sequence[Subject], rng: random.Random) -> Iterator[Case]:
    return (Case("twice", subject.name, subject, subject.words, exact=True) for subject in _writing(subjects))


def _plain(subjects: Sequence[Subject], rng: random.Random) -> Iterator[Case]:
    return (
        Case("plain", subject.name, subject, subject.words, exact=True, codes=(0,), plain=True)
        for subject in subjects
        if not subject.name.endswith("-again")
    )


def _writing(subjects: Sequence[Subject]) -> list[Subject]:
    return [subject for subject in subjects if subject.written]
