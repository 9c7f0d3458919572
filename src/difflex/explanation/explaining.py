"""Explain features with a VLM, judge the explanations, and write both into the book."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from typing import Literal, NamedTuple, final

import torch
from PIL import Image
from tqdm import tqdm

from difflex.errors import BadInput
from difflex.explanation.client import CachedClient, DryRunClient, NoAnswer, VLMClient
from difflex.explanation.comparing import scores
from difflex.explanation.protocol import ExplanationProtocol, FeaturePlan, UnsuitableFeature, plan
from difflex.explanation.questions import (
    ExplanationAnswer,
    ImageView,
    JudgementAnswer,
    OddOneOutAnswer,
    PresenceAnswer,
    to_explain,
    to_judge,
    to_pick,
    to_see,
)
from difflex.explanation.requests import Spending
from difflex.features import Book, FeatureFilter, ImageAlbum, overlaid
from difflex.features.entries import COVER_THRESHOLD, Example, ShotRow
from difflex.features.explanations import Explanation, ExplanationScore, Judgement, RecordedUsage
from difflex.records import Shot

Role = Literal["explainer", "judge"]
SIDE = 256
"""Pixels that an image is enlarged to at least: its longer side where it has highlights, else its shorter one."""
AHEAD = 2
"""Plans made for each connection before one is needed."""


_Keys = dict[Role, list[str]]
"""The hashes of what was asked."""


def _keys() -> _Keys:
    return {"explainer": [], "judge": []}


class FeatureOutcome(NamedTuple):
    """What came of one feature."""

    explanation: Explanation
    judgements: tuple[Judgement, ...] = ()
    scores: tuple[ExplanationScore, ...] = ()


class ExplainResult(NamedTuple):
    """What came of explaining."""

    done: tuple[int, ...]
    """Features that were explained just now."""
    kept: tuple[int, ...]
    """Those that had been explained before."""
    failed: Mapping[int, str]
    """Those that could not be, and why; the next run tries them again."""


def chosen(book: Book, count: int, protocol: ExplanationProtocol, seed: int = 0) -> list[int]:
    """`count` features of `book` by chance, among those that fire in as many shots as `protocol` needs; all if there are fewer.

    With one seed, a larger `count` takes the same and more, and another protocol mostly the same.
    """
    fit = {row.feature for row in book.features(where=[FeatureFilter("shots", ">=", protocol.needs)])}
    order = random.Random(seed).sample(range(book.about.size), book.about.size)
    return [feature for feature in order if feature in fit][:count]


def explain(
    book: Book,
    features: Sequence[int],
    asker: CachedClient,
    album: ImageAlbum,
    protocol: ExplanationProtocol = ExplanationProtocol(),  # noqa: B008 (a constant)
    *,
    connections: int = 16,
    progress: bool = True,
) -> ExplainResult:
    """What came of explaining `features`: each is in the book with its judgements and scores as soon as all of it is there.

    Killed and called again, what was answered is not asked again. A call that cannot be sent any more, as for a budget, ends the
    work in order: what is under way is waited for and kept.
    """
    kept, others = _kept(book, asker.name, protocol), _with_images(book)
    todo = [feature for feature in features if feature not in kept]
    failed: dict[int, str] = {}
    plans = (_planned(book, feature, others, album, protocol) for feature in todo)
    with (
        tqdm(total=len(todo), desc="explaining", unit=" features", disable=None if progress else True) as bar,
        _ExplainThreads(book, asker, protocol, connections) as crew,
    ):
        for explanation in crew.through(plans):
            if explanation.state == "failed":
                failed[explanation.feature] = explanation.reason
            bar.update()
    explained = tuple(feature for feature in todo if feature not in failed)
    return ExplainResult(explained, tuple(feature for feature in features if feature in kept), failed)


def rehearse(
    book: Book,
    features: Sequence[int],
    rehearsal: DryRunClient,
    album: ImageAlbum,
    protocol: ExplanationProtocol = ExplanationProtocol(),  # noqa: B008 (a constant)
) -> None:
    """Nothing; `rehearsal` knows what `explain` would ask."""
    kept, others = _kept(book, rehearsal.name, protocol), _with_images(book)
    for feature in features:
        if feature not in kept:
            _explained(rehearsal, protocol, _planned(book, feature, others, album, protocol), _keys())


def _kept(book: Book, backend: str, protocol: ExplanationProtocol) -> set[int]:
    """The features that are explained already."""
    same = (backend, protocol.label, "done")
    return {each.feature for each in book.explanations() if (each.backend, each.protocol, each.state) == same}


def _with_images(book: Book) -> list[int]:
    return [row.feature for row in book.features(where=[FeatureFilter("shots", ">", 0)])]


class _PreparedPlan(NamedTuple):
    """A plan whose images are at hand."""

    plan: FeaturePlan
    views: Mapping[int, ImageView]
    """By the number of the example."""


def _planned(
    book: Book, feature: int, others: Sequence[int], album: ImageAlbum, protocol: ExplanationProtocol
) -> _PreparedPlan | FeatureOutcome:
    try:
        made = plan(book, feature, others, protocol)
    except UnsuitableFeature as error:
        return _failure(feature, "", protocol, str(error))
    rows = book.shots(example.shot for example in made.examples)
    peaks = {each: book.feature(each).peak for each in {example.feature for example in made.examples}}
    grid = _grid(book)
    views = {
        example.id: _view(example, rows[example.shot], peaks[example.feature], grid, album, protocol) for example in made.examples
    }
    return _PreparedPlan(made, views)


def _grid(book: Book) -> tuple[int, int]:
    if book.about.grid is None:
        raise BadInput(f"{book.about.dictionary} is of tokens of text, which have no place in an image. Explain image sites.")
    return book.about.grid


def _view(
    example: Example, row: ShotRow, peak: float, grid: tuple[int, int], album: ImageAlbum, protocol: ExplanationProtocol
) -> ImageView:
    highlight, strength = torch.zeros(grid), torch.tensor(example.map.values) / peak
    highlight.view(-1)[list(example.map.tokens)] = strength.where(strength >= COVER_THRESHOLD, 0.0)

    def draw() -> Image.Image:
        return overlaid(album.open(row.image.file), example.map, grid, peak, style=protocol.style, side=SIDE)

    return ImageView(draw=draw, shot=row.shot, highlight=highlight)


def _failure(
    feature: int, backend: str, protocol: ExplanationProtocol, reason: str, found: ExplanationAnswer | None = None
) -> FeatureOutcome:
    text, descriptions = (found.common_pattern, found.pattern_descriptions) if found else ("", [])
    return FeatureOutcome(
        Explanation(
            feature=feature,
            backend=backend,
            protocol=protocol.label,
            text=text,
            descriptions=tuple(descriptions),
            state="failed",
            reason=reason,
        )
    )


def _explained(
    asking: VLMClient, protocol: ExplanationProtocol, shown: _PreparedPlan | FeatureOutcome, keys: _Keys
) -> FeatureOutcome:
    """A feature explained and judged, or why not."""
    if isinstance(shown, FeatureOutcome):
        return FeatureOutcome(replace(shown.explanation, backend=asking.name))
    (feature, examples, trials, _), views = shown.plan, shown.views
    found = None
    try:
        told = to_explain(len(examples), protocol.style)
        found = asking.see([views[example.id] for example in examples], told, ExplanationAnswer, keys["explainer"])
        instruction = to_judge(found.common_pattern, protocol.style)
        judgements = [
            Judgement(
                trial.example.id,
                trial.wanted,
                asking.see([views[trial.example.id]], instruction, JudgementAnswer, keys["judge"]).score,
            )
            for trial in trials
        ]
        figures = [*scores(judgements, protocol.seed), *_picked(asking, protocol, shown, keys)]
    except NoAnswer as error:
        return _failure(feature, asking.name, protocol, str(error), found)
    explanation = Explanation(
        feature=feature,
        backend=asking.name,
        protocol=protocol.label,
        text=found.common_pattern,
        descriptions=tuple(found.pattern_descriptions),
    )
    return FeatureOutcome(explanation, tuple(judgements), tuple(figures))


def _picked(asking: VLMClient, protocol: ExplanationProtocol, shown: _PreparedPlan, keys: _Keys) -> list[ExplanationScore]:
    """Whether the image that does not belong is found."""
    lineup = shown.plan.lineup
    if lineup is None:
        return []
    views = [shown.views[example.id] for example in lineup.examples]
    picked = asking.see(views, to_pick(len(views), protocol.style), OddOneOutAnswer, keys["judge"])
    return [ExplanationScore("intruder", float(picked.image == 1 + lineup.odd), None, None, 1)]


@final
class _ExplainThreads:
    """Threads that explain a feature each, while the one that made them writes the book."""

    def __init__(self, book: Book, asker: CachedClient, protocol: ExplanationProtocol, connections: int) -> None:
        self._book, self._asker, self._protocol, self._connections = book, asker, protocol, connections
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="explaining")
        self._under_way: dict[Future[FeatureOutcome], _Keys] = {}

    def __enter__(self) -> _ExplainThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ends the work: calls under way are waited for, as they are paid for, and what they gave is kept."""
        if kind is not None:
            self._asker.stop()
        self._pool.shutdown(cancel_futures=True)
        for future, keys in self._under_way.items():
            if future.cancelled() or future.exception() is not None:
                self._book.add_usage(_usage(keys, self._asker))
                self._asker.book(keys["explainer"] + keys["judge"])
            else:
                self._write(future.result(), keys)

    def through(self, plans: Iterator[_PreparedPlan | FeatureOutcome]) -> Iterator[Explanation]:
        """The explanations, as they come, each in the book already."""
        while True:
            for shown in islice(plans, AHEAD * self._connections - len(self._under_way)):
                keys = _keys()
                self._under_way[self._pool.submit(_explained, self._asker, self._protocol, shown, keys)] = keys
            if not self._under_way:
                return
            for future in wait(self._under_way, return_when=FIRST_COMPLETED).done:
                done = future.result()
                yield self._write(done, self._under_way.pop(future))

    def _write(self, done: FeatureOutcome, keys: _Keys) -> Explanation:
        self._book.add_explanation(done.explanation, done.judgements, done.scores, _usage(keys, self._asker))
        self._asker.book(keys["explainer"] + keys["judge"])
        return done.explanation


def _usage(keys: _Keys, asker: CachedClient) -> list[RecordedUsage]:
    found: dict[Role, Spending] = {role: asker.spent(asked) for role, asked in keys.items()}
    return [
        RecordedUsage(
            backend=asker.name,
            role=role,
            calls=spent.calls,
            tokens_in=spent.tokens_in,
            tokens_out=spent.tokens_out,
            cost=spent.cost or None,
            seconds=spent.seconds,
        )
        for role, spent in found.items()
        if spent.calls
    ]


class PresenceQuestion(NamedTuple):
    """An image, and what is asked of it."""

    image: Image.Image
    part: Image.Image | None
    """What is cut out of it, where the concept is looked for; None where that is all of it."""
    concept: str
    rest: str
    """What else the image is of."""


def look(asker: CachedClient, images: Sequence[PresenceQuestion], *, connections: int = 16) -> list[PresenceAnswer]:
    """What is seen of each image. A question that gets no answer ends it, as figures with holes mislead."""

    def seen(number: int) -> PresenceAnswer:
        asked = images[number]
        shown = [each for each in (asked.image, asked.part) if each is not None]
        instruction = to_see(asked.concept, asked.rest, asked.part is not None)
        try:
            return asker.see([_whole_image_view(each) for each in shown], instruction, PresenceAnswer, [])
        except NoAnswer as error:
            raise BadInput(
                f"Whether image {number + 1} of {len(images)} shows '{asked.concept}' was not answered: {error}. Give the "
                "same command again; what was answered is kept."
            ) from None

    with ThreadPoolExecutor(connections) as threads:
        return list(threads.map(seen, range(len(images))))


def _whole_image_view(image: Image.Image) -> ImageView:
    times = max(1, -(-SIDE // min(image.size)))
    shown = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    shot = Shot(model="", pixels=(image.height, image.width), steps=1, guidance=0.0)
    return ImageView(draw=lambda: shown, shot=shot, highlight=torch.ones(1, 1))
