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

from difflex.errors import DifflexError
from difflex.evaluation import EditedModel, Evaluation, EvaluationConfig, evaluate_study
from difflex.explore.inputs import open_book
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import CollectConfig, collect_study, stored_source
from difflex.features.detected import DetectedConcepts
from difflex.pipeline import Pipeline
from difflex.records import Shot, Site
from difflex.steering import StudyEditor
from difflex.study import DictionaryRef, Study

__all__ = ["Workspace", "temporary_folder"]

SMALL_MODEL = 10**8
"""Parameters of a denoiser up to which images are cheap."""
IMAGES = {True: 200, False: 100}
"""Images that a book is made from, for a small model and for others."""
PREFIX = "difflex-"


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
            self.collect(ref)
        with Book.open(self.study.book(*ref)) as book:
            yield book

    def collect(self, ref: DictionaryRef, images: int | None = None) -> None:
        """Make the book of a dictionary from the first images of its harvest, and say so."""
        pipe, stores = self.pipeline, self.study.stores()
        if images is None:
            images = IMAGES[sum(weights.numel() for weights in pipe.denoiser.parameters()) <= SMALL_MODEL]
        source = stored_source(self.study, [ref], images, None, lambda precision: pipe.harvest_with_images)
        print(f"Making the book of {ref}: where its features fire in {source.images} images of its prompts.")
        collect_study(
            self.study,
            [ref],
            lambda: source,
            CollectConfig(),
            load=self.editor.dictionary,
            strengths=lambda place: self.editor.default_strengths(place) if place.site in stores else (),
        )

    def concepts(self, ref: DictionaryRef) -> DetectedConcepts | None:
        """Return the known concepts of a dictionary as it is now, if it was matched to them."""
        concepts = DetectedConcepts.read(self.study, ref)
        return concepts if concepts is not None and concepts.is_current else None

    def evaluate(self, ref: DictionaryRef, tokens: int, shots: int) -> Evaluation:
        """Evaluate a dictionary on held-out tokens, and at `shots` its effect on the model; what is up to date is kept."""

        def edited_model(site: Site, shots: Sequence[Shot]) -> EditedModel:
            return EditedModel(partial(self.pipeline.predictions, shots, site), partial(self.pipeline.images, shots, site))

        config = EvaluationConfig(dictionaries=(str(ref),), tokens=tokens, shots=shots)
        [result] = evaluate_study(self.study, config, edited_model).values()
        return result.evaluation

    def describe_folder(self) -> str:
        """Return where the study is, in words."""
        return "a temporary folder, deleted at the end" if self.is_temporary else str(self.study.folder)


def temporary_folder() -> Path:
    """Make a temporary folder for a study and return it."""
    return Path(tempfile.mkdtemp(prefix=PREFIX))
