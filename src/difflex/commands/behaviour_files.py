"""Questions about a behaviour, from files of model-written-evals or plain pairs of texts, local or on the hub."""

import json
from pathlib import Path

from difflex.effects.activation_addition import BehaviourSet, Question
from difflex.errors import BadInput, BrokenFile
from difflex.files import disk_errors
from difflex.hub import snapshot

__all__ = ["read_behaviour"]

EVALS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
PAIRS = ("positive", "negative")


def read_behaviour(source: str, offline: bool = False) -> BehaviourSet:
    """Read the questions of a behaviour; OWNER/NAME:FILE is a file of a data set on the hub.

    A .jsonl file has an object on each line, in the form of model-written-evals or with two texts, `positive` and `negative`.
    Any other file has two texts on each line with a tab between them, the matching one first. What two texts begin with is the
    question, and the rest of each is an answer.
    """
    path = _locate(source, offline)
    with disk_errors(path, "read"):
        content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BrokenFile(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8.") from error
    read = _entry if path.suffix == ".jsonl" else _line
    questions = [read(f"Line {number} of {path}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise BadInput(f"There are no questions in {path}.")
    return BehaviourSet(name=path.stem, questions=tuple(questions), prompts={})


def _locate(source: str, offline: bool) -> Path:
    name, colon, file = source.partition(":")
    if Path(source).exists() or not colon or "/" not in name:
        return Path(source)
    path = snapshot(name, offline=offline, files=[file], kind="dataset") / file
    if not path.is_file():
        raise BadInput(f"The data set {name} on the hub has no file {file}. Look at its files, and name one of them.")
    return path


def _entry(place: str, line: str) -> Question:
    try:
        entry = json.loads(line)
        if PAIRS[0] in entry:
            return _question(place, *(str(entry[name]) for name in PAIRS))
        return Question(*(str(entry[name]) for name in EVALS))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenFile(f"{place} is not an object with the entries {', '.join(EVALS)}, or {' and '.join(PAIRS)}.") from error


def _line(place: str, line: str) -> Question:
    texts = line.split("\t")
    if len(texts) != len(PAIRS):
        raise BrokenFile(f"{place} is not two texts with one tab between them.")
    return _question(place, *texts)


def _question(place: str, positive: str, negative: str) -> Question:
    """Divide two texts after the last word that they both begin with; a space belongs to the word after it."""
    first, second = positive.split(" "), negative.split(" ")
    if first == second:
        raise BrokenFile(f"{place} has the same text twice: {positive[:60]!r}. A pair needs two texts.")
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    space = " " * (shared > 0)
    return Question(" ".join(first[:shared]), *(space + " ".join(words[shared:]) for words in (first, second)))
