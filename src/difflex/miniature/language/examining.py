"""What a model of the grammar can do: held-out perplexity, grammatical stories, answers and stories as an introduction asks."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from difflex.miniature.language.grammar import (
    BEHAVIOURS,
    POLES,
    choice_question,
    held_out_documents,
    introduction,
    own_story,
    read_story,
)
from difflex.miniature.language.training import document_losses, encode
from difflex.miniature.language.vocabulary import token_ids

Write = Callable[[Sequence[str]], list[str]]
"""Samples a continuation of each prompt."""
STORY_TOKENS = 48
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class LanguageExamination:
    """The figures of a model; shares are between 0 and 1."""

    perplexity: float
    """Of a token of held-out documents."""
    grammatical: float
    """The share of sampled stories whose sentences are all of the grammar."""
    answers: float
    """The share of held-out questions that are answered as the introduction says."""
    answers_by_behaviour: dict[str, float]
    prompted: float
    """Of the sentences of sampled stories that show the behaviour of the introduction, the share with its pole."""
    prompted_by_behaviour: dict[str, float]
    documents: int
    stories: int
    questions: int

    def as_json(self) -> dict[str, Any]:
        """Return the figures as entries."""
        return asdict(self)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, documents: int) -> float:
    """Return the perplexity of a token of held-out documents."""
    texts, total, count = sorted(held_out_documents(documents), key=len), 0.0, 0
    for first in range(0, documents, BATCH):
        loss, tokens = document_losses(model, texts[first : first + BATCH])
        total, count = total + float(loss), count + tokens
    return math.exp(total / count)


@torch.no_grad()
def answer_scores(model: LlamaForCausalLM, texts: Sequence[tuple[str, str]]) -> list[float]:
    """Return the log probability of the second text of each pair after the first."""
    scores = []
    for first in range(0, len(texts), BATCH):
        part = texts[first : first + BATCH]
        ids, targets = encode([start + end for start, end in part])
        chosen = model(input_ids=ids.to(model.device), use_cache=False).logits.float().log_softmax(-1).cpu()
        chosen = chosen.gather(2, targets.clamp(min=0)[..., None])[..., 0]
        for row, (start, end) in enumerate(part):
            before = len(token_ids(start)) - 2  # without the end, and the start predicts the first token
            scores.append(float(chosen[row, before : before + len(token_ids(end)) - 2].sum()))
    return scores


def examine_language(model: LlamaForCausalLM, write: Write, documents: int = 300, each: int = 40) -> LanguageExamination:
    """Examine a model on held-out documents, and with `each` questions and stories for each pole of each behaviour."""
    rng = random.Random("examination")
    cases = [(name, pole) for name in BEHAVIOURS for pole in POLES for _ in range(each)]
    asked = [choice_question(name, rng) for name, _ in cases]
    starts = [introduction([case]) for case in cases]
    texts = [
        (f"{start} {question.question}", answer)
        for start, question in zip(starts, asked, strict=True)
        for answer in (question.positive, question.negative)
    ]
    scores = answer_scores(model, texts)
    right: dict[str, list[bool]] = {name: [] for name in BEHAVIOURS}
    for (name, pole), positive, negative in zip(cases, scores[::2], scores[1::2], strict=True):
        right[name].append((positive > negative) == (pole > 0))
    shown: dict[str, list[bool]] = {name: [] for name in BEHAVIOURS}
    whole = []
    for (name, pole), text in zip(cases, write([f"{start} story:" for start in starts]), strict=True):
        reading = read_story(own_story(text), is_cut=True)
        whole.append(reading.sentences > 0 and not reading.unknown)
        shown[name] += [each == pole for each in reading.poles.get(name, [])]
    by_answer, by_story = (
        {name: sum(values) / max(1, len(values)) for name, values in table.items()} for table in (right, shown)
    )
    sentences = [value for values in shown.values() for value in values]
    return LanguageExamination(
        perplexity=perplexity(model, documents),
        grammatical=sum(whole) / len(whole),
        answers=sum(map(sum, right.values())) / len(cases),
        answers_by_behaviour=by_answer,
        prompted=sum(sentences) / max(1, len(sentences)),
        prompted_by_behaviour=by_story,
        documents=documents,
        stories=len(whole),
        questions=len(cases),
    )
