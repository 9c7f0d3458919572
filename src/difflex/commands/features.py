"""`difflex collect`, `features`, `search` and `show`: make books, list and search their features, draw the sheet of one."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import HighlightStyle
from difflex.commands.flags import (
    AMOUNT,
    BATCH,
    COUNT,
    STEPS,
    THE_STUDYS,
    WHOLE,
    FeatureName,
    KeptSteps,
    NoiseLevels,
    Pixels,
    Seeds,
    StudyModelCommand,
    number,
)
from difflex.commands.inputs import load_study_model, named_features, open_book, open_study, study_pixels
from difflex.dictionary_config import read_config
from difflex.errors import BadInput, DifflexError
from difflex.explore.inputs import read_prompts
from difflex.explore.search import nothing_found, rarity, search
from difflex.features import BestConcept, Book, ImageAlbum, select_features, sheet
from difflex.features.detected import DetectedConcepts
from difflex.features.entries import FeatureStats
from difflex.images import check_image_path, write_image
from difflex.study import Command, DictionaryRef, Study
from difflex.tables import text_table

if TYPE_CHECKING:
    from difflex.features.collecting import ImageSource, PromptedImage

__all__ = ["CollectCommand", "FeaturesCommand", "ShowCommand"]

MAX_TEXT = 48
"""Letters of an explanation in the table."""
COLUMNS = ("feature", "density", "peak", "mean", "shots", "area", "covers", "strength", "concept", "AP", "explanation")
TEXT_COLUMNS = ("concept", "explanation")


@final
@dataclass(frozen=True, kw_only=True)
class CollectCommand(StudyModelCommand):
    """Make the book of each dictionary: statistics, images and maps of its features; continues after a kill."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Collect for all dictionaries of these sites, in one pass: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Collect for these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    largest: FlagCreatePairsOff[bool] = False
    """Of these, only the largest of each kind at each site, with the largest k."""
    images: Annotated[int, COUNT] = 1000
    """Number of images; about a tenth of them is held out, with examples of its own."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: the shots of the harvest)")] = None
    """Generate images from these prompts: a file, a folder, a data set or `captions`, as for difflex harvest."""
    seeds: Seeds = range(1)
    """Seeds for each of the --prompts; END is excluded."""
    steps: Annotated[int | None, STEPS, arg(help_behavior_hint=THE_STUDYS)] = None
    """Number of denoising steps, with --prompts."""
    keep_steps: Annotated[KeptSteps, arg(help_behavior_hint="(default: all)")] = None
    """Steps to take activations from, with --prompts; END is excluded."""
    pixels: Annotated[Pixels, arg(help_behavior_hint=THE_STUDYS)] = None
    """Image size, with --prompts or --drawn-world; with --folder, images are resized and cropped to it."""
    guidance: Annotated[float | None, AMOUNT, arg(metavar="SCALE", help_behavior_hint=THE_STUDYS)] = None
    """Guidance scale, with --prompts."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Use the images in this folder, noised; NAME.txt holds the prompt of NAME.jpg."""
    drawn_world: FlagCreatePairsOff[bool] = False
    """Use scenes of the drawn world with their captions, noised."""
    noise: NoiseLevels = (0.25, 0.5, 0.75)
    """Noise levels, with --folder and --drawn-world."""
    top_examples: Annotated[int, number(1, 1000)] = 32
    """Top examples for each feature and split: the images in which it fires most strongly."""
    random_examples: Annotated[int, number(1, 1000)] = 16
    """Random images in which it fires."""
    silent_examples: Annotated[int, number(1, 1000)] = 8
    """Random images in which it does not fire."""
    patches: Annotated[int | None, WHOLE, arg(help_behavior_hint="(default: as many as --images)")] = None
    """Generate at most this many further images that ITDA atoms were taken from, those of the most atoms first; 0 for none."""
    discard_explanations: FlagCreatePairsOff[bool] = False
    """Delete the explanations in these books; without it they are kept when a book is made again."""
    batch: Annotated[int, BATCH] = 16
    """Images per forward pass."""

    def __call__(self) -> list[Path]:
        from difflex.features.collecting import CollectConfig, collect_study
        from difflex.steering import StudyEditor

        if sum(map(bool, (self.prompts, self.folder, self.drawn_world))) > 1:
            raise BadInput("--prompts, --folder and --drawn-world are three sources of images. Use one of them.")
        fixed = ["steps", "keep_steps", "guidance", *([] if self.folder or self.drawn_world else ["pixels"])]
        if ignored := [name for name in fixed if not self.prompts and getattr(self, name) is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise BadInput(f"{flags} would change nothing: these images have settings of their own. Name others with --prompts.")
        study = open_study(self.study, self)
        refs = (study.select_largest if self.largest else study.select_dictionaries)(self.site, self.dictionary)
        counts = {name: getattr(self, name) for name in ("top_examples", "random_examples", "silent_examples")}
        editor, stores = StudyEditor(study), study.stores()
        books = collect_study(
            study,
            refs,
            lambda: self._source(study, refs),
            CollectConfig(**counts),
            load=editor.dictionary,
            strengths=lambda ref: editor.default_strengths(ref) if ref.site in stores else (),
            most_patches=self.patches,
            discard_explanations=self.discard_explanations,
        )
        for book in books:
            print(f"{book.path}: {'up to date' if book.up_to_date else 'collected'}")
        paths = [book.path for book in books]
        print(_books_table(paths))
        return paths

    def _source(self, study: Study, refs: Sequence[DictionaryRef]) -> "ImageSource":
        """Return the images to collect from; the model is loaded when it is needed.

        What does not change the images, such as the batch, is not in the description.
        """
        from difflex.features.collecting import noised_source, runs_source, stored_source

        pipe = cache(lambda precision: load_study_model(study.run_in(precision), self))

        def harvest(precision: str | None):
            return lambda shots, sites: pipe(precision).harvest_with_images(shots, sites, batch=self.batch)

        def harvest_images(images, prompts, names, sites, seed):
            arguments = {"seed": seed, "batch": self.batch, "progress": False}
            return pipe(None).harvest_images(images, self.noise, sites, prompts, names, **arguments)

        if self.drawn_world or self.folder is not None:
            description, count, load = self._existing_images(study)
            description += f", noise {','.join(map(str, self.noise))}, precision {study.settings.precision}"
            return noised_source(description, count, load, harvest_images, harvest(None), self.batch)
        if self.prompts is None:
            return stored_source(study, refs, self.images, self.precision and study.settings.precision, harvest)
        prompts = read_prompts(self.prompts, None)
        texts = islice(prompts.texts, -(-self.images // len(self.seeds)))
        shots = pipe(None).shots(texts, self.seeds, self.steps, self.keep_steps, self.pixels, self.guidance)
        return runs_source("prompts", shots, self.images, harvest(None))

    def _existing_images(self, study: Study) -> "tuple[str, int, Callable[[int], Iterator[PromptedImage]]]":
        """Return a description of the images of the folder or the drawn world, their number, and a function that loads them."""
        from difflex.evaluation.concepts import drawn_source
        from difflex.features.collecting import PromptedImage, image_files

        if self.folder is not None:
            paths, checksum = image_files(self.folder, self.images)
            return (
                f"folder {checksum}, pixels {self.pixels}",
                len(paths),
                lambda start: (PromptedImage.read(path, self.pixels) for path in paths[start:]),
            )

        scenes = drawn_source(self.images, self.pixels or study_pixels(study))

        def draw(start: int) -> Iterator[PromptedImage]:
            return (PromptedImage(scene.image, scene.prompt, scene.name) for scene in islice(scenes.load(), start, None))

        return scenes.name, self.images, draw


def _books_table(books: Sequence[Path]) -> str:
    """Return how many features fire and how much of their top images they cover, a line for each book."""
    rows = [("", "features", "that fire", "tokens", "covered", "median")]
    for path in books:
        with Book.open(path) as book:
            summary, firing, about = book.coverage_summary(), book.count_firing(), book.about
        mean, median = ("-", "-") if summary is None else (f"{summary.mean:.1%}", f"{summary.quartiles[1]:.1%}")
        rows.append((about.dictionary, f"{about.size:,}", f"{firing:,}", f"{about.tokens:,}", mean, median))
    return text_table(rows, right_align=range(1, 6))


@final
@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(Command):
    """List the features of a dictionary's book, sorted and filtered."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    dictionary: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """The dictionary: SITE/LABEL, or the site alone if it has one dictionary."""
    sort: Annotated[str, arg(metavar="COLUMN")] = "density"
    """Sort by density, peak, mean, coverage, area ..., by concept (average precision) or by score (of the explanations)."""
    ascending: FlagCreatePairsOff[bool] = False
    """Smallest first instead of largest first."""
    filter: Annotated[tuple[str, ...], arg(metavar="CONDITION...", help_behavior_hint="(default: all)")] = ()
    """List only features that fulfil all conditions: "density<0.01", "peak>3", "concept=star"."""
    top: Annotated[int, COUNT] = 20
    """Number of features to list."""
    measure: Annotated[str, arg(metavar="NAME")] = "accuracy"
    """Score of the explanations: accuracy, auroc, ..."""

    def __call__(self) -> None:
        study = Study.open(self.study)
        ref = _find_book(study, self.dictionary)
        concepts = _best_concepts(study, ref)
        with open_book(study, ref) as book:
            rows = select_features(
                book, self.filter, sort=self.sort, ascending=self.ascending, measure=self.measure, concepts=concepts
            )
            listed = rows[: self.top]
            print(f"{ref}: {len(rows):,} of {book.about.size:,} features, showing {len(listed)}")
            with suppress(DifflexError):
                if imported := read_config(study.dictionary(*ref)).imported:
                    print(f"The dictionary was imported {imported}")
            print(_features_table(book, listed, concepts, self.measure))


@final
@dataclass(frozen=True, kw_only=True)
class ShowCommand(Command):
    """Draw the sheet of one feature: statistics, top and random images with overlays, and silent images."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books."""
    feature: Positional[FeatureName]
    """Number of the feature, or words that `difflex search` finds it by: red."""
    dictionary: Annotated[
        str | None, arg(metavar="SITE/LABEL", help_behavior_hint="(default: the only one, or the best for a name)")
    ] = None
    """The dictionary of the feature; the site alone if it has one dictionary."""
    style: HighlightStyle = "blue"
    """Overlay. blue: the more opaque, the higher the value; outline: a black and white line, visible without colour vision."""
    columns: Annotated[int, number(1, 64)] = 8
    """Images of each kind."""
    side: Annotated[int, number(1, 1024, "PIXELS")] = 128
    """Approximate size of an image."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: feature-FEATURE.png)")] = None
    """File to write the sheet to."""

    def __call__(self) -> None:
        if self.out is not None:
            check_image_path(self.out)
        study = Study.open(self.study)
        if self.feature.isdecimal():
            ref, feature = _find_book(study, self.dictionary), int(self.feature)
        else:
            ref, (feature,) = named_features(study, (self.feature,), self.dictionary)
        out = self.out or Path(f"feature-{feature}.png")
        check_image_path(out)
        best = _best_concepts(study, ref).get(feature)
        concept = "" if best is None else f"{best.concept} (AP {best.ap:.2f})"
        album = ImageAlbum(study.images)
        with open_book(study, ref) as book:
            image = sheet(book, album, feature, style=self.style, columns=self.columns, side=self.side, concept=concept)
            steer = _steer_words(self.study, ref, feature, book, "" if best is None else best.concept)
        write_image(image, out)
        print(f"{out.resolve()}\n\n{steer}")


@final
@dataclass(frozen=True, kw_only=True)
class SearchCommand(Command):
    """Search features by words: in matched concepts, in explanations, and in the captions of the images they fire in most."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books, or with the results of `difflex concepts`."""
    words: Annotated[Positional[tuple[str, ...]], arg(metavar="WORDS...")]
    """What the features should stand for: red, striped star."""
    dictionary: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: all)")] = None
    """Search one dictionary: SITE/LABEL, or the site alone if it has one dictionary."""
    limit: Annotated[int, COUNT] = 10
    """Number of features to list."""

    def __call__(self) -> None:
        study, words = Study.open(self.study), " ".join(self.words)
        place = None if self.dictionary is None else study.find_dictionary(self.dictionary)
        found = search(study, words, place, self.limit)
        if not found:
            raise nothing_found(study, [words], place)
        rows = [(str(each.feature), str(each.place), f"{each.score:.2f}", each.reason) for each in found]
        print(text_table([("feature", "dictionary", "score", "because it"), *rows], right_align=(0, 2)))
        if note := rarity(study, words, place):
            print(f"As a concept, {words} was not matched. {note}")
        first = found[0]
        print(f"\n{shlex.join(['difflex', 'show', str(self.study), str(first.feature), '--dictionary', str(first.place)])}")
        with suppress(DifflexError), open_book(study, first.place) as book:
            print(_steer_words(self.study, first.place, first.feature, book, words))


def _steer_words(study: Path, place: DictionaryRef, feature: int, book: Book, words: str) -> str:
    """Return the command that steers with a feature, with the shortest caption of its book that has none of `words`."""
    captions = [row.caption for row in book.captions() if row.caption.strip()]
    unlike = [caption for caption in captions if not set(caption.lower().split()) & set(words.lower().split())]
    prompt = min(unlike or captions, key=len, default="PROMPT")
    return shlex.join(["difflex", "steer", str(study), str(feature), "--dictionary", str(place), "--prompt", prompt])


def _find_book(study: Study, name: str | None) -> DictionaryRef:
    """Return the dictionary called `name`, or without a name the only one that has a book."""
    if name is not None:
        return study.find_dictionary(name)
    refs = [ref for ref in study.dictionaries() if study.book(*ref).is_file()]
    if len(refs) != 1:
        names = ", ".join(map(str, refs)) or "none; run difflex collect"
        raise BadInput(f"{study.folder} has {len(refs)} books. Name one with --dictionary: {names}.")
    return refs[0]


def _best_concepts(study: Study, ref: DictionaryRef) -> Mapping[int, BestConcept]:
    """Return the concept that each feature detects best; empty if the dictionary, as it is now, was not matched to concepts."""
    detected = DetectedConcepts.read(study, ref)
    if detected is not None and not detected.is_current:
        print(f"{ref} has changed since {study.concepts(*ref)} was made: no concepts are shown. Run difflex concepts again.")
    return detected.by_feature if detected is not None and detected.is_current else {}


def _features_table(book: Book, rows: list[FeatureStats], concepts: Mapping[int, BestConcept], measure: str) -> str:
    """Return a line for each feature under a line of column names."""
    scores = book.best_scores(measure)
    names = [*COLUMNS[:-1], measure, COLUMNS[-1]]
    lines = [names, *(_line(book, row, concepts.get(row.feature), scores.get(row.feature)) for row in rows)]
    return text_table(lines, right_align=[number for number, name in enumerate(names) if name not in TEXT_COLUMNS])


def _line(book: Book, row: FeatureStats, concept: BestConcept | None, score: float | None) -> list[str]:
    texts = [explanation.text for explanation in book.explanations(row.feature) if explanation.state == "done"]
    text = texts[-1] if texts else ""
    return [
        str(row.feature),
        f"{row.density:.3%}",
        f"{row.peak:.3g}",
        f"{row.mean:.3g}",
        f"{row.shots:,}",
        *("-" if share is None else f"{share:.0%}" for share in (row.area, row.coverage)),
        "-" if row.strength is None else f"{row.strength:.2f}",
        "-" if concept is None else concept.concept,
        "-" if concept is None else f"{concept.ap:.2f}",
        "-" if score is None else f"{score:.2f}",
        text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…",
    ]
