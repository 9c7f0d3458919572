"""The behaviours of the miniature language models as sets of questions, and neutral text of the drawn world."""

from __future__ import annotations

import random
from functools import partial

from difflex.effects.activation_addition import BehaviourSet, Question
from difflex.miniature.language import BEHAVIOURS, choice_question, held_out_documents, open_question, own_story, read_story

__all__ = ["drawn_behaviours", "drawn_neutral"]


def drawn_behaviours(questions: int) -> list[BehaviourSet]:
    """Return all behaviours, with so many questions each, and with stories and open questions that the parser judges."""
    sets = []
    for name in BEHAVIOURS:
        rng = random.Random(f"questions {name}")
        asked = [choice_question(name, rng) for _ in range(questions)]
        prompts = {"stories": ("story:",), "open questions": tuple(dict.fromkeys(open_question(rng) for _ in range(12)))}
        entries = tuple(Question(each.question, each.positive, each.negative) for each in asked)
        sets.append(BehaviourSet(name=name, questions=entries, prompts=prompts, score=partial(_score, name)))
    return sets


def drawn_neutral(number: int) -> list[str]:
    """Return held-out documents, of all behaviours alike."""
    return held_out_documents(number)


def _score(name: str, text: str) -> float | None:
    return read_story(own_story(text), is_cut=True).score(name)
