"""What the page of a feature shows: its examples, its explanations with their judgements and votes, and where it fires."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from difflex.errors import DifflexError, StaleWork, UnknownName
from difflex.features import Book
from difflex.features.entries import Example, TokenMap
from difflex.features.votes import ExplanationVote, read_votes, text_fingerprint
from difflex.web.answers import AverageMap, Ballot, ExampleAnswer, JudgedImage, ShownExplanation, covered_bits, levels

MOST_BYTES = 150_000
"""Of the maps of a feature's examples, so that an answer is quick on any grid."""


def shown_examples(book: Book, examples: Sequence[Example], peak: float, grid: tuple[int, int] | None) -> list[ExampleAnswer]:
    """Return examples with their images and maps: those of the lowest rank of each kind, as many as fit into an answer."""
    most = MOST_BYTES // (grid[0] * grid[1]) if grid else len(examples)
    kept = {example.id for example in sorted(examples, key=lambda example: example.rank)[:most]}
    examples = [example for example in examples if example.id in kept]
    shots = book.shots(example.shot for example in examples)
    return [
        ExampleAnswer(
            kind=example.kind,
            split=example.split,
            shot=example.shot,
            image=shots[example.shot].image.file,
            width=shots[example.shot].image.width,
            height=shots[example.shot].image.height,
            prompt=shots[example.shot].shot.prompt,
            seed=shots[example.shot].shot.seed,
            timestep=shots[example.shot].shot.timestep,
            peak=example.peak,
            quantile=example.quantile,
            levels=levels(example.map, peak or 1.0, grid),
        )
        for example in examples
    ]


def average_map(examples: Sequence[Example], grid: tuple[int, int] | None) -> AverageMap | None:
    """Return the mean of the maps of random images in which a feature fires; None for text and for a feature without any."""
    maps = [example.map for example in examples if example.kind == "quantile" and example.map.tokens]
    if grid is None or not maps:
        return None
    tokens, values = (np.concatenate([np.asarray(where[part]) for where in maps]) for part in (0, 1))
    mean = np.bincount(tokens, values, grid[0] * grid[1]) / len(maps)
    (where,) = np.nonzero(mean)
    return AverageMap(
        images=len(maps), levels=levels(TokenMap(tuple(where.tolist()), tuple(mean[where].tolist())), float(mean.max()), grid)
    )


def shown_explanations(book: Book, feature: int, votes: Path) -> Iterator[ShownExplanation]:
    """Yield the explanations of a feature with their scores, judged images and the votes in the file `votes`."""
    cast = _read_votes(votes)
    for entry in book.explanations(feature):
        if entry.state == "done":
            key = (entry.backend, entry.protocol, text_fingerprint(entry.text))
            agree = [vote.agrees for vote in cast if (vote.backend, vote.protocol, vote.text) == key]
            yield ShownExplanation(
                text=entry.text,
                text_fingerprint=key[2],
                backend=entry.backend,
                protocol=entry.protocol,
                scores={score.measure: score.value for score in book.scores(entry.id)},
                judged=_judged(book, entry.id),
                agree=sum(agree),
                disagree=len(agree) - sum(agree),
            )


def new_vote(book: Book, feature: int, ballot: Ballot) -> ExplanationVote:
    """Return a vote as it is stored; raise an error if it is on a text that is no longer in the book."""
    texts = {(entry.backend, entry.protocol): entry.text for entry in book.explanations(feature) if entry.state == "done"}
    text = texts.get((ballot.backend, ballot.protocol))
    if text is None:
        raise UnknownName(f"Feature {feature} has no explanation by {ballot.backend}, {ballot.protocol}.")
    if text_fingerprint(text) != ballot.text_fingerprint:
        raise StaleWork("The explanation has changed since the page was loaded. Reload it to vote on the new one.")
    return ExplanationVote(
        voter=ballot.voter,
        feature=feature,
        backend=ballot.backend,
        protocol=ballot.protocol,
        text=ballot.text_fingerprint,
        agrees=ballot.agrees,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_votes(path: Path) -> list[ExplanationVote]:
    """Read votes; none from a damaged file, about which the next vote says what to do."""
    try:
        return read_votes(path)
    except DifflexError:
        return []


def _judged(book: Book, explanation: int) -> list[JudgedImage]:
    """Return the judged images of an explanation that are still in the book."""
    judgements = book.judgements(explanation)
    examples = book.examples_by_number(entry.example for entry in judgements if entry.example is not None)
    shots, grid = book.shots(example.shot for example in examples.values()), book.about.grid
    return [
        JudgedImage(
            shot=example.shot,
            image=shots[example.shot].image.file,
            prompt=shots[example.shot].shot.prompt,
            covered=covered_bits(example.map, example.peak, grid),
            fires=entry.fires,
            score=entry.score,
        )
        for entry in judgements
        if entry.example is not None and (example := examples.get(entry.example)) is not None
    ]
