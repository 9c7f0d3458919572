"""What commands open: prompts, the model of a study, a book."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difflex.commands.flags import StudyImagesCommand, StudyModelCommand, memory_to_work
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
    kept, shot = command.keep_steps, next(pipe.shots("", steps=command.steps, pixels=command.pixels, guidance=command.guidance))
    return StudySettings(
        precision=pipe.precision,
        offload=pipe.engine.offloaded,
        text_length=pipe.engine.text_length,
        pixels=shot.pixels,
        steps=shot.steps,
        guidance=shot.guidance,
        prompts=str(Path(command.prompts).resolve()) if Path(command.prompts).exists() else command.prompts,
        prompts_column=command.prompts_column,
        prompts_revision=command.prompts_revision,
        shuffle=command.shuffle,
        seeds=(command.seeds.start, command.seeds.stop),
        keep_steps=None if kept is None else (kept.start, kept.stop, *((kept.step,) if kept.step > 1 else ())),
    )


def study_shots(pipe: "Pipeline", settings: StudySettings, prompts: PromptSource) -> tuple[Iterator[Shot], str]:
    """Return the shots of a study's harvest, from the first one on, and what identifies their prompts and seeds."""
    seeds = range(*settings.seeds)
    kept = None if settings.keep_steps is None else range(*settings.keep_steps)
    order = "in order" if settings.shuffle is None else f"shuffled by {settings.shuffle}"
    shots = pipe.shots(prompts.texts, seeds, settings.steps, kept, settings.pixels, settings.guidance)
    return shots, f"{prompts.source} {order}, seeds {seeds.start}:{seeds.stop}"


def open_study(folder: Path, command: StudyModelCommand, reserve: int = 0) -> Study:
    """Open a study whose model runs as the study says unless the flags of `command` say otherwise: its `settings` say how.

    A precision that is chosen by memory leaves at least `reserve` bytes free.
    """
    if command.offload and command.no_offload:
        raise BadInput("--offload and --no-offload exclude each other. Leave one of them out.")
    study = Study.open(folder)
    harvest = _harvest_settings(study)
    changes: dict[str, Any] = {"offload": (harvest.offload or command.offload) and not command.no_offload}
    if isinstance(command, StudyImagesCommand):
        flags = {name: getattr(command, name) for name in ("pixels", "steps", "guidance")}
        changes |= {name: value for name, value in flags.items() if value is not None}
    if command.precision == "auto":
        from difflex.pipeline import choose_precision

        offload = True if command.offload else False if command.no_offload else None
        reserve = max(reserve, memory_to_work())
        fit = choose_precision(study.model, offload=offload, offline=command.offline, reserve=reserve, **_model_arguments(study))
        changes |= fit._asdict()
    elif command.precision is not None:
        changes["precision"] = command.precision
    settings = replace(harvest, **changes)
    if harvest.pixels is not None and settings.pixels != harvest.pixels:
        new, old = (f"{height}x{width}" for height, width in (settings.pixels or harvest.pixels, harvest.pixels))
        print(f"Images are of {new} pixels; the study was harvested at {old}.")
    return replace(study, settings=settings)


def _harvest_settings(study: Study) -> StudySettings:
    """Return the settings of a study; of one that kept none, those of the first shot that it stored."""
    if study.settings.precision is None:
        from difflex.store import Store

        for folder in study.stores().values():
            shot = Store.open(folder).shot(0)
            names = ("precision", "text_length", "pixels", "steps", "guidance")
            return replace(study.settings, **{name: getattr(shot, name) for name in names})
    return study.settings


def study_pixels(study: Study) -> tuple[int, int]:
    """Return the size of the images of an opened study; of one without settings, the default of its model."""
    from difflex.pipeline import profile_model

    return study.settings.pixels or profile_model(study.model, (), _model_arguments(study)["revision"]).shot.pixels


def load_study_model(study: Study, command: StudyModelCommand) -> "Pipeline":
    """Load the model of a study that `open_study` opened, in its revision, with its settings as defaults."""
    import difflex

    settings, model = study.settings, _model_arguments(study)
    offload = settings.offload and (command.offload or _has_gpu())  # on a CPU, only what was asked for warns
    pipe = difflex.load(
        study.model,
        precision=settings.precision,
        offload=offload,
        offline=command.offline,
        text_length=settings.text_length,
        **model,
    )
    pipe.engine.set_defaults(settings.pixels, settings.steps, settings.guidance)
    return pipe


def _has_gpu() -> bool:
    from difflex.devices import find_device

    return find_device().type == "cuda"


def _model_arguments(study: Study) -> dict[str, Any]:
    """Return the revision on the hub, or the seed of the random weights, of the model of a study."""
    match = re.fullmatch(rf"{UNTRAINED}(\d{{1,19}})", study.revision or "")
    return {"revision": None, "untrained": int(match[1])} if match else {"revision": study.revision, "untrained": None}


def narrowed(
    study: Study, sites: tuple[str, ...], names: tuple[str, ...], largest: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sites and names that select dictionaries; if only the `largest` are wanted, no sites and their names."""
    return ((), tuple(map(str, study.select_largest(sites, names)))) if largest else (sites, names)


def open_book(study: Study, ref: DictionaryRef) -> Book:
    """Open the book of a dictionary for reading; it must be whole, and of the dictionary as it is now."""
    path, folder = study.book(*ref), study.dictionary(*ref)
    if not path.is_file():
        raise UnknownName(f"{ref} has no book yet. Run difflex collect to make it.")
    from difflex.dictionary_config import fingerprint

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
