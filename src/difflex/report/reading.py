"""Read the records of a study once; records that are damaged, of another model or of older weights are named and left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from difflex.dictionary_config import DictionaryConfig, fingerprint, read_config
from difflex.effects import Provenance, SteeringResults
from difflex.effects.addition_findings import AdditionFindings
from difflex.effects.edit_bench import EditBenchResults
from difflex.effects.findings import Findings
from difflex.effects.removal import RemovalResults
from difflex.errors import DifflexError
from difflex.evaluation import Evaluation
from difflex.evaluation.anatomy import Anatomy
from difflex.evaluation.concepts.results import ConceptMatches, ConceptsConfig
from difflex.evaluation.transfer import TransferResults
from difflex.features import Book, BookInfo, ImageAlbum
from difflex.images import open_image
from difflex.measures import BlockRoleResults, FeatureMeasures
from difflex.report.facts import DictionaryFacts, GroupCoverage, MatchFacts, SteeringFacts, StoreFacts, StudyFacts, group_by
from difflex.store import Store
from difflex.study import DictionaryRef, Study, read_log, recipe_record

DETECTS = 0.8
"""The average precision from which on a feature detects a concept."""
FILES = (
    "study.json",
    "run.json",
    "anatomy.json",
    "*/*/manifest.json",
    "*/*/*/config.json",
    "evaluation/*/*.json",
    "transfer/*/*/*.json",
)
FILES += (
    "concepts/*/*.json",
    "steering/judged/*/*.json",
    "steering/removal/*/*.json",
    "steering/findings/*.json",
    "steering/cae/findings.json",
    "steering/edit-bench/*.json",
)
FILES += ("measures/*/*.json", "block-roles.json")
"""The files of a study of which the report shows the latest time."""
T = TypeVar("T")


def read_facts(study: Study, control: Study | None = None) -> StudyFacts:
    """Return the facts of `study`, and the concept matches and books of `control`, a study of the same model untrained."""
    problems: list[str] = []
    reader = _StudyReader(study, problems)
    control_reader = _StudyReader(control, problems, untrained=True) if control else None
    dictionaries = reader.dictionaries()
    matches = [*reader.matches(), *(control_reader.matches() if control_reader else ())]
    return StudyFacts(
        study=study,
        started=_latest_time([study.folder / "study.json"]),
        latest=_latest_time(path for pattern in FILES for path in study.folder.glob(pattern)),
        log=(entries := tuple(reader.load(read_log, study.folder) or ())),
        recipe=recipe_record(study.folder) if entries else None,
        stores=tuple(store for folder in study.stores().values() if (store := reader.load(_store, folder)) is not None),
        dictionaries=dictionaries,
        matches=tuple(_comparable(matches, problems)),
        anatomy=reader.anatomy(),
        books=reader.books(),
        control=control,
        control_books=control_reader.books() if control_reader else (),
        steering=tuple(steering for dictionary in dictionaries if (steering := reader.steering(dictionary, matches)) is not None),
        removals=reader.removals(),
        findings=reader.findings(),
        additions=reader.additions(),
        edit_benches=reader.edit_benches(),
        transfers=reader.transfers(),
        measures=reader.measures(),
        block_roles=reader.block_roles(),
        problems=tuple(dict.fromkeys(problems)),
    )


class _StudyReader:
    """Reads the records of one study; adds a sentence to `problems` for each that cannot be used."""

    def __init__(self, study: Study, problems: list[str], untrained: bool = False) -> None:
        self.study, self.problems, self.untrained = study, problems, untrained
        self._folders = {str(ref): study.dictionary(*ref) for ref in study.dictionaries()}
        self._fingerprints: dict[str, str | None] = {}

    def load(self, read: Callable[[Path], T], path: Path) -> T | None:
        """Return the record at `path`; None, with a problem, where it cannot be read."""
        try:
            return read(path)
        except (DifflexError, OSError) as error:
            return self._reject(str(error))

    def _load_existing(self, read: Callable[[Path], T], path: Path) -> T | None:
        """Return the record at `path`; None, without a problem, where there is no file."""
        return self.load(read, path) if path.exists() else None

    def _load_all(self, read: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[tuple[Path, T]]:
        """Yield the files of `paths` that can be read, with their records."""
        records = ((path, self.load(read, path)) for path in paths)
        return ((path, record) for path, record in records if record is not None)

    def _reject(self, problem: str) -> None:
        self.problems.append(problem)

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of the dictionary SITE/LABEL; None where it does not exist or cannot be read."""
        if name not in self._fingerprints:
            folder = self._folders.get(name)
            self._fingerprints[name] = None if folder is None else self.load(fingerprint, folder)
        return self._fingerprints[name]

    def _changed(self, provenance: Provenance) -> list[str]:
        """Return the dictionaries that have changed since."""
        return [name for name, checksum in provenance.fingerprints.items() if checksum != self.fingerprint(name)]

    def dictionaries(self) -> tuple[DictionaryFacts, ...]:
        """Return every dictionary whose config can be read, with its evaluation if that is of its present weights."""
        configs = [(ref, self.load(read_config, self._folders[str(ref)])) for ref in self.study.dictionaries()]
        return tuple(
            DictionaryFacts(
                ref=ref,
                kind=config.kind,
                size=config.size,
                k=config.k,
                normalisation=config.normalisation,
                data=str(config.training.get("data", "")),
                variant=ref.label.removeprefix(f"{config.kind}-{config.size}-k{config.k}").lstrip("-"),
                evaluation=self._evaluation(ref, config),
            )
            for ref, config in configs
            if config is not None
        )

    def _evaluation(self, ref: DictionaryRef, config: DictionaryConfig) -> Evaluation | None:
        path = self.study.evaluation(*ref)
        evaluation = self._load_existing(Evaluation.load, path)
        if evaluation is None:
            return None
        if evaluation.fingerprint != self.fingerprint(str(ref)):
            return self._reject(f"{ref}: the dictionary has changed since it was evaluated. Run difflex evaluate again.")
        if not evaluation.size == config.size > 0 or len(evaluation.density) != len(Evaluation.edges) - 1:
            return self._reject(f"{path} does not fit its dictionary: it is damaged. Move it away and run difflex evaluate.")
        return evaluation

    def books(self) -> tuple[DictionaryRef, ...]:
        """Return the dictionaries that have a book of their present weights."""
        refs, album = [], ImageAlbum(self.study.images)
        damage = cache(lambda file: self.load(lambda path: album.damage(path.name), Path(file)))  # images are shared by books
        for ref in self.study.dictionaries():
            book = self._load_existing(_verified_book, self.study.book(*ref))
            if book is None:
                continue
            if book.info.fingerprint != self.fingerprint(str(ref)):
                self._reject(f"{ref}: the dictionary has changed since its book was written. Run difflex collect again.")
                continue
            refs.append(ref)
            if damaged := [sentence for file in book.files if (sentence := damage(file))]:
                self._reject(f"{ref}: {len(damaged)} of its images cannot be shown, such as this one. {damaged[0]}")
        return tuple(refs)

    def matches(self) -> list[MatchFacts]:
        """Return the concept matches that are of the study's model and of the present weights of its dictionaries."""
        records = self._load_all(ConceptMatches.load, sorted(self.study.folder.glob("concepts/*/*.json")))
        facts = [self._match(matches, f"concepts/{path.parent.name}/{path.name}") for path, matches in records]
        return [match for match in facts if match is not None]

    def _match(self, matches: ConceptMatches, name: str) -> MatchFacts | None:
        inputs, dictionary = matches.inputs, str(DictionaryRef(matches.site, matches.label))
        if not matches.levels:
            return self._reject(f"{name} has no results: it is damaged. Move it away and run difflex concepts.")
        if inputs and (inputs.model, inputs.revision) != (self.study.model, self.study.revision):
            return self._reject(f"{name} is of {inputs.model} {inputs.revision}, not of this study. Run difflex concepts again.")
        if matches.fingerprint is None:
            kind, k = matches.label.split("-")[0], _k_of_label(matches.label)
            return None if self.untrained else MatchFacts(matches=matches, kind=kind, normalisation=None, untrained=False, k=k)
        if dictionary not in self._folders:
            return self._reject(f"{name} is of a dictionary that no longer exists. Move it away.")
        if matches.fingerprint != self.fingerprint(dictionary):
            return self._reject(f"{name}: the dictionary has changed since. Run difflex concepts again.")
        config = self.load(read_config, self._folders[dictionary])
        if config is None:
            return None
        normalisation = None if config.kind == "neurons" else config.normalisation
        return MatchFacts(matches=matches, kind=config.kind, normalisation=normalisation, untrained=self.untrained, k=config.k)

    def steering(self, dictionary: DictionaryFacts, matches: Iterable[MatchFacts]) -> SteeringFacts | None:
        """Return the results of steering with a dictionary's features, if they are of its present weights."""
        ref, name = dictionary.ref, dictionary.name
        path = self.study.steering(*ref)
        results = self._load_existing(SteeringResults.load, path)
        if results is None:
            return None
        if results.model != self.study.model or results.provenance.fingerprints.get(name) != self.fingerprint(name):
            return self._reject(f"{name}: the dictionary has changed since it was steered with. Run difflex steer-eval again.")
        own = [m.matches for m in matches if not m.untrained and (m.matches.site, m.matches.label) == ref]
        if "concepts" in results.provenance.files:
            coverage = _coverage_from_file(results)
        elif own:
            coverage = _coverage(own[0], results, ref)
        else:
            return self._reject(f"{name}: results of steering need the matches of its features. Run difflex concepts.")
        files = [(strip, path.with_suffix("") / strip.file) for strip in results.strips]
        strips = tuple((strip, file) for strip, file in files if self.load(_check_image, file))
        return SteeringFacts(ref=ref, kind=dictionary.kind, results=results, coverage=coverage, strips=strips)

    def removals(self) -> tuple[RemovalResults, ...]:
        """Return the results of removing concepts that are of the present weights of their dictionaries."""
        current = []
        for path, results in self._load_all(RemovalResults.load, self.study.removals()):
            if results.model != self.study.model or self._changed(results.provenance):
                self._reject(f"{path} is of older weights of its dictionaries. Run difflex removal again.")
            else:
                current.append(results)
        return tuple(current)

    def transfers(self) -> tuple[TransferResults, ...]:
        """Return the results at other steps and on other models that are of the present weights of their dictionaries."""
        current = []
        for path, results in self._load_all(TransferResults.load, self.study.transfers()):
            if results.fingerprint != self.fingerprint(results.dictionary):
                self._reject(f"{path} is of older weights of its dictionary. Run difflex transfer again.")
            else:
                current.append(results)
        return tuple(current)

    def edit_benches(self) -> tuple[EditBenchResults, ...]:
        """Return the results of the editing benchmark that are of the present weights of their dictionaries."""
        current = []
        for path, results in self._load_all(EditBenchResults.load, self.study.edit_benches()):
            if results.model != self.study.model or self._changed(results.provenance):
                self._reject(f"{path} is of older weights of its dictionaries. Run difflex edit-bench again.")
            else:
                current.append(results)
        return tuple(current)

    def measures(self) -> tuple[FeatureMeasures, ...]:
        """Return the measures of features that are of the present weights of their dictionaries."""
        current = []
        for path, record in self._load_all(FeatureMeasures.load, sorted(self.study.folder.glob("measures/*/*.json"))):
            if record.model != self.study.model or self._changed(record.provenance):
                self._reject(f"{path} is of older weights of its dictionary. Run difflex measure again.")
            else:
                current.append(record)
        return tuple(current)

    def block_roles(self) -> BlockRoleResults | None:
        """Return the roles of the blocks of the study's model."""
        path = self.study.block_roles
        roles = self._load_existing(BlockRoleResults.load, path)
        if roles is None or (roles.model, roles.revision) == (self.study.model, self.study.revision):
            return roles
        return self._reject(
            f"{path.name} is of {roles.model} {roles.revision}, not of this study. Run difflex block-roles again."
        )

    def findings(self) -> tuple[Findings, ...]:
        """Return the findings of the study's model, without those whose dictionaries have changed."""
        current = []
        for path, record in self._load_all(Findings.load, sorted(self.study.folder.glob("steering/findings/*.json"))):
            if (record.model, record.revision) != (self.study.model, self.study.revision):
                self._reject(f"{path} is of {record.model} {record.revision}, not of this study. Run difflex findings again.")
                continue
            changed = {finding.name: ", ".join(self._changed(finding.provenance)) for finding in record.findings}
            for name, dictionaries in changed.items():
                if dictionaries:
                    self._reject(f"{path}: '{name}' is of older weights of {dictionaries}. Run difflex findings again.")
            current.append(replace(record, findings=tuple(own for own in record.findings if not changed[own.name])))
        return tuple(current)

    def additions(self) -> AdditionFindings | None:
        """Return the findings on adding contrasts in the study's language model."""
        path = self.study.addition("findings")
        found = self._load_existing(AdditionFindings.load, path)
        if found is None or found.model == self.study.model:
            return found
        return self._reject(f"{path} is of {found.model}, not of this study. Run difflex cae again.")

    def anatomy(self) -> Anatomy | None:
        """Return the anatomy of the study if it is of its model."""
        path = self.study.anatomy
        anatomy = self._load_existing(Anatomy.load, path)
        revision = anatomy.inputs.revision if anatomy and anatomy.inputs else self.study.revision
        if anatomy is None or (anatomy.model, revision) == (self.study.model, self.study.revision):
            return anatomy
        return self._reject(f"{path.name} is of {anatomy.model} {revision}, not of this study. Run difflex anatomy again.")


def _comparable(matches: Iterable[MatchFacts], problems: list[str]) -> list[MatchFacts]:
    """Return the matches of each block that were measured in the same way as most of its dictionaries.

    They may be of other images in number or held-out share, and are marked with those: a dictionary that is matched again with
    more images stays in the figures.
    """
    comparable: list[MatchFacts] = []
    for path, candidates in group_by(matches, lambda match: match.path).items():
        trained = [match for match in candidates if match.is_trained]
        settings = Counter(match.settings for match in trained or candidates if not match.untrained)
        if not settings:
            continue  # matches of a control alone compare with nothing
        usual, _ = settings.most_common(1)[0]
        for match in candidates:
            if match.settings == usual:
                comparable.append(match)
            elif match.settings and usual and _same_but_for_images(match.settings, usual):
                config = match.settings[1]
                share = "" if config.held_out == usual[1].held_out else f", {config.held_out:.0%} held out"
                comparable.append(replace(match, note=f"{config.images:,} images{share}"))
            else:
                problems.append(
                    f"{path}: {match.name} was matched to other images, or at other noise levels, than the others there, so the "
                    "figures that compare them do without it. Run difflex concepts for all of them together."
                )
    return comparable


def _same_but_for_images(settings: tuple[str, ConceptsConfig], usual: tuple[str, ConceptsConfig]) -> bool:
    """Return whether two settings of matches differ in the number of images and the share held out alone."""
    same = replace(settings[1], images=usual[1].images, held_out=usual[1].held_out) == usual[1]
    return settings[0] == usual[0] and same


def _coverage_from_file(results: SteeringResults) -> dict[str, GroupCoverage]:
    """Return the coverage of concepts from a file: each was steered with the feature that the file names."""
    groups = group_by(results.curves, lambda curve: curve.group)
    concepts = {group: frozenset(curve.concept for curve in curves) for group, curves in groups.items()}
    return {group: GroupCoverage(len(names), 0, names) for group, names in concepts.items()}


def _coverage(matches: ConceptMatches, results: SteeringResults, ref: DictionaryRef) -> dict[str, GroupCoverage]:
    """Return by group how many concepts there are, and which the features that were steered with detect."""
    steered = {curve.concept: curve.description for curve in results.of("feature")}
    coverage = {}
    for group in dict.fromkeys([*results.config.groups, *(curve.group for curve in results.curves)]):
        concepts = matches.clearest_level.of(group)
        detected = [
            result.concept.name
            for result in concepts
            if result.best.ap.value >= DETECTS and steered.get(result.concept.name) == f"{ref} {result.best.features[0]}"
        ]
        rare = sum(concept.group == group for concept in matches.rare_concepts)
        coverage[group] = GroupCoverage(len(concepts) + rare, rare, frozenset(detected))
    return coverage


def _k_of_label(label: str) -> int:
    """Return the k in a label, 0 for a label without one."""
    return next((int(part[1:]) for part in label.split("-") if part[:1] == "k" and part[1:].isdecimal()), 0)


def _check_image(path: Path) -> bool:
    open_image(path)
    return True


def _store(folder: Path) -> StoreFacts:
    store = Store.open(folder)
    return StoreFacts(site=store.site, tokens=store.count() + store.count("held-out"), complete=store.complete)


class VerifiedBook(NamedTuple):
    """The contents of a book whose checksums hold."""

    info: BookInfo
    files: list[str]
    """Of its images."""


def _verified_book(path: Path) -> VerifiedBook:
    with Book.open(path) as book:
        book.verify()
        return VerifiedBook(book.about, [image.file for image in book.images()])


def _latest_time(paths: Iterable[Path]) -> datetime | None:
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return datetime.fromtimestamp(max(times), UTC) if times else None
