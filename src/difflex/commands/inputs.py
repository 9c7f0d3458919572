"""What commands open: prompts, the model of a study, a book."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difflex.commands.flags import StudyImagesCommand, StudyModelCommand, memory_to_work
from difflex.errors import BadInput, BrokenFile, DifflexError, DiskError, StaleWork, UnknownName
from difflex.explore.inputs import harvested_settings, load_model, model_arguments, open_book
from difflex.explore.search import rarity, resolve_features
from difflex.records import Site
from difflex.study import DictionaryRef, Study

if TYPE_CHECKING:
    from difflex.pipeline import Pipeline


def open_study(folder: Path, command: StudyModelCommand, reserve: int = 0) -> Study:
    """Open a study whose model runs as the study says unless the flags of `command` say otherwise: its `settings` say how.

    A precision that is chosen by memory leaves at least `reserve` bytes free.
    """
    if command.offload and command.no_offload:
        raise BadInput("--offload and --no-offload exclude each other. Leave one of them out.")
    study = Study.open(folder)
    harvest = harvested_settings(study)
    changes: dict[str, Any] = {"offload": (harvest.offload or command.offload) and not command.no_offload}
    if isinstance(command, StudyImagesCommand):
        flags = {name: getattr(command, name) for name in ("pixels", "steps", "guidance")}
        changes |= {name: value for name, value in flags.items() if value is not None}
    if command.precision == "auto":
        from difflex.pipeline import choose_precision

        offload = True if command.offload else False if command.no_offload else None
        reserve = max(reserve, memory_to_work())
        fit = choose_precision(study.model, offload=offload, offline=command.offline, reserve=reserve, **model_arguments(study))
        changes |= fit._asdict()
    elif command.precision is not None:
        changes["precision"] = command.precision
    settings = replace(harvest, **changes)
    if harvest.pixels is not None and settings.pixels != harvest.pixels:
        new, old = (f"{height}x{width}" for height, width in (settings.pixels or harvest.pixels, harvest.pixels))
        print(f"Images are of {new} pixels; the study was harvested at {old}.")
    return replace(study, settings=settings)


def check_site(model: str, revision: str | None, site: Site, width: int | None = None) -> None:
    """Refuse a site that a model on this machine does not have, or activations of another `width`, by its configs alone.

    Of a model that is not here, or of a family without known configs, this is not known, and the site is taken as it is.
    """
    from difflex.pipeline.profile import config_site_rows

    try:
        rows = config_site_rows(model, revision, offline=True)
    except DifflexError:
        rows = []
    if not rows:
        print(f"Note: {model} cannot be looked at on this machine, so {site} was not compared with its sites.")
        return
    fitting = [row for row in rows if (row.site.path, row.site.stream) == (site.path, site.stream) and site.kind in row.kinds]
    if not fitting:
        names = [str(row.site) for row in rows]
        raise UnknownName.among(f"In {model} the site", str(site), names, "difflex sites lists them with their kinds.")
    expected = fitting[0].neurons if site.kind == "neurons" else fitting[0].width
    if width not in (None, expected):
        raise BadInput(f"The activations of {site} of {model} are {expected} wide, not {width}. Name another site or model.")


def study_pixels(study: Study) -> tuple[int, int]:
    """Return the size of the images of an opened study; of one without settings, the default of its model."""
    from difflex.pipeline import profile_model

    return study.settings.pixels or profile_model(study.model, (), model_arguments(study)["revision"]).shot.pixels


def load_study_model(study: Study, command: StudyModelCommand) -> "Pipeline":
    """Load the model of a study that `open_study` opened, in its revision, with its settings as defaults."""
    import difflex

    return load_model(difflex.load, study, is_asked_to_offload=command.offload, offline=command.offline)


def narrowed(
    study: Study, sites: tuple[str, ...], names: tuple[str, ...], largest: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sites and names that select dictionaries; if only the `largest` are wanted, no sites and their names."""
    return ((), tuple(map(str, study.select_largest(sites, names)))) if largest else (sites, names)


def named_features(study: Study, names: Sequence[str], dictionary: str | None) -> tuple[DictionaryRef, tuple[int, ...]]:
    """Return features that are named by number or by words, and their dictionary; print what words stand for.

    Without the name of a `dictionary` it is the one that fits the words best; for numbers alone, the only one.
    """
    words = [name for name in names if not name.isdecimal()]
    place = study.find_dictionary(dictionary) if dictionary is not None or not words else None
    resolved = dict(zip(words, resolve_features(study, words, place), strict=True)) if words else {}
    for word, found in resolved.items():
        print(f"{word}: {found}")
        if note := rarity(study, word, place):
            print(f"As a concept, {word} was not matched. {note}")
    place = place or next(iter(resolved.values())).place
    return place, tuple(resolved[name].feature if name in resolved else int(name) for name in names)


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
