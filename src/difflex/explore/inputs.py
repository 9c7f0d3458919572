"""What commands and the Python interface open in the same way: prompts, shots of a harvest, the model and books of a study."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from difflex.dictionary_config import fingerprint
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.features import Book
from difflex.files import file_sha256, write_file
from difflex.records import Shot
from difflex.study import DictionaryRef, Study, StudySettings
from difflex.values import fits, shown

if TYPE_CHECKING:
    from difflex.pipeline import Pipeline

__all__ = [
    "CAPTIONS",
    "UNTRAINED",
    "PromptSource",
    "harvest_settings",
    "harvested_settings",
    "load_model",
    "model_arguments",
    "open_book",
    "read_prompts",
    "study_shots",
]

CAPTIONS = "captions"
"""The name of the captions of the drawn world, where a file of prompts is expected."""
OWN_SEEDS = "a seed for each prompt"
"""How prompts and noise belong together where prompt number i has the seed i."""
UNTRAINED = "untrained-"
"""What the revision of a model with random weights begins with."""
AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline")


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


def harvest_settings(pipe: Pipeline, wishes: StudySettings) -> StudySettings:
    """Return the settings of a harvest for the study: `wishes`, with what they leave to the model filled in."""
    shot = next(pipe.shots("", steps=wishes.steps, pixels=wishes.pixels, guidance=wishes.guidance))
    is_path = wishes.prompts is not None and Path(wishes.prompts).exists()
    return replace(
        wishes,
        precision=pipe.precision,
        offload=pipe.engine.offloaded,
        text_length=pipe.engine.text_length,
        pixels=shot.pixels,
        steps=shot.steps,
        guidance=shot.guidance,
        prompts=str(Path(wishes.prompts or "").resolve()) if is_path else wishes.prompts,
    )


def study_shots(
    pipe: Pipeline, settings: StudySettings, prompts: PromptSource, stores: Iterable[Path] = ()
) -> tuple[Iterator[Shot], str]:
    """Return the shots of a study's harvest, from the first one on, and what identifies their prompts and seeds.

    The seeds with which one of `stores` was begun come first, with all prompts; then the others, each with all prompts. So more
    seeds add to what is stored.
    """
    kept = None if settings.keep_steps is None else range(*settings.keep_steps)
    shots = partial(pipe.shots, steps=settings.steps, keep_steps=kept, pixels=settings.pixels, guidance=settings.guidance)
    origin = f"{prompts.source} {'in order' if settings.shuffle is None else f'shuffled by {settings.shuffle}'}"
    begun = _begun_seeds(stores, origin, settings.seeds)
    if begun is None or settings.seeds is None:
        return shots(prompts.texts, None), f"{origin}, {OWN_SEEDS}"
    added = range(begun.stop, settings.seeds[1])
    texts = list(prompts.texts) if added else prompts.texts
    later = chain.from_iterable(shots(texts, range(seed, seed + 1)) for seed in added)
    return chain(shots(texts, begun), later), f"{origin}, seeds {begun.start}:{begun.stop}"


def _begun_seeds(stores: Iterable[Path], origin: str, asked: tuple[int, int] | None) -> range | None:
    """Return the seeds with which one of `stores` was begun with the prompts `origin`; those that are asked for if none was."""
    from difflex.store import Store

    seeds = None if asked is None else range(*asked)
    for folder in stores:
        match = re.fullmatch(rf"(.*), (?:seeds (\d+):(\d+)|{OWN_SEEDS})", Store.begun_source(folder) or "")
        begun = range(int(match[2]), int(match[3])) if match and match[2] else None
        if match is None or match[1] != origin or begun == seeds:
            continue  # other prompts are noticed where they are stored
        if begun is None:
            raise StaleWork(f"{folder} was begun with {OWN_SEEDS}. Leave --seeds out, or use another study.", folder)
        if seeds is None:
            problem = f"{folder} was begun with the seeds {begun.start}:{begun.stop}, not with {OWN_SEEDS}."
            raise StaleWork(f"{problem} Give them again with --seeds {begun.start}:{begun.stop}, or use another study.", folder)
        problem = f"{folder} was begun with the seeds {begun.start}:{begun.stop}, not {seeds.start}:{seeds.stop}."
        if begun.start != seeds.start or begun.stop > seeds.stop:
            more = f"{begun.start}:{begun.stop + len(seeds)}"
            raise StaleWork(f"{problem} Give them again, or add others after them, as in --seeds {more}.", folder)
        if not origin.startswith("sha256:"):
            raise StaleWork(f"{problem} Seeds are added where the prompts are a file. Add --tokens instead.", folder)
        return begun
    return seeds


def harvested_settings(study: Study) -> StudySettings:
    """Return the settings of a study; of one that kept none, those of the first shot that it stored."""
    if study.settings.precision is None:
        from difflex.store import Store

        for folder in study.stores().values():
            shot = Store.open(folder).shot(0)
            names = ("precision", "text_length", "pixels", "steps", "guidance")
            return replace(study.settings, **{name: getattr(shot, name) for name in names})
    return study.settings


def load_model(
    load: Callable[..., AnyPipeline], study: Study, *, is_asked_to_offload: bool = False, offline: bool = False
) -> AnyPipeline:
    """Return the model of a study, which `load` loads, in its revision, with the settings of the study as defaults."""
    settings = study.settings
    offload = settings.offload and (is_asked_to_offload or has_gpu())  # on a CPU, only what was asked for warns
    pipe = load(
        _located(study),
        precision=settings.precision,
        offload=offload,
        offline=offline,
        text_length=settings.text_length,
        **model_arguments(study),
    )
    pipe.name = study.model
    pipe.engine.set_defaults(settings.pixels, settings.steps, settings.guidance)
    return pipe


def _located(study: Study) -> str:
    """Return where the model of a study is: a folder may be named relative to a folder above the study, where it was made."""
    if not Path(study.model).exists():
        for parent in study.folder.resolve().parents:
            if (parent / study.model / "model_index.json").is_file():
                return str(parent / study.model)
    return study.model


def has_gpu() -> bool:
    """Return whether models are loaded to a GPU."""
    from difflex.devices import find_device

    return find_device().type == "cuda"


def model_arguments(study: Study) -> dict[str, Any]:
    """Return the revision on the hub, or the seed of the random weights, of the model of a study."""
    match = re.fullmatch(rf"{UNTRAINED}(\d{{1,19}})", study.revision or "")
    return {"revision": None, "untrained": int(match[1])} if match else {"revision": study.revision, "untrained": None}


def open_book(study: Study, ref: DictionaryRef) -> Book:
    """Open the book of a dictionary for reading; it must be whole, and of the dictionary as it is now."""
    path, folder = study.book(*ref), study.dictionary(*ref)
    if not path.is_file():
        raise UnknownName(f"{ref} has no book yet. Run difflex collect to make it.")
    book = Book.open(path)
    try:
        book.verify(fingerprint(folder))
    except BaseException:
        book.close()
        raise
    return book


def name_prompts(prompts: str | Path | Sequence[str], folder: Path) -> str:
    """Return the name of the prompts: of a file, a data set or `captions`; a list is written to a file in `folder`."""
    if isinstance(prompts, str | Path):
        name = str(prompts)
        if " " in name.strip() and not Path(name).exists():
            raise BadInput(f"There is no file '{name:.100}'. If that is a prompt, give a list of prompts: [{name[:40]!r}, ...].")
        return name
    texts = [check_text(prompt) for prompt in prompts]
    if not texts:
        raise BadInput("There are no prompts. Give a list with at least one.")
    content = "".join(json.dumps(text) + "\n" for text in texts).encode()
    path = folder / f"prompts-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    return str(path)


def check_text(prompt: str) -> str:
    """Return a prompt that is not empty."""
    if not fits(str, prompt) or not prompt.strip():
        raise BadInput(f"{shown(prompt)} is not a prompt. A prompt is text that is not empty.")
    return prompt
