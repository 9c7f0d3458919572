"""What commands open: prompts, the model of a study, a book."""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from difflex.errors import BadInput, BrokenFile, DiskError, StaleWork, UnknownName
from difflex.features import Book
from difflex.files import file_sha256
from difflex.records import Shot
from difflex.study import DictionaryRef, Study, StudySettings

if TYPE_CHECKING:
    from difflex.commands.harvest import HarvestCommand
    from difflex.pipeline import Pipeline

CAPTIONS = "captions"
"""The name of the captions of the drawn world, where a file of prompts is expected."""
UNTRAINED = "untrained-"
"""What the revision of a model with random weights begins with."""


class PromptSource(NamedTuple):
    """Prompts and where they come from."""

    texts: Iterable[str]
    source: str
    """Identifies the prompts: a checksum for a file, else the name."""
    is_endless: bool


def read_prompts(name: str, shuffle: int | None, column: str | None = None, revision: str | None = None) -> PromptSource:
    """Read the prompts of the file, folder or data set `name`, shuffled by a seed if one is given; or `captions`, without end."""
    from difflex import pipeline
    from difflex.miniature.captions import endless_captions

    if name == CAPTIONS and not Path(name).exists():
        if shuffle is not None:
            raise BadInput("--shuffle needs a file of prompts: the captions of the drawn world are random already. Leave it out.")
        return PromptSource(endless_captions(), CAPTIONS, True)
    texts: Iterable[str] = pipeline.read_prompts(name, column, revision)
    content = f"sha256:{file_sha256(Path(name))}" if Path(name).is_file() else name
    if shuffle is not None:
        texts = list(texts)
        random.Random(shuffle).shuffle(texts)
    return PromptSource(texts, ":".join(filter(None, (content, column, revision))), False)


def harvest_settings(pipe: "Pipeline", command: "HarvestCommand") -> StudySettings:
    """Return the settings of a harvest for the study; what its flags leave to the model is filled in."""
    shot = next(pipe.shots("", steps=command.steps, pixels=command.pixels, guidance=command.guidance))
    return StudySettings(
        precision=pipe.precision,
        offload=command.offload,
        pixels=shot.pixels,
        steps=shot.steps,
        guidance=shot.guidance,
        prompts=str(Path(command.prompts).resolve()) if Path(command.prompts).exists() else command.prompts,
        prompts_column=command.prompts_column,
        prompts_revision=command.prompts_revision,
        shuffle=command.shuffle,
        seeds=(command.seeds.start, command.seeds.stop),
        keep_steps=first_and_end(command.keep_steps),
    )


def study_shots(pipe: "Pipeline", settings: StudySettings, prompts: PromptSource) -> tuple[Iterator[Shot], str]:
    """Return the shots of a study's harvest, from the first one on, and what identifies their prompts and seeds."""
    seeds = range(*settings.seeds)
    kept = None if settings.keep_steps is None else range(*settings.keep_steps)
    order = "in order" if settings.shuffle is None else f"shuffled by {settings.shuffle}"
    shots = pipe.shots(prompts.texts, seeds, settings.steps, kept, settings.pixels, settings.guidance)
    return shots, f"{prompts.source} {order}, seeds {seeds.start}:{seeds.stop}"


def load_study_model(study: Study, precision: str | None, offload: bool, offline: bool) -> "Pipeline":
    """Load the model that a study is about, in the revision it was begun with."""
    import difflex

    revision = study.revision or ""
    match = re.fullmatch(rf"{UNTRAINED}(\d{{1,19}})", revision)
    untrained = int(match[1]) if match else None
    return difflex.load(
        study.model,
        precision=precision,
        revision=study.revision if untrained is None else None,
        untrained=untrained,
        offload=offload,
        offline=offline,
    )


def open_book(study: Study, ref: DictionaryRef) -> Book:
    """Open the book of a dictionary for reading; it must be whole, and of the dictionary as it is now."""
    path, folder = study.book(*ref), study.dictionary(*ref)
    if not path.is_file():
        raise UnknownName(f"{ref} has no book yet. Run difflex collect to make it.")
    from difflex.dictionaries import fingerprint

    book = Book.open(path)
    try:
        book.verify(fingerprint(folder))
    except BaseException:
        book.close()
        raise
    return book


def stored_strength(study: Study, ref: DictionaryRef, features: Iterable[int]) -> float | None:
    """Return the smallest default strength of some features in the book of a dictionary; None if one is unknown."""
    if not study.book(*ref).is_file():
        return None
    try:
        with open_book(study, ref) as book:
            strengths = [book.feature(feature).strength for feature in features]
    except (BadInput, BrokenFile, DiskError, StaleWork) as error:
        print(f"{error} The default strength is computed without it.")
        return None
    known = [strength for strength in strengths if strength is not None]
    return min(known) if known and len(known) == len(strengths) else None


def first_and_end(steps: range | None) -> tuple[int, int] | None:
    """Return the first step and the one after the last, as edits and configs hold them; None for all steps."""
    return None if steps is None else (steps.start, steps.stop)
