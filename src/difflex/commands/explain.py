"""`difflex explain`: what the features of a study's dictionaries are, in words, and how true that is."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.drawn_world import drawn_concepts
from difflex.commands.flags import VLMCommand
from difflex.commands.inputs import open_answer_cache
from difflex.errors import BadInput, UnknownName
from difflex.explanation import (
    AnswerCache,
    CachedClient,
    DryRunClient,
    ExplainedMethod,
    ExplainResult,
    ExplanationProtocol,
    KnownConceptsBackend,
    VLMBackend,
    chosen,
    compare,
    explain,
    methods,
    rehearse,
)
from difflex.features import Book, ImageAlbum
from difflex.miniature import draw
from difflex.records import Site
from difflex.study import DictionaryRef, Study

__all__ = ["ExplainCommand"]

KNOWN = "known"
FIRST_SEED = "drawn:"
"""What the names of drawn images begin with; their seed follows."""
COUNTED = 400
"""Drawn images in which it is counted how common each concept is."""
LISTED = 20
"""Failures that are printed; all of them are in the book."""


@final
@dataclass(frozen=True, kw_only=True)
class ExplainCommand(VLMCommand):
    """Say in words what features are, and measure how true that is; what was answered is never asked, or paid, again."""

    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")]
    """Studies with books; several are shown side by side, as one of an untrained model beside the trained one's."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all that have books)")] = ()
    """All books of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """The books of these dictionaries, each by SITE/LABEL: double.18/topk-8192-k32."""
    vlm: Annotated[str, arg(metavar="WHO")] = KNOWN
    """Who looks: the address of an OpenAI-compatible endpoint, the folder or hub name of a model for transformers, or `known`."""
    protocol: Literal["heldout", "paper"] = "heldout"
    """Which images are judged: ones that the explainer never saw, and near misses; or as arXiv 2505.24360 did."""
    random_features: Annotated[int, arg(metavar="N")] = 100
    """How many features of each dictionary, by chance."""
    feature: Annotated[tuple[int, ...], arg(metavar="NUMBER...", help_behavior_hint="(default: by chance)")] = ()
    """These features."""
    judged_images: Annotated[int, arg(metavar="N")] = 10
    """How many images of each feature are judged; half of them are of others."""
    style: Literal["blue", "outline"] = "blue"
    """How what a feature marks is drawn: a blue veil, as published, or a line around it."""
    seed: int = 0
    """Decides which features, and which images beside theirs."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Say how many calls, tokens and how much money it would take, and ask nothing."""

    def __call__(self) -> list[Path]:
        self._check()
        protocol = ExplanationProtocol(name=self.protocol, judged=self.judged_images, style=self.style, seed=self.seed)
        studies = [Study.open(folder) for folder in self.studies]
        asked = [*zip(studies, self._places(studies), strict=True)]
        with closing(self._backend()) as backend:
            for study, places in asked:
                with open_answer_cache(study) as answers:
                    work = self._rehearsed if self.dry_run else self._explained
                    work(study, places, backend, answers, protocol)
        if self.dry_run:
            return []
        found = compare([method for study, places in asked for method in _methods(study, places)])
        print(found.table)
        made = [study.explanations / "scores.json" for study in studies]
        for path in made:
            found.save(path)
        return made

    def _check(self) -> None:
        if self.random_features < 1:
            raise BadInput(f"--random-features {self.random_features} explains nothing. Ask for 1 or more.")
        self.check_endpoint(self.vlm)

    def _backend(self) -> VLMBackend:
        """Who looks."""
        if self.vlm == KNOWN:
            seed = lambda name: int(name.removeprefix(FIRST_SEED))  # noqa: E731 (the truth of an image is drawn anew from its name)
            return KnownConceptsBackend(
                [concept.name for concept in drawn_concepts()],
                lambda name, rows, columns: draw([seed(name)]).shares(rows, columns)[0],
                draw(range(COUNTED)).shares(8, 8).mean((0, 2, 3)),
            )
        return self.backend(self.vlm)

    def _places(self, studies: Sequence[Study]) -> list[list[DictionaryRef]]:
        """Of each study the dictionaries asked for, which have books; what is asked for is in one of the studies at least."""
        known = [[place for place in study.dictionaries() if study.book(*place).is_file()] for study in studies]
        for study, places in zip(studies, known, strict=True):
            if not places:
                raise UnknownName(f"{study.folder} has no books. difflex collect makes them.")
        every, asked = [place for places in known for place in places], [str(Site.parse(site)) for site in self.site]
        sites, names = dict.fromkeys(str(place.site) for place in every), dict.fromkeys(map(str, every))
        for what, wanted, there in (("The site", asked, sites), ("The dictionary", self.dictionary, names)):
            for name in wanted:
                if name not in there:
                    raise UnknownName.among(what, name, there, "difflex collect makes the books of dictionaries.")
        everything = not asked and not self.dictionary
        meant = lambda place: everything or str(place.site) in asked or str(place) in self.dictionary  # noqa: E731
        return [[place for place in places if meant(place)] for places in known]

    def _of(self, book: Book, protocol: ExplanationProtocol) -> list[int]:
        """The features to explain."""
        if self.feature:
            return [book.feature(feature).feature for feature in dict.fromkeys(self.feature)]
        features = chosen(book, self.random_features, protocol, self.seed)
        if not features:
            raise BadInput(
                f"No feature of {book.about.dictionary} fires in {protocol.needs} shots of its book, as the protocol "
                f"'{protocol.name}' needs. Collect from more images, or judge fewer."
            )
        if self.vlm == KNOWN:
            _check_drawn(book, features[0])
        return features

    def _explained(
        self,
        study: Study,
        places: Sequence[DictionaryRef],
        backend: VLMBackend,
        answers: AnswerCache,
        protocol: ExplanationProtocol,
    ) -> None:
        asker = CachedClient(backend, answers, self.request_policy())
        for place in places:
            with Book.edit(study.book(*place)) as book:
                features = self._of(book, protocol)
                work = explain(book, features, asker, ImageAlbum(study.images), protocol, connections=self.connections)
                print(f"{study.folder.name}/{place}: {_told(work)}")
        asked = asker.asked
        if asked.spent.calls:
            spent, cost = asked.spent, f", cost {asked.spent.cost:.4g}" if asked.spent.cost else ""
            print(f"{spent.calls:,} calls, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} tokens out{cost}")

    def _rehearsed(
        self,
        study: Study,
        places: Sequence[DictionaryRef],
        backend: VLMBackend,
        answers: AnswerCache,
        protocol: ExplanationProtocol,
    ) -> None:
        rehearsal = DryRunClient(backend, answers, self.request_policy())
        for place in places:
            with Book.open(study.book(*place)) as book:
                rehearse(book, self._of(book, protocol), rehearsal, ImageAlbum(study.images), protocol)
        spent = rehearsal.asked.spent
        cost = f"cost about {spent.cost:.4g}" if self.price else "for the cost, give --price IN,OUT"
        print(
            f"{study.folder.name}: {spent.calls:,} calls, about {spent.tokens_in:,} tokens in and {spent.tokens_out:,} out, "
            f"{cost}; {rehearsal.asked.found:,} answers are there already"
        )


def _check_drawn(book: Book, feature: int) -> None:
    shots = book.shots(example.shot for example in book.examples(feature, "top"))
    if not all((row.shot.image or "").startswith(FIRST_SEED) for row in shots.values()):
        raise BadInput(
            f"{book.path} shows images of which nobody knows what is where. Make it from drawn ones, difflex collect STUDY "
            "--drawn, or name a model that looks: --vlm."
        )


def _methods(study: Study, places: Sequence[DictionaryRef]) -> list[ExplainedMethod]:
    found = []
    for place in places:
        with Book.open(study.book(*place)) as book:
            found += methods(book, study.folder)
    return found


def _told(work: ExplainResult) -> str:
    """What came of a dictionary, with a line for each failure."""
    lines = [f"{len(work.done)} explained, {len(work.kept)} were before, {len(work.failed)} failed"]
    lines += [f"  feature {feature}: {reason}" for feature, reason in [*work.failed.items()][:LISTED]]
    if len(work.failed) > LISTED:
        lines.append(f"  and {len(work.failed) - LISTED} more")
    return "\n".join(lines) + ("\n  give the same command again to try these again" if work.failed else "")
