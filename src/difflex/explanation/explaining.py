"""Explain features with a VLM, judge the explanations, and write both into the book."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, final

import torch
from PIL import Image

from difflex.errors import BadInput, BrokenFile
from difflex.explanation.client import CachedClient, NoAnswer
from difflex.explanation.comparison import score_judgements
from difflex.explanation.protocol import ExplanationProtocol, FeaturePlan, UnsuitableFeature, plan_feature
from difflex.explanation.questions import ImageView, explain_instruction, judge_instruction, odd_one_out_instruction
from difflex.features import Book, FeatureFilter, ImageAlbum, overlaid
from difflex.features.entries import COVER_THRESHOLD, Example, ShotRow
from difflex.features.explanations import Explanation, ExplanationScore, Judgement, RecordedUsage
from difflex.progress import ProgressBar

MIN_SIDE = 256
"""Images are enlarged until their longer side has at least this many pixels."""
PLANS_AHEAD = 2
"""Plans prepared ahead for each connection."""
_RequestKeys = defaultdict[Literal["explainer", "judge"], list[str]]
"""The content keys of the requests for one feature, by the role of the VLM."""


class ExplainResult(NamedTuple):
    """The outcome for the features of one dictionary."""

    explained: tuple[int, ...]
    skipped: tuple[int, ...]
    """Features that an earlier run explained."""
    failed: Mapping[int, str]
    """Features without an explanation, and the reason; the next run tries them again."""


def explain(
    book: Book,
    features: Sequence[int],
    client: CachedClient,
    album: ImageAlbum,
    protocol: ExplanationProtocol = ExplanationProtocol(),  # noqa: B008 (a constant)
    *,
    connections: int = 16,
    progress: bool = True,
) -> ExplainResult:
    """Explain `features` and write each into the book, with judgements and scores, as soon as it is complete.

    After a kill the next call repeats no cached question. If no call can be sent any more, as when the budget is used up, calls
    on their way finish and are recorded before the error is raised.
    """
    explainer = _FeatureExplainer(book, client, album, protocol)
    pending = explainer.pending(features)
    failed = explainer.explain_all(pending, connections, progress)
    explained = tuple(feature for feature in pending if feature not in failed)
    return ExplainResult(explained, tuple(feature for feature in features if feature not in {*pending}), failed)


def dry_run(
    book: Book,
    features: Sequence[int],
    client: CachedClient,
    album: ImageAlbum,
    protocol: ExplanationProtocol = ExplanationProtocol(),  # noqa: B008 (a constant)
) -> None:
    """Ask everything that `explain` would ask, with a client in a dry run, and write nothing."""
    explainer = _FeatureExplainer(book, client, album, protocol)
    for feature in explainer.pending(features):
        explainer.explain(explainer.prepare(feature), defaultdict(list))


class _FeatureResult(NamedTuple):
    """What is written into the book for one feature."""

    explanation: Explanation
    judgements: tuple[Judgement, ...] = ()
    scores: tuple[ExplanationScore, ...] = ()


class _PreparedFeature(NamedTuple):
    """The plan for a feature and the views of its examples, by their numbers."""

    plan: FeaturePlan
    views: Mapping[int, ImageView]

    def view(self, examples: Sequence[Example]) -> list[ImageView]:
        return [self.views[example.id] for example in examples]


@final
class _FeatureExplainer:
    """Explains one feature at a time; `prepare` reads the book, `explain` may run in any thread."""

    def __init__(self, book: Book, client: CachedClient, album: ImageAlbum, protocol: ExplanationProtocol) -> None:
        if book.about.grid is None:
            raise BadInput(
                f"{book.about.dictionary} is about text tokens, which have no position in an image. Explain image sites."
            )
        self._book, self._client, self._album, self._protocol = book, client, album, protocol
        self._grid = book.about.grid
        self._others = {row.feature: row.shots for row in book.features(where=[FeatureFilter("shots", ">", 0)])}

    def pending(self, features: Sequence[int]) -> list[int]:
        """Return the features that are not explained yet."""
        own = (self._client.name, self._protocol.label, "done")
        done = {row.feature for row in self._book.explanations() if (row.backend, row.protocol, row.state) == own}
        return [feature for feature in features if feature not in done]

    def prepare(self, feature: int) -> _PreparedFeature | _FeatureResult:
        """Choose the images for a feature; return a failure if there are too few."""
        try:
            plan = plan_feature(self._book, feature, self._others, self._protocol)
        except UnsuitableFeature as error:
            return _FeatureResult(self._explanation(feature, reason=str(error)))
        rows = self._book.shots(example.shot for example in plan.examples)
        peaks = {number: self._book.feature(number).peak for number in {example.feature for example in plan.examples}}
        views = {example.id: self._view(example, rows[example.shot], peaks[example.feature]) for example in plan.examples}
        return _PreparedFeature(plan, views)

    def _view(self, example: Example, row: ShotRow, peak: float) -> ImageView:
        highlight, strength = torch.zeros(self._grid), torch.tensor(example.map.values) / peak
        highlight.view(-1)[list(example.map.tokens)] = strength.where(strength >= COVER_THRESHOLD, 0.0)

        def draw() -> Image.Image:
            try:
                image = self._album.open(row.image.file)
            except BrokenFile as error:
                raise NoAnswer(str(error)) from None  # other features have other images
            return overlaid(image, example.map, self._grid, peak, style=self._protocol.style, side=MIN_SIDE)

        return ImageView(draw=draw, shot=row.shot, highlight=highlight)

    def _explanation(self, feature: int, text: str = "", descriptions: Sequence[str] = (), reason: str = "") -> Explanation:
        return Explanation(
            feature=feature,
            backend=self._client.name,
            protocol=self._protocol.label,
            text=text,
            descriptions=tuple(descriptions),
            state="failed" if reason else "done",
            reason=reason,
        )

    def explain(self, prepared: _PreparedFeature | _FeatureResult, keys: _RequestKeys) -> _FeatureResult:
        """Explain and judge a feature; content keys of the requests are appended to `keys`."""
        if isinstance(prepared, _FeatureResult):
            return prepared
        plan, style, name = prepared.plan, self._protocol.style, self._protocol.name
        text, descriptions = "", list[str]()
        try:
            instruction = explain_instruction(len(plan.shown), style, name)
            answer = self._client.ask(prepared.view(plan.shown), instruction, keys["explainer"])
            text, descriptions = answer.common_pattern, answer.pattern_descriptions
            instruction = judge_instruction(text, style, name)
            judgements = [
                Judgement(example.id, is_own, self._client.ask(prepared.view([example]), instruction, keys["judge"]).score)
                for is_own, examples in ((True, plan.positives), (False, plan.negatives))
                for example in examples
            ]
            scores = [*score_judgements(judgements, self._protocol.seed), *self._intruder_score(prepared, keys)]
        except NoAnswer as error:
            return _FeatureResult(self._explanation(plan.feature, text, descriptions, str(error)))
        return _FeatureResult(self._explanation(plan.feature, text, descriptions), tuple(judgements), tuple(scores))

    def _intruder_score(self, prepared: _PreparedFeature, keys: _RequestKeys) -> list[ExplanationScore]:
        """Return 1 if the judge finds the image that does not belong, else 0; nothing if the plan has no such test."""
        views = prepared.view(prepared.plan.lineup)
        if not views:
            return []
        answer = self._client.ask(views, odd_one_out_instruction(len(views), self._protocol.style), keys["judge"])
        return [ExplanationScore("intruder", float(answer.image == 1 + prepared.plan.odd), None, None, 1)]

    def explain_all(self, features: Sequence[int], connections: int, progress: bool) -> dict[int, str]:
        """Explain features in threads and write each into the book; return the failed ones with their reasons.

        Results wait for their turn, so the book does not depend on which thread is faster. Their answers are in the cache as
        soon as they are paid. Calls on their way finish and are recorded, whatever ends the work.
        """
        failed, running = dict[int, str](), dict[Future[_FeatureResult], _RequestKeys]()
        pool, prepared = ThreadPoolExecutor(connections, thread_name_prefix="explaining"), map(self.prepare, features)
        bar = ProgressBar(total=len(features), desc="explaining", unit=" features", show=progress)
        try:
            while True:
                unfinished = [future for future in running if not future.done()]
                for feature in islice(prepared, PLANS_AHEAD * connections - len(unfinished)):
                    keys: _RequestKeys = defaultdict(list)
                    future = pool.submit(self.explain, feature, keys)
                    running[future] = keys
                    unfinished.append(future)
                if not running:
                    return failed
                for future in wait(unfinished, return_when=FIRST_COMPLETED).done:
                    future.result()  # an error ends the work at once
                while running and (first := next(iter(running))).done():
                    result = first.result()
                    self._write(result, running.pop(first))
                    if result.explanation.state == "failed":
                        failed[result.explanation.feature] = result.explanation.reason
                    bar.update()
        except BaseException:
            self._client.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for future, keys in running.items():
                is_complete = not future.cancelled() and future.exception() is None
                self._write(future.result() if is_complete else None, keys)
            bar.close()

    def _write(self, result: _FeatureResult | None, keys: _RequestKeys) -> None:
        """Write a result, or None for an interrupted feature, and the usage of its requests into the book."""
        usage = [
            RecordedUsage(backend=self._client.name, role=role, **dict[str, Any](vars(spending), cost=spending.cost or None))
            for role, role_keys in keys.items()
            if (spending := self._client.unrecorded(role_keys)).calls
        ]
        if result is None:
            self._book.add_usage(usage)
        else:
            self._book.add_explanation(result.explanation, result.judgements, result.scores, usage)
        self._client.mark_recorded([*chain(*keys.values())])
