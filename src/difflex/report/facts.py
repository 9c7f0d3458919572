"""Everything a report says, read from a study once; what cannot be trusted is named and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from difflex.dictionaries import fingerprint
from difflex.dictionaries.files import read_config
from difflex.effects import RemovalResults, SteeringResults
from difflex.effects.findings import Findings
from difflex.errors import DifflexError
from difflex.evaluation import Evaluation
from difflex.evaluation.anatomy import Anatomy
from difflex.evaluation.concepts import ConceptMatches
from difflex.features import Book, BookInfo
from difflex.records import Site
from difflex.report.soundness import changed, is_image, is_sound, k_of, known_in_numbers, normalisation
from difflex.report.steered import SteeringFacts, has_numbers, known
from difflex.store import Store
from difflex.study import CommandRecord, DictionaryRef, Study, diary, recipe_of

__all__ = ["DictionaryFacts", "MatchFacts", "StoreFacts", "StudyFacts", "read"]

T = TypeVar("T")


class StoreFacts(NamedTuple):
    """The activations of a site."""

    site: Site
    rows: int
    held_out: int
    width: int
    complete: bool


@dataclass(frozen=True, kw_only=True)
class DictionaryFacts:
    """A dictionary, and what was measured of it."""

    place: DictionaryRef
    kind: str
    size: int
    k: int
    normalisation: str
    """The method: `standardise`, `whiten`, `scale` or `none`."""
    variant: str
    """What its label says beside kind, size and k."""
    data: str
    """What it was made from, in the words of its config."""
    evaluation: Evaluation | None
    """None where there is none of what the dictionary now is."""

    @property
    def name(self) -> str:
        """`SITE/LABEL`."""
        return str(self.place)


@dataclass(frozen=True, kw_only=True)
class MatchFacts:
    """The features of one method, held against known concepts."""

    matches: ConceptMatches
    kind: str
    """Of a dictionary, or `pca`, `random`, `neurons`."""
    normalisation: str | None
    """Of a dictionary that was learned; None for what was not: neurons, axes."""
    untrained: bool
    """Whether it stands in the study of an untrained model."""
    k: int

    @property
    def path(self) -> str:
        """The block, whose neurons and residual are held side by side, and the stream."""
        return str(Site(self.matches.site.path, stream=self.matches.site.stream))

    @property
    def name(self) -> str:
        """Its label, with what it reads of the block unless it is the residual or neurons as they are, and that it is of an
        untrained model where it is."""
        apart = self.matches.site.kind not in ("residual", self.kind)
        name = f"{self.matches.label} ({self.matches.site.kind})" if apart else self.matches.label
        return f"{name}, untrained model" if self.untrained else name

    @property
    def is_trained(self) -> bool:
        """Whether it is a dictionary of the model studied."""
        return self.normalisation is not None and not self.untrained


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What is known of a study."""

    name: str
    """Of its folder."""
    study: Study
    begun: datetime | None
    """When study.json was written."""
    latest: datetime | None
    """When the youngest of the files that the report reads was written."""
    diary: tuple[CommandRecord, ...]
    recipe: str | None
    """Its name, where the diary keeps one."""
    stores: tuple[StoreFacts, ...]
    dictionaries: tuple[DictionaryFacts, ...]
    judged: tuple[MatchFacts, ...]
    """Of the study itself and, where one was named, of its control; at each block only what was judged on the same images."""
    anatomy: Anatomy | None
    books: tuple[DictionaryRef, ...]
    """The dictionaries that have a book of what they now are."""
    control: Study | None
    """The same model untrained, where a study of it was named."""
    control_books: tuple[DictionaryRef, ...]
    steered: tuple[SteeringFacts, ...]
    """The dictionaries whose features were steered with."""
    removals: tuple[RemovalResults, ...]
    """What came of taking concepts away."""
    findings: tuple[Findings, ...]
    """What experiments with steering found."""
    troubles: tuple[str, ...]
    """What is there but cannot be shown, and why."""

    @property
    def evaluated(self) -> list[tuple[DictionaryFacts, Evaluation]]:
        """The dictionaries that have figures."""
        return [(each, each.evaluation) for each in self.dictionaries if each.evaluation is not None]

    @property
    def blocks(self) -> dict[str, list[MatchFacts]]:
        """What was held against known concepts, by block."""
        paths = dict.fromkeys(each.path for each in self.judged)
        return {path: [each for each in self.judged if each.path == path] for path in paths}


def read(study: Study, control: Study | None = None) -> StudyFacts:
    """The facts of `study`, with the matches of `control`, a study of the same model untrained, beside its own."""
    troubles: list[str] = []
    reading = _FactsReader(troubles)
    dictionaries = tuple(each for place in study.dictionaries() if (each := reading.measured(study, place)) is not None)
    judged = [*reading.judged(study, untrained=False), *(reading.judged(control, untrained=True) if control else ())]
    found = (study.folder / "steering" / "findings").glob("*.json")
    stores = [reading.tried(lambda folder=folder: _stored(folder)) for folder in study.stores().values()]
    anatomy = reading.anatomy(study)
    steered = [reading.steered(study, each, judged) for each in dictionaries]
    books, control_books = (
        tuple(place for place in each.dictionaries() if reading.has_book(each, place)) if each else ()
        for each in (study, control)
    )
    entries = tuple(reading.tried(lambda: diary(study.folder)) or ())
    return StudyFacts(
        name=study.folder.resolve().name,
        study=study,
        begun=_written([study.folder / "study.json"]),
        latest=_written(_files(study)),
        diary=entries,
        recipe=recipe_of(study.folder) if entries else None,
        stores=tuple(each for each in stores if each is not None),
        dictionaries=dictionaries,
        judged=tuple(_comparable(judged, troubles)),
        anatomy=anatomy,
        books=books,
        control=control,
        control_books=control_books,
        steered=tuple(each for each in steered if each is not None),
        removals=tuple(each for path in study.removals() if (each := reading.removal(study, path)) is not None),
        findings=tuple(each for path in sorted(found) if (each := reading.findings(study, path)) is not None),
        troubles=tuple(troubles),
    )


class _FactsReader(NamedTuple):
    """Reads what may be broken: what cannot be read goes to the troubles."""

    troubles: list[str]

    def tried(self, work: Callable[[], T]) -> T | None:
        """What `work` gives, or None where it meets one of our own errors."""
        try:
            return work()
        except (DifflexError, OSError) as error:
            self.troubles.append(str(error))
            return None

    def measured(self, study: Study, place: DictionaryRef) -> DictionaryFacts | None:
        """A dictionary, with its evaluation where that is of what the dictionary now is."""
        folder, path = study.dictionary(*place), study.evaluation(*place)
        config = self.tried(lambda: read_config(folder))
        if config is None:
            return None
        evaluation = self.tried(lambda: Evaluation.load(path)) if path.exists() else None
        if evaluation is not None and not self.tried(lambda of=evaluation: of.is_of(folder)):
            self.troubles.append(
                f"{place}: the dictionary has changed since it was evaluated. difflex evaluate measures it again."
            )
            evaluation = None
        if evaluation is not None and not is_sound(evaluation, config):
            self.troubles.append(f"{path} holds what is no number: it is damaged. Delete it and evaluate again.")
            evaluation = None
        return DictionaryFacts(
            place=place,
            kind=config.kind,
            size=config.size,
            k=config.k,
            normalisation=normalisation(config),
            data=str(config.training.get("data", "")),
            variant=place.label.removeprefix(f"{config.kind}-{config.size}-k{config.k}").lstrip("-"),
            evaluation=evaluation,
        )

    def has_book(self, study: Study, place: DictionaryRef) -> bool:
        """Whether a dictionary has a book of what it now is."""
        path = study.book(*place)
        if not path.exists():
            return False
        about = self.tried(lambda: _about(path))
        if about is None or about.fingerprint != self.tried(lambda: fingerprint(study.dictionary(*place))):
            if about is not None:
                self.troubles.append(
                    f"{place}: the dictionary has changed since its book was written. difflex collect writes it anew."
                )
            return False
        return True

    def judged(self, study: Study, untrained: bool) -> list[MatchFacts]:
        """The matches of a study that are of its model and of what its dictionaries now are."""
        found = []
        for path in sorted(study.folder.glob("concepts/*/*.json")):
            matches = self.tried(lambda path=path: ConceptMatches.load(path))
            name = f"concepts/{path.parent.name}/{path.name}"
            if matches is None:
                continue
            if not known_in_numbers(matches):
                self.troubles.append(
                    f"{name} holds what is no number: it is damaged. Delete it; difflex concepts makes it again."
                )
                continue
            said = (matches.made_from.get("model", study.model), matches.made_from.get("revision", study.revision or ""))
            if said != (study.model, study.revision or ""):
                self.troubles.append(f"{name} is of {said[0]} {said[1]}, not of this study. difflex concepts makes it again.")
                continue
            if (each := self._of(study, matches, name, untrained)) is not None:
                found.append(each)
        return found

    def _of(self, study: Study, matches: ConceptMatches, name: str, untrained: bool) -> MatchFacts | None:
        kind, k = matches.label.split("-")[0], k_of(matches.label)
        folder = study.dictionary(matches.site, matches.label)
        if "fingerprint" not in matches.made_from:
            return None if untrained else MatchFacts(matches=matches, kind=kind, normalisation=None, untrained=untrained, k=k)
        if not (folder / "config.json").is_file():
            self.troubles.append(f"{name} is of a dictionary that is no longer there. Delete it.")
            return None
        if matches.made_from["fingerprint"] != self.tried(lambda: fingerprint(folder)):
            self.troubles.append(f"{name}: the dictionary has changed since. difflex concepts holds it against concepts again.")
            return None
        config = self.tried(lambda: read_config(folder))
        if config is None:
            return None
        learned = None if config.kind == "neurons" else normalisation(config)
        return MatchFacts(matches=matches, kind=config.kind, normalisation=learned, untrained=untrained, k=config.k)

    def steered(self, study: Study, measured: DictionaryFacts, judged: Iterable[MatchFacts]) -> SteeringFacts | None:
        """What came of steering with a dictionary's features, where it is of what the dictionary now is."""
        place = measured.place
        path = study.steering(*place)
        edited = self.tried(lambda: SteeringResults.load(path)) if path.exists() else None
        if edited is None:
            return None
        now = self.tried(lambda: fingerprint(study.dictionary(*place)))
        if edited.model != study.model or edited.made_from.get(str(place)) != now:
            self.troubles.append(
                f"{place}: the dictionary has changed since it was steered with. difflex steer-eval judges it again."
            )
            return None
        if not has_numbers(edited):
            self.troubles.append(f"{path} holds what is no number: it is damaged. Delete it; difflex steer-eval makes it again.")
            return None
        own = [each.matches for each in judged if not each.untrained and (each.matches.site, each.matches.label) == place]
        there = known(own[0] if own else None, edited, place)
        if there is None:
            self.troubles.append(f"{place} was steered with, but what its features detect is not known. Run difflex concepts.")
            return None
        files = [(strip, path.with_suffix("") / strip.file) for strip in edited.strips]
        return SteeringFacts(
            place=place,
            kind=measured.kind,
            judged=edited,
            known=there,
            strips=tuple((strip, file) for strip, file in files if self.tried(lambda file=file: is_image(file))),
        )

    def removal(self, study: Study, path: Path) -> RemovalResults | None:
        """What came of taking concepts away, where it is of what the dictionaries now are."""
        removed = self.tried(lambda: RemovalResults.load(path))
        if removed is None:
            return None
        now = {
            str(place): self.tried(lambda place=place: fingerprint(study.dictionary(*place))) for place in study.dictionaries()
        }
        told = {name: removed.made_from.get(name) for name in removed.dictionaries}
        if removed.model != study.model or any(value != now.get(name) for name, value in told.items()):
            self.troubles.append(f"{path} is of other dictionaries than those that are here now. difflex removal makes it again.")
            return None
        return removed

    def findings(self, study: Study, path: Path) -> Findings | None:
        """What experiments found with the model of the study and with what its dictionaries now are."""
        found = self.tried(lambda: Findings.load(path))
        if found is None:
            return None
        if (found.model, found.revision) != (study.model, study.revision):
            self.troubles.append(f"{path} is of {found.model} {found.revision}, not of this study. difflex findings tries again.")
            return None
        stale = {each.name: ", ".join(changed(study, each.made_from)) for each in found.found}
        told = "{}: '{}' is of {} as it was before. difflex findings tries it again."
        self.troubles.extend(told.format(path, name, by) for name, by in stale.items() if by)
        return replace(found, found=tuple(each for each in found.found if not stale[each.name]))

    def anatomy(self, study: Study) -> Anatomy | None:
        """The anatomy in the study, if it is of its model."""
        path = study.anatomy
        anatomy = self.tried(lambda: Anatomy.load(path)) if path.exists() else None
        if anatomy is None:
            return None
        wanted, found = (
            (study.model, str(study.revision)),
            (anatomy.model, anatomy.made_from.get("revision", str(study.revision))),
        )
        if found != wanted:
            self.troubles.append(f"{path.name} is of {found[0]} {found[1]}, not of this study. difflex anatomy measures again.")
            return None
        return anatomy


def _comparable(judged: Iterable[MatchFacts], troubles: list[str]) -> list[MatchFacts]:
    """Of each block what was judged on the same images in the same way as most there; the others are named."""
    kept: list[MatchFacts] = []
    by_path: dict[str, list[MatchFacts]] = {}
    for each in judged:
        by_path.setdefault(each.path, []).append(each)
    for path, there in by_path.items():
        own = Counter(_settings(each) for each in there if not each.untrained)
        if not own:
            continue  # a control has nothing to be held against here
        usual, _ = own.most_common(1)[0]
        kept += [each for each in there if _settings(each) == usual]
        troubles += [
            f"{path}: {each.name} was held against other images, or in another way, than most there, and is left out of the "
            "figures. difflex concepts over all of them makes them alike."
            for each in there
            if _settings(each) != usual
        ]
    return kept


def _settings(judged: MatchFacts) -> tuple[tuple[str, str], ...]:
    """What the figures of matches depend on beside the dictionary and the model's revision."""
    left_out = ("fingerprint", "revision", "model")
    return tuple(sorted((name, str(value)) for name, value in judged.matches.made_from.items() if name not in left_out))


def _stored(folder: Path) -> StoreFacts:
    store = Store.open(folder)
    held_out = store.count("held-out")
    rows = store.count() + held_out
    return StoreFacts(site=store.site, rows=rows, held_out=held_out, width=store.width, complete=store.complete)


def _files(study: Study) -> list[Path]:
    patterns = ("study.json", "run.json", "anatomy.json", "*/*/manifest.json", "*/*/*/config.json", "evaluation/*/*.json")
    made = ("concepts/*/*.json", "steering/judged/*/*.json", "steering/removal/*/*.json", "steering/findings/*.json")
    return [path for pattern in (*patterns, *made) for path in study.folder.glob(pattern)]


def _written(paths: Iterable[Path]) -> datetime | None:
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return datetime.fromtimestamp(max(times), UTC) if times else None


def _about(path: Path) -> BookInfo:
    with Book.open(path) as book:
        return book.about
