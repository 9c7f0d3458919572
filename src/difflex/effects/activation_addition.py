"""Contrastive activation addition in language models: the measurements for the five findings of arXiv 2505.03189."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.errors import BadInput
from difflex.json_records import JsonRecord
from difflex.records import Site
from difflex.steering.contrast import Contrast
from difflex.values import check_fields

__all__ = ["AdditionConfig", "AdditionResults", "BehaviourSet", "Question", "TextFunctions", "measure_addition"]

Addition = tuple[Contrast, float]
"""A contrast, and the strength at which it is added."""


class Question(NamedTuple):
    """A question with two answers, of which one matches a behaviour: an entry of Anthropic's model-written-evals."""

    text: str
    matching: str
    other: str

    @property
    def pair(self) -> tuple[str, str]:
        """The texts of a contrast, which end with the answer; of ` (A)`, with the letter."""
        matching, other = (self.text + answer.removesuffix(")") for answer in (self.matching, self.other))
        return matching, other


@dataclass(frozen=True, kw_only=True)
class BehaviourSet:
    """The questions of a behaviour, and how texts that show it are recognised."""

    name: str
    questions: tuple[Question, ...]
    prompts: Mapping[str, tuple[str, ...]]
    """Starts of free text by kind, such as stories; empty where no parser reads them."""
    score: Callable[[str], float | None] = lambda _: None
    """The share of a text that shows the behaviour, minus the share that shows its opposite; None where it shows neither."""


@dataclass(frozen=True, kw_only=True)
class TextFunctions:
    """What experiments need of a language model."""

    name: str
    parameters: int
    contrasts: Callable[[Sequence[tuple[str, str]], Sequence[int]], Mapping[Site, Sequence[Contrast]]]
    """Finds contrasts at every layer on the first pairs, for several numbers of pairs."""
    scores: Callable[[Sequence[str], Sequence[Sequence[str]], Addition | None], Float[Tensor, "prompt answer"]]
    """Log probabilities of the answers of each prompt."""
    write: Callable[[Sequence[str], int, Addition | None], Sequence[str]]
    """Samples text after prompts, from a seed on."""
    losses: Callable[[Sequence[str], Addition | None], Float[Tensor, " text"]]
    """Mean cross-entropies of texts."""
    words: Sequence[str]
    """The words that adversarial inputs are made of."""


@dataclass(frozen=True, kw_only=True)
class AdditionConfig:
    """The questions, texts and strengths of the experiments."""

    counts: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80, 120, 200)
    """Numbers of pairs, rising; the most is that of all other experiments."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Rising; 1 adds the mean difference."""
    questions: int = 40
    """Questions that strengths and layers are chosen on, and as many others that effects are measured on."""
    texts: int = 24
    """Free texts of each kind and sign."""
    neutral: int = 40
    """Texts whose perplexity is measured."""
    prefix: int = 6
    """Words of an adversarial input."""
    candidates: int = 24
    """Words that are tried in each place of it."""
    rounds: int = 2
    fluency: float = 0.02
    """What a nat of the input's mean cross-entropy costs in the search, in probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if min(*self.counts, *self.strengths, self.questions, self.texts, self.neutral, self.prefix, self.candidates) <= 0:
            raise BadInput("The numbers of pairs, strengths, questions, texts and words must be above 0.")
        if list(self.counts) != sorted({*self.counts}) or list(self.strengths) != sorted({*self.strengths}):
            raise BadInput(f"Give pairs {self.counts} and strengths {self.strengths} in rising order.")


class AdversarialResult(NamedTuple):
    """The probability of matching answers while the behaviour is steered for, with words in front of the questions."""

    words: str
    """Found by greedy coordinate search."""
    plain: float
    """Without edit and words."""
    steered: float
    adversarial: float
    """Steered, with the words."""
    unsteered: float
    """With the words alone."""
    random: float
    """Steered, with random words."""
    cross_entropy: float
    """Of the words, in nats per token."""
    random_cross_entropy: float


class BehaviourResult(NamedTuple):
    """The measurements of one behaviour; a shift is the effect of +1 times the strength minus that of -1 times, from -1 to 1."""

    name: str
    layers: dict[str, float]
    """Shift of answers by layer at the strength 1, on the questions for choices."""
    site: str
    """The layer with the largest one."""
    strength: float
    """The strength with the largest shift there."""
    by_strength: tuple[float, ...]
    """Shift of answers by strength, on questions like those of the contrast."""
    by_count: tuple[float, ...]
    """Shift of answers by the number of pairs."""
    free: dict[str, float]
    """Shift in free texts by kind."""
    losses: tuple[float, ...]
    """Mean cross-entropy of neutral texts by strength, over both signs; first without edit."""
    adversarial: AdversarialResult


@final
@dataclass(frozen=True, kw_only=True)
class AdditionResults(JsonRecord):
    """The measurements of one model."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "cae"

    model: str
    parameters: int
    config: AdditionConfig
    behaviours: tuple[BehaviourResult, ...]


def matching_probability(
    model: TextFunctions, questions: Sequence[Question], edit: Addition | None = None, before: str = ""
) -> float:
    """Return the mean probability of the matching answers, of the two of each question."""
    answers = [(question.matching, question.other) for question in questions]
    scores = model.scores([before + question.text for question in questions], answers, edit)
    return float(torch.sigmoid(scores[:, 0] - scores[:, 1]).mean())


def answer_shift(model: TextFunctions, questions: Sequence[Question], contrast: Contrast, strength: float) -> float:
    """Return the probability of matching answers under the edit, minus that under the opposite one."""
    return matching_probability(model, questions, (contrast, strength)) - matching_probability(
        model, questions, (contrast, -strength)
    )


def measure_behaviour(
    model: TextFunctions, behaviour: BehaviourSet, config: AdditionConfig, neutral: Sequence[str]
) -> BehaviourResult:
    """Measure the effects of adding the contrast of one behaviour."""
    most, each = config.counts[-1], config.questions
    if len(behaviour.questions) < most + 2 * each:
        raise BadInput(
            f"{behaviour.name} has {len(behaviour.questions)} questions, but {most} pairs and {2 * each} questions to choose and "
            "to judge on are needed. Give a longer file, or lower --pairs and --questions."
        )
    questions = list(behaviour.questions)
    random.Random(config.seed).shuffle(questions)
    chosen, judged = questions[most : most + each], questions[most + each : most + 2 * each]
    contrasts = model.contrasts([question.pair for question in questions[:most]], config.counts)
    layers = {site: answer_shift(model, chosen, found[-1], 1.0) for site, found in contrasts.items()}
    site = max(layers, key=lambda site: layers[site])
    contrast = contrasts[site][-1]
    tried = {strength: answer_shift(model, chosen, contrast, strength) for strength in config.strengths}
    strength = max(tried, key=lambda strength: tried[strength])
    losses = [float(model.losses(neutral, None).mean())]
    for each_strength in config.strengths:
        both = [float(model.losses(neutral, (contrast, sign * each_strength)).mean()) for sign in (1, -1)]
        losses.append(fmean(both))
    return BehaviourResult(
        name=behaviour.name,
        layers={str(site): shift for site, shift in layers.items()},
        site=str(site),
        strength=strength,
        by_strength=tuple(answer_shift(model, judged, contrast, each) for each in config.strengths),
        by_count=tuple(answer_shift(model, judged, few, strength) for few in contrasts[site]),
        free={
            kind: _text_shift(model, behaviour, prompts, (contrast, strength), config)
            for kind, prompts in behaviour.prompts.items()
        },
        losses=tuple(losses),
        adversarial=_attack(model, chosen, judged, (contrast, strength), config),
    )


def _text_shift(
    model: TextFunctions, behaviour: BehaviourSet, prompts: Sequence[str], edit: Addition, config: AdditionConfig
) -> float:
    """Return half of the difference of the scores of free texts under the edit and under the opposite one."""
    means = []
    starts = [prompts[i % len(prompts)] for i in range(config.texts)]
    for sign in (1, -1):
        texts = model.write(starts, config.seed, (edit[0], sign * edit[1]))
        scores = [score for text in texts if (score := behaviour.score(text)) is not None]
        means.append(fmean(scores) if scores else 0.0)
    return (means[0] - means[1]) / 2


def _attack(
    model: TextFunctions, search: Sequence[Question], judged: Sequence[Question], edit: Addition, config: AdditionConfig
) -> AdversarialResult:
    """Search words in front of questions that undo the edit, one place after the other, and measure them on other questions."""
    rng = random.Random(config.seed)
    few = search[: max(4, len(search) // 8)]
    start = [rng.choice(model.words) for _ in range(config.prefix)]
    words = list(start)

    def cost(words: Sequence[str]) -> float:
        text = " ".join(words)
        fluency = config.fluency * float(model.losses([text], None)[0])
        return matching_probability(model, few, edit, f"{text} ") + fluency

    best = cost(words)
    for place in [*range(config.prefix)] * config.rounds:
        for word in rng.sample(list(model.words), min(config.candidates, len(model.words))):
            changed = [*words[:place], word, *words[place + 1 :]]
            if (price := cost(changed)) < best:
                words, best = changed, price
    found, noise = (f"{' '.join(each)} " for each in (words, start))
    return AdversarialResult(
        words=found.strip(),
        plain=matching_probability(model, judged),
        steered=matching_probability(model, judged, edit),
        adversarial=matching_probability(model, judged, edit, found),
        unsteered=matching_probability(model, judged, None, found),
        random=matching_probability(model, judged, edit, noise),
        cross_entropy=float(model.losses([found], None)[0]),
        random_cross_entropy=float(model.losses([noise], None)[0]),
    )


def measure_addition(
    model: TextFunctions,
    behaviours: Sequence[BehaviourSet],
    neutral: Sequence[str],
    config: AdditionConfig,
    path: Path,
    log: Callable[[str], None] = print,
) -> AdditionResults:
    """Measure all behaviours of a model; the file at `path` is written after each, and what it has is kept."""
    results = AdditionResults(model=model.name, parameters=model.parameters, config=config, behaviours=())
    if path.is_file():
        stored = AdditionResults.load(path)
        if (stored.model, stored.parameters, stored.config) == (results.model, results.parameters, config):
            results = stored
    for number, behaviour in enumerate(behaviours, 1):
        is_measured = any(result.name == behaviour.name for result in results.behaviours)
        log(f"{model.name}: {behaviour.name}, {number} of {len(behaviours)}{', as before' if is_measured else ''}")
        if not is_measured:
            measured = measure_behaviour(model, behaviour, config, neutral[: config.neutral])
            results = AdditionResults(
                model=model.name, parameters=model.parameters, config=config, behaviours=(*results.behaviours, measured)
            )
            results.save(path)
    return results
