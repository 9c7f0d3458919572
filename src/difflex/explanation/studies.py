"""Explain the features of the dictionaries of one or more studies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice

from difflex.dictionary_config import fingerprint
from difflex.errors import BadInput, UnknownName
from difflex.explanation.backends import VLMBackend
from difflex.explanation.client import CachedClient, open_answers, open_client
from difflex.explanation.comparison import ExplainedMethod, MethodComparison, compare_methods, read_methods
from difflex.explanation.explaining import ExplainResult, dry_run, explain
from difflex.explanation.protocol import ExplanationProtocol, has_enough_images
from difflex.explanation.questions import explain_instruction, judge_instruction
from difflex.explanation.requests import RequestPolicy
from difflex.features import Book, FeatureFilter, ImageAlbum
from difflex.records import Site
from difflex.study import DictionaryRef, Study
from difflex.values import check_fields

EXAMPLE = "(what the explainer answered)"
MAX_FAILURES = 20
"""Failures that are printed; all of them are in the book."""
MAX_CONNECTIONS = 1000
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which features are explained, and how."""

    sites: tuple[str, ...] = ()
    """Sites whose dictionaries are explained."""
    dictionaries: tuple[str, ...] = ()
    """Further dictionaries, as SITE/LABEL; all that have books if there are neither sites nor dictionaries."""
    features: tuple[int, ...] = ()
    """Features of each dictionary; random ones if empty."""
    random_features: int = 100
    """Number of random features of each dictionary."""
    protocol: ExplanationProtocol = field(default_factory=ExplanationProtocol)
    connections: int = 16
    """Requests at the same time."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.random_features < 1:
            raise BadInput(f"There is nothing to explain: {self.random_features} random features. Ask for 1 or more.")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise BadInput(f"{self.connections} requests at the same time are not possible. Ask for 1 to {MAX_CONNECTIONS}.")


def explain_studies(
    studies: Sequence[Study], config: ExplainConfig, open_backend: Callable[[], VLMBackend], policy: RequestPolicy, log: Log
) -> MethodComparison:
    """Explain features, write them into the books of the studies, and compare the dictionaries; `log` takes progress lines."""
    selection, methods, results = _select_dictionaries(studies, config), list[ExplainedMethod](), list[ExplainResult]()
    with ExitStack() as stack:
        # Whatever can forbid the work does so before a model is loaded or an answer is paid.
        caches = [stack.enter_context(open_answers(study.explanations)) for study in studies]
        for study, refs in zip(studies, selection, strict=True):
            _check_books(study, refs)
        backend = stack.enter_context(closing(open_backend()))
        source = f"protocol {config.protocol.label}, {backend.description}"
        for study, refs, answers in zip(studies, selection, caches, strict=True):
            client = CachedClient(backend, answers, policy)
            for ref in refs:
                with Book.edit(study.book(*ref)) as book:
                    features, album = _features(book, backend, config), ImageAlbum(study.images)
                    results.append(explain(book, features, client, album, config.protocol, connections=config.connections))
                    methods += read_methods(book, study.folder)
                log(f"{study.folder.name}/{ref}, {source}: {_summary(results[-1])}")
            spent = client.spending
            if spent.calls:
                cost = f", cost {spent.cost:.4g}" if spent.cost else ""
                log(
                    f"{backend.description}: {spent.calls:,} calls, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} out{cost}"
                )
    reasons = Counter(reason for result in results for reason in result.failed.values())
    if reasons and not any(result.explained or result.skipped for result in results):
        [(reason, count)] = reasons.most_common(1)
        raise BadInput(
            f"No feature was explained: all {reasons.total()} failed, {count} of them because: {reason}. Fix that and run the "
            "same command again to try them again."
        )
    return compare_methods(methods)


def _check_books(study: Study, refs: Sequence[DictionaryRef]) -> None:
    """Raise an error unless the books of a study are whole, of its dictionaries as they are now, and can be written."""
    for ref in refs:
        with Book.edit(study.book(*ref)) as book:
            book.verify(fingerprint(study.dictionary(*ref)))
            book.add_usage([])


def dry_run_studies(
    studies: Sequence[Study], config: ExplainConfig, open_backend: Callable[[], VLMBackend], policy: RequestPolicy, log: Log
) -> None:
    """Log the instructions, how many calls and tokens each study would need, and what they would cost; send nothing."""
    selection, protocol = _select_dictionaries(studies, config), config.protocol
    with closing(open_backend()) as backend:
        log(f"Protocol {protocol.label}, {backend.description}")
        log(f"\nInstruction of the explainer:\n{explain_instruction(protocol.shown, protocol.style, protocol.name).text}")
        log(f"\nInstruction of the judge:\n{judge_instruction(EXAMPLE, protocol.style, protocol.name).text}\n")
        for study, refs in zip(studies, selection, strict=True):
            with open_client(backend, study.explanations, policy, dry_run=True) as client:
                for ref in refs:
                    with Book.open(study.book(*ref)) as book:
                        dry_run(book, _features(book, backend, config), client, ImageAlbum(study.images), config.protocol)
            spent = client.spending
            cost = f"cost about {spent.cost:.4g}" if any(policy.price) else "for the cost, give --price IN,OUT"
            log(
                f"{study.folder.name}: {spent.calls:,} calls, about {spent.tokens_in:,} tokens in and {spent.tokens_out:,} out, "
                f"{cost}; {client.cached:,} answers are cached"
            )


def _select_dictionaries(studies: Sequence[Study], config: ExplainConfig) -> list[list[DictionaryRef]]:
    """Return the selected dictionaries of each study that have books; every name must exist in at least one study."""
    if len({study.folder.resolve() for study in studies}) < len(studies):
        raise BadInput(f"A study is named twice: {' '.join(str(study.folder) for study in studies)}. Name each once.")
    with_books = [[ref for ref in study.dictionaries() if study.book(*ref).is_file()] for study in studies]
    for study, refs in zip(studies, with_books, strict=True):
        if not refs:
            raise UnknownName(f"{study.folder} has no books. difflex collect makes them.")
    sites, available = [str(Site.parse(site)) for site in config.sites], [ref for refs in with_books for ref in refs]
    for kind, names, choices in (
        ("The site", sites, dict.fromkeys(str(ref.site) for ref in available)),
        ("The dictionary", config.dictionaries, dict.fromkeys(map(str, available))),
    ):
        for name in names:
            if name not in choices:
                raise UnknownName.among(kind, name, choices, "difflex collect makes the books of dictionaries.")
    if not sites and not config.dictionaries:
        return with_books
    return [[ref for ref in refs if str(ref.site) in sites or str(ref) in config.dictionaries] for refs in with_books]


def choose_features(book: Book, count: int, protocol: ExplanationProtocol, seed: int = 0) -> list[int]:
    """Return `count` random features that fire in as many shots as `protocol` needs; all of them if there are fewer.

    A larger `count` returns the same features and more, and another protocol mostly the same.
    """
    suitable = {row.feature for row in book.features(where=[FeatureFilter("shots", ">=", protocol.needed_shots)])}
    order = (feature for feature in random.Random(seed).sample(range(book.about.size), book.about.size) if feature in suitable)
    if protocol.min_patches > 1:
        order = (feature for feature in order if has_enough_images(book, feature, protocol))
    return [*islice(order, count)]


def _features(book: Book, backend: VLMBackend, config: ExplainConfig) -> list[int]:
    """Return the features to explain, after a check that the backend can answer about their images."""
    features = [book.feature(feature).feature for feature in dict.fromkeys(config.features)]
    if not config.features:
        features = choose_features(book, config.random_features, config.protocol, config.protocol.seed)
    if not features:
        least = config.protocol.min_patches
        patches = "" if least == 1 else f", in {least} patches or more of each"
        raise BadInput(
            f"No feature of {book.about.dictionary} fires in {config.protocol.needed_shots} shots of its book{patches}, as the "
            f"protocol '{config.protocol.label}' needs. Collect from more images, or ask for less."
        )
    rows = book.shots(example.shot for example in book.examples(features[0], "top"))
    backend.check_shots(row.shot for row in rows.values())
    return features


def _summary(result: ExplainResult) -> str:
    """Return the counts of a dictionary, with a line for each failure."""
    counts = f"{len(result.explained)} explained, {len(result.skipped)} skipped (explained before), {len(result.failed)} failed"
    lines = [counts, *(f"  feature {feature}: {reason}" for feature, reason in [*result.failed.items()][:MAX_FAILURES])]
    if len(result.failed) > MAX_FAILURES:
        lines.append(f"  and {len(result.failed) - MAX_FAILURES} more")
    return "\n".join(lines) + ("\n  run the same command again to try these again" if result.failed else "")
