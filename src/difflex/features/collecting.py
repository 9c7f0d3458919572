"""`collect` makes the books of several dictionaries in one pass over images and activations; sources of images for it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from difflex.devices import find_device
from difflex.dictionaries import ITDA, Dictionary, fingerprint
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.features.book import Book
from difflex.features.collector import CollectConfig, FeatureCollector
from difflex.features.firing import image_key
from difflex.features.images import ImageAlbum
from difflex.features.registry import CollectBatch, CollectCheckpoint, ShotRegistry
from difflex.features.results import AtomLocation, CollectTarget, write_book
from difflex.files import disk_errors, file_sha256, folder_lock, parsing
from difflex.images import open_image
from difflex.progress import ProgressBar
from difflex.records import Activations, Shot, Site
from difflex.store import Store
from difflex.study import DictionaryRef, Study

__all__ = [
    "CollectBatch",
    "CollectConfig",
    "CollectTarget",
    "PromptedImage",
    "collect",
    "collect_study",
    "image_files",
    "noised_source",
    "runs_source",
    "stored_source",
]

BatchSource = Callable[[int], Iterator[CollectBatch]]
"""Takes a number of images to skip and yields batches of all others, the same ones each time."""
DrawImages = Callable[[Sequence[Shot]], Sequence[Image.Image]]
"""Returns the final images of the runs of some shots."""
HarvestRuns = Callable[[Sequence[Shot], Sequence[Site]], Iterable[tuple[Sequence[Image.Image], Sequence[Activations]]]]
"""Takes shots and sites and yields batches of final images and activations."""
HarvestImages = Callable[[list[Image.Image], list[str], list[str], Sequence[Site], int], Iterable[Activations]]
"""Takes images, their prompts and names, sites, and the seed of the first image's noise."""
SAVE_SHARE = 0.05
"""The share of the time that saving the state may take; a longer save makes the next one later."""
DRAWN_AT_ONCE = 32
"""Images of ITDA atoms drawn at once."""
IMAGE_ENDINGS = (".png", ".webp", ".jpg", ".jpeg")


def collect(
    targets: Sequence[CollectTarget],
    source: BatchSource,
    album: ImageAlbum,
    *,
    data: str,
    checkpoint: Path,
    config: CollectConfig = CollectConfig(),  # noqa: B008 (a constant)
    draw: DrawImages | None = None,
    most_patches: int | None = None,
    save_seconds: float = 60.0,
    images: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> list[Path]:
    """Make the books of `targets` from all images of `source` and return their paths.

    The state is saved to `checkpoint` every `save_seconds` (0: after every batch), less often if that takes more than a twentieth
    of the time; a killed pass continues from there and makes the same books. `data` describes the images: a checkpoint of other
    data is ignored. `draw` makes the images of ITDA atoms that the source does not contain, at most `most_patches` of them (None:
    all). `images` is the number of images that the progress bar shows. Dictionaries run on `device`, by default a GPU if there is
    one.
    """
    device = find_device(device)
    targets = [replace(target, dictionary=target.dictionary.on(device)) for target in targets]
    shots = [location.shot for target in targets for location in target.patches.values()]
    patches = {image_key(shot): shot for shot in shots if shot.image is None}
    collectors = [FeatureCollector(target.dictionary, config) for target in targets]
    registry = ShotRegistry(album, patches)
    fingerprints = {target.name: target.fingerprint for target in targets}
    state = CollectCheckpoint(checkpoint, {"dictionaries": fingerprints, "config": asdict(config), "data": data})
    state.restore(collectors, registry)
    further = lambda: [] if draw is None else _further_shots(patches, targets, collectors, registry, most_patches)  # noqa: E731
    next_save = time.monotonic() + save_seconds
    for _ in chain(_add_all(collectors, registry, source, images, progress), _draw_patches(further, registry, draw, progress)):
        if (began := time.monotonic()) > next_save:
            state.save(collectors, registry)
            took = time.monotonic() - began
            next_save = began + took + (save_seconds and max(save_seconds, took / SAVE_SHARE))
    state.save(collectors, registry)
    finished = zip(targets, (collector.on_cpu() for collector in collectors), strict=True)
    books = [write_book(target, collector, registry, data) for target, collector in finished]
    checkpoint.unlink(missing_ok=True)
    return books


def _add_all(
    collectors: Sequence[FeatureCollector], registry: ShotRegistry, source: BatchSource, images: int | None, progress: bool
) -> Iterator[None]:
    """Add all batches of the source that are not in the registry yet; yield after each batch."""
    with ProgressBar(total=images, initial=registry.images, unit=" images", desc="collect", show=progress) as bar:
        for batch in source(registry.images):
            _add(batch, collectors, registry)
            bar.update(len(batch.images))
            yield


def _add(batch: CollectBatch, collectors: Sequence[FeatureCollector], registry: ShotRegistry) -> None:
    images = registry.add(batch)
    used: set[int] = set()
    for collector in collectors:
        site = collector.dictionary.site
        activations = [part for part in batch.activations if part.site == site]
        if len(activations) != images.shots.shape[1] or any(len(part.shots) != len(batch.images) for part in activations):
            raise BadInput(f"The site {site} lacks activations of some of {len(batch.images)} images, at some timestep.")
        used.update(collector.add(activations, images))
    registry.register(batch, images, used)


def _further_shots(
    patches: Mapping[int, Shot],
    targets: Sequence[CollectTarget],
    collectors: Sequence[FeatureCollector],
    registry: ShotRegistry,
    most: int | None,
) -> list[Shot]:
    """Return the shots of ITDA atoms whose images are missing, those of the most atoms that fire first, and at most `most`."""
    atoms = Counter[int]()
    for target, collector in zip(targets, collectors, strict=True):
        firings = collector.totals.firings.tolist()
        atoms.update(image_key(location.shot) for feature, location in target.patches.items() if firings[feature])
    missing = [key for key in patches if key not in registry.patches]
    chosen = sorted(missing, key=lambda key: -atoms[key])[: None if most is None else max(0, most - registry.drawn)]
    if len(chosen) < len(missing):
        print(
            f"{len(missing):,} images that atoms were taken from are not among the images: {len(chosen):,} are generated, those "
            "of the most atoms first. Ask for more with --patches."
        )
    return [patches[key] for key in chosen]


def _draw_patches(
    further: Callable[[], Sequence[Shot]], registry: ShotRegistry, draw: DrawImages | None, progress: bool
) -> Iterator[None]:
    """Draw the images of the shots that `further` returns at the end of the pass; yield after each batch."""
    shots = further()
    with ProgressBar(total=len(shots), unit=" images", desc="patches", show=progress and bool(shots)) as bar:
        for first in range(0, len(shots), DRAWN_AT_ONCE):
            part = shots[first : first + DRAWN_AT_ONCE]
            assert draw is not None
            registry.store_drawn(part, draw(part))
            bar.update(len(part))
            yield


class PromptedImage(NamedTuple):
    """An image to which noise is added, and the prompt that the model gets with it."""

    image: Image.Image
    prompt: str
    name: str

    @classmethod
    def read(cls, path: Path, pixels: tuple[int, int] | None) -> PromptedImage:
        """Read an image, resize and crop it to `pixels`, and read its prompt from the text file of the same name."""
        image, text = open_image(path, "RGB"), path.with_suffix(".txt")
        with disk_errors(text, "read"), parsing(text, "a prompt", "Save it as UTF-8 text."):
            prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        return cls(ImageOps.fit(image, (pixels[1], pixels[0])) if pixels else image, prompt, path.name)


class ImageSource(NamedTuple):
    """Images to collect examples from, with functions that return their activations and generate further images."""

    description: str
    """Identifies the images and how they are made."""
    images: int
    """Number of images."""
    batches: Callable[[Sequence[Site], int], Iterator[CollectBatch]]
    """Takes sites and a number of images to skip."""
    harvest: HarvestRuns
    """Generates the images of other shots."""


def runs_source(description: str, shots: Iterable[Shot], limit: int, harvest: HarvestRuns) -> ImageSource:
    """Return the final images of the first `limit` runs of `shots`; a run is consecutive shots, one for each kept step.

    The shots identify the images: whatever flags they came from, the same shots make the same book.
    """
    groups = groupby(shots, key=lambda shot: replace(shot, timestep=None))
    runs = [list(group) for _, group in islice(groups, limit)]
    if not runs:
        raise BadInput(f"There are no shots to collect from ({description}). Give a file with a prompt in each line.")

    def batches(sites: Sequence[Site], start: int) -> Iterator[CollectBatch]:
        remaining = [shot for run in runs[start:] for shot in run]
        return (CollectBatch(*batch) for batch in harvest(remaining, sites))

    content = json.dumps([shot.as_json() for run in runs for shot in run])
    description = f"{description}, shots {hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return ImageSource(description, len(runs), batches, harvest)


def noised_source(
    description: str,
    count: int,
    load: Callable[[int], Iterator[PromptedImage]],
    harvest_images: HarvestImages,
    harvest: HarvestRuns,
    batch: int,
) -> ImageSource:
    """Return `count` existing images, to which noise is added for the model; `load` takes a number of images to skip."""

    def batches(sites: Sequence[Site], start: int) -> Iterator[CollectBatch]:
        prompted = load(start)
        while group := list(islice(prompted, batch)):
            images, prompts, names = (list(column) for column in zip(*group, strict=True))
            if len(sizes := {image.size for image in images}) > 1:
                raise BadInput(f"The images have several sizes: {sorted(sizes)}. Resize and crop them with --pixels.")
            yield CollectBatch(images, list(harvest_images(images, prompts, names, sites, start)))
            start += len(group)

    return ImageSource(description, count, batches, harvest)


def stored_source(
    study: Study, refs: Sequence[DictionaryRef], limit: int, precision: str | None, harvest: Callable[[str | None], HarvestRuns]
) -> ImageSource:
    """Return the images of the first `limit` runs of the harvest of a site of `refs`, or else of any site.

    `harvest` takes the precision, by default that of the harvest.
    """
    stores = study.stores()
    site = next((ref.site for ref in refs if ref.site in stores), next(iter(stores), None))
    if site is None:
        raise UnknownName(f"{study.folder} has no stored activations, so no shots to repeat. Use --prompts or --drawn-world.")
    store = Store.open(stores[site])
    runs: dict[Shot, list[Shot]] = {}
    # A harvest stores the shots of a batch of runs step by step.
    for number in range((store.count() + store.count("held-out")) // store.tokens):
        shot = store.shot(number)
        shot = replace(shot, precision=precision or shot.precision)
        run = replace(shot, timestep=None)
        if run in runs or len(runs) < limit:
            runs.setdefault(run, []).append(shot)
    shots = [shot for run in runs.values() for shot in run]
    return runs_source("harvest", shots, limit, harvest(shots[0].precision if shots else None))


class ImageFolder(NamedTuple):
    """Image files, sorted by name."""

    paths: list[Path]
    checksum: str
    """Of the names and contents of the images and of their prompts."""


def image_files(folder: Path, limit: int) -> ImageFolder:
    """Return the first image files in `folder`, at most `limit`."""
    if not folder.is_dir():
        raise UnknownName(f"There is no folder {folder}. Name one with images.")
    with disk_errors(folder, "read"):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)[:limit]
    if not paths:
        raise BadInput(f"{folder} has no images. Put {', '.join(IMAGE_ENDINGS)} files into it.")
    checksum = hashlib.sha256()
    for path in paths:
        text = path.with_suffix(".txt")
        for file in (path, *([text] if text.is_file() else [])):
            with disk_errors(file, "read"):
                checksum.update(f"{file.name} {file_sha256(file)}\n".encode())
    return ImageFolder(paths, checksum.hexdigest()[:16])


class CollectedBook(NamedTuple):
    """The book of a dictionary of a study."""

    path: Path
    up_to_date: bool
    """Whether it existed already."""


def collect_study(
    study: Study,
    refs: Sequence[DictionaryRef],
    open_source: Callable[[], ImageSource],
    config: CollectConfig,
    *,
    load: Callable[[DictionaryRef], Dictionary],
    strengths: Callable[[DictionaryRef], Sequence[float]],
    most_patches: int | None = None,
    discard_explanations: bool = False,
) -> list[CollectedBook]:
    """Make the books of dictionaries in one pass over images; books that are up to date stay.

    The source of the images is opened once the books can be written. `strengths` returns the default steering strengths of all
    features of a dictionary, if known. The model generates images of ITDA atoms that are not in the source, at most
    `most_patches` of them (None: as many as the source has images), those of the most atoms that fire first. Explanations are
    kept, unless they are to be discarded.
    """
    with _books_locked(study, refs):
        source = open_source()
        if discard_explanations:
            _discard_explanations(study, refs)
        settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
        data = f"{source.description}, {source.images} images, {settings}"
        data += "" if most_patches is None else f", {most_patches or 'no'} patches"
        missing = [ref for ref in refs if not _is_current(study, ref, data)]
        checkpoint = study.folder / "books" / "collecting.safetensors"
        if checkpoint.is_file():
            current = (ref for ref in refs if ref not in missing)
            CollectCheckpoint.delete_finished(checkpoint, {str(ref): fingerprint(study.dictionary(*ref)) for ref in current})
        if missing:
            sites = list(dict.fromkeys(ref.site for ref in missing))

            def draw(shots: Sequence[Shot]) -> list[Image.Image]:
                return [image for images, _ in source.harvest(shots, sites[:1]) for image in images]

            collect(
                [_target(study, ref, load(ref), strengths(ref)) for ref in missing],
                lambda start: source.batches(sites, start),
                ImageAlbum(study.images),
                data=data,
                checkpoint=checkpoint,
                config=config,
                draw=draw if most_patches != 0 else None,
                most_patches=source.images if most_patches is None else most_patches,
                images=source.images,
            )
        return [CollectedBook(study.book(*ref), ref not in missing) for ref in refs]


@contextmanager
def _books_locked(study: Study, refs: Sequence[DictionaryRef]) -> Iterator[None]:
    """Keep other processes from collecting the books of these dictionaries."""
    with ExitStack() as locks:
        for folder in dict.fromkeys([study.folder / "books", study.images, *(study.book(*ref).parent for ref in refs)]):
            locks.enter_context(folder_lock(folder))
        yield


def _discard_explanations(study: Study, refs: Sequence[DictionaryRef]) -> None:
    """Delete the explanations in the books of dictionaries, and print how many; books that cannot be read stay."""
    for path in (study.book(*ref) for ref in refs):
        try:
            with Book.edit(path) as book:
                print(f"{path}: {book.discard_explanations()} explanations discarded")
        except (BrokenFile, StaleWork, UnknownName):
            continue


def _target(study: Study, ref: DictionaryRef, dictionary: Dictionary, strengths: Sequence[float]) -> CollectTarget:
    patches = [dictionary.patch(feature) for feature in range(dictionary.size)] if isinstance(dictionary, ITDA) else []
    return CollectTarget(
        dictionary=dictionary,
        name=str(ref),
        fingerprint=fingerprint(study.dictionary(*ref)),
        book=study.book(*ref),
        patches={n: AtomLocation(patch.shot, patch.token) for n, patch in enumerate(patches) if patch and patch.shot},
        strengths=strengths,
    )


def _is_current(study: Study, ref: DictionaryRef, data: str) -> bool:
    """Return whether the book exists and is whole, of the dictionary as it is now and of the same images, which are whole too."""
    path = study.book(*ref)
    if not path.is_file():
        return False
    try:
        with Book.open(path) as book:
            book.verify()
            if book.about.data != data or book.about.fingerprint != fingerprint(study.dictionary(*ref)):
                return False
            damage = [sentence for image in book.images() if (sentence := ImageAlbum(study.images).damage(image.file))]
    except (BrokenFile, StaleWork) as error:
        print(f"{error} It is collected again.")
        return False
    if damage:
        print(f"{damage[0]} {len(damage)} images of {path} are missing or damaged: it is collected again, with its explanations.")
    return not damage
