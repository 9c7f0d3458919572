"""`Workspace`: the folder of a study with its model, for the objects of the Python interface, and what they make in it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import final

from difflex.errors import BadInput, DifflexError
from difflex.evaluation import EditedModel, Evaluation, EvaluationConfig, evaluate_study
from difflex.evaluation.concepts import ConceptsConfig, LabelFolder, drawn_source, match_studies
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.explore.inputs import open_book
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import CollectConfig, collect_study, stored_source
from difflex.features.detected import DetectedConcepts
from difflex.pipeline import Pipeline
from difflex.records import Activations, Shot, Site
from difflex.steering import StudyEditor
from difflex.study import DictionaryRef, Study
from difflex.values import fits, shown

__all__ = ["Workspace", "temporary_folder"]

SMALL_MODEL = 10**8
"""Parameters of a denoiser up to which images are cheap."""
IMAGES = {True: 200, False: 100}
"""Images that a book is made from, for a small model and for others."""
PREFIX = "difflex-"
BATCH = 32
"""Labelled images per forward pass."""


@final
class Workspace:
    """A study and its model."""

    def __init__(self, study: Study, load: Callable[[], Pipeline], is_temporary: bool = False) -> None:
        """Work in the folder of `study`, whose model `load` returns; a temporary folder is deleted with this object."""
        self.study, self._load, self.is_temporary = study, load, is_temporary
        self.editor = StudyEditor(study)
        self._verified: dict[DictionaryRef, int] = {}
        if is_temporary:
            weakref.finalize(self, shutil.rmtree, study.folder, ignore_errors=True)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model, loaded when it is first needed."""
        return self._load()

    @property
    def album(self) -> ImageAlbum:
        """The images of all books."""
        return ImageAlbum(self.study.images)

    def has_book(self, ref: DictionaryRef) -> bool:
        """Whether there is a book of the dictionary as it is now."""
        path = self.study.book(*ref)
        if not path.is_file():
            return False
        changed = path.stat().st_mtime_ns
        if self._verified.get(ref) != changed:
            try:
                open_book(self.study, ref).close()
            except DifflexError as error:
                print(f"{error} It is made again.")
                return False
            self._verified[ref] = changed
        return True

    @contextmanager
    def book(self, ref: DictionaryRef) -> Iterator[Book]:
        """Open the book of a dictionary; without one, it is made first."""
        if not self.has_book(ref):
            self.collect([ref])
        with Book.open(self.study.book(*ref)) as book:
            yield book

    def collect(self, refs: Sequence[DictionaryRef], images: int | None = None) -> None:
        """Make the books of dictionaries in one pass over the first images of their harvest, and say so."""
        if images is not None and (not fits(int, images) or images < 1):
            raise BadInput(f"A book of {shown(images)} images is not possible. Use 1 or more.")
        pipe, stores = self.pipeline, self.study.stores()
        if images is None:
            images = IMAGES[sum(weights.numel() for weights in pipe.denoiser.parameters()) <= SMALL_MODEL]
        source = stored_source(self.study, refs, images, None, lambda precision: pipe.harvest_with_images)
        names = "the book" if len(refs) == 1 else f"{len(refs)} books"
        print(f"Making {names} of {', '.join(map(str, refs))}: where features fire in {source.images} images of the prompts.")
        collect_study(
            self.study,
            refs,
            lambda: source,
            CollectConfig(),
            load=self.editor.dictionary,
            strengths=lambda place: self.editor.default_strengths(place) if place.site in stores else (),
            most_patches=0,  # nothing here shows the images that ITDA atoms were taken from
        )

    def concepts(self, ref: DictionaryRef) -> DetectedConcepts | None:
        """Return the known concepts of a dictionary as it is now, if it was matched to them."""
        concepts = DetectedConcepts.read(self.study, ref)
        return concepts if concepts is not None and concepts.is_current else None

    def evaluate(self, refs: Sequence[DictionaryRef], tokens: int, shots: int) -> dict[DictionaryRef, Evaluation]:
        """Evaluate dictionaries on held-out tokens, and at `shots` their effect on the model; what is up to date is kept."""

        def edited_model(site: Site, shots: Sequence[Shot]) -> EditedModel:
            return EditedModel(partial(self.pipeline.predictions, shots, site), partial(self.pipeline.images, shots, site))

        config = EvaluationConfig(dictionaries=tuple(map(str, refs)), tokens=tokens, shots=shots)
        return {ref: result.evaluation for ref, result in evaluate_study(self.study, config, edited_model).items()}

    def match_concepts(
        self, refs: Sequence[DictionaryRef], config: ConceptsConfig, folder: Path | None
    ) -> dict[DictionaryRef, ConceptMatches]:
        """Match dictionaries to the concepts of drawn scenes, or of a folder of labelled images; what is up to date is kept."""
        pixels = self.study.settings.pixels or next(self.pipeline.shots("")).pixels
        images = config.images
        source = drawn_source(images, pixels) if folder is None else LabelFolder.open(folder).source(images, None)

        def harvest_at(site: Site) -> Callable[..., Iterator[Activations]]:
            return lambda images, prompts, names: self.pipeline.harvest_images(
                images, config.noise, site, prompts, names, batch=BATCH, held_out=config.held_out, progress=False
            )

        names = [str(ref) for ref in refs]
        stored = match_studies([self.study], source, lambda study: harvest_at, config, dictionaries=names, baselines=False)
        return {DictionaryRef(matches.site, matches.label): matches for matches, *_ in stored}

    def describe_folder(self) -> str:
        """Return where the study is, in words."""
        return "a temporary folder, deleted at the end" if self.is_temporary else str(self.study.folder)


def temporary_folder() -> Path:
    """Make a temporary folder for a study and return it."""
    return Path(tempfile.mkdtemp(prefix=PREFIX))
