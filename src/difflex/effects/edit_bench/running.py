"""Run the editing benchmark on a study: item by item, each kept when it is finished."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

import torch
from PIL import Image
from torch import Tensor

from difflex.effects.edit_bench.items import EDIT_TYPES, EditItem, EditWorld, Images, TransferMasks
from difflex.effects.edit_bench.places import TransferPlace, transfer_places
from difflex.effects.edit_bench.results import (
    REFERENCES,
    EditArm,
    EditBenchConfig,
    EditBenchResults,
    EditedItem,
    ImageScorer,
    sheet_path,
    summarise,
    with_score,
)
from difflex.effects.edit_bench.transfer import (
    CodedTokens,
    Deltas,
    Encode,
    ItemTransfer,
    NeuronTokens,
    RecordedRun,
    RunKey,
    WholeTokens,
    contrast_directions,
    record_runs,
    transfer_hooks,
)
from difflex.effects.inputs import ModelFunctions, Provenance, to_images, to_tensor
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import file_sha256, folder_lock, write_file
from difflex.images import write_image
from difflex.progress import ProgressBar
from difflex.records import Activations, Shot, Site
from difflex.steering import SteeringHook, StudyEditor, check_origin
from difflex.study import Study

BATCH = 8
"""Items that are edited together."""
TILE, COLUMNS = 256, 10
"""The longest side in pixels of an image in the sheet of an item, and how many images are in a row."""
SHARP, QUALITY = 64, 90
"""The width of an image up to which sheets are lossless, and the quality of others."""
FIRST_PAIR = 10**6
"""The seed of the first pair of images that a contrast is found on."""


class EditBenchOutcome(NamedTuple):
    """The file of the results, the results, and whether they were reused."""

    path: Path
    results: EditBenchResults
    is_reused: bool


def run_edit_benchmark(
    study: Study,
    config: EditBenchConfig,
    world: EditWorld,
    model: Callable[[], ModelFunctions],
    scorer: Callable[[], ImageScorer],
    files: Mapping[str, str] = {},
    log: Callable[[str], None] = print,
) -> EditBenchOutcome:
    """Run the benchmark on the items of `world`, write the results and return them.

    Results that are up to date are reused, and so are those of items; the model is only loaded for others. `files` are the
    checksums of files that scores depend on.
    """
    editor, places = StudyEditor(study), transfer_places(study, config)
    for ref in dict.fromkeys(ref for place in places for ref in place.dictionaries):
        dictionary = editor.dictionary(ref)
        check_origin(dictionary.name, dictionary.origin, ref.site, study.model, study.revision)
    used = {ref: dict[str, int]() for place in places for ref in place.dictionaries}
    provenance = Provenance.of(study, used, config.clip or "", {**world.files, **files})
    path, items = study.edit_bench(world.name), _first_of_each_type(world.items, config)
    stored = EditBenchResults.load(path) if path.is_file() else None
    run = _EditBenchRun(editor, places, config, world, path.with_suffix(""), _key(config, provenance, places))
    if stored is not None and (stored.config, stored.provenance, stored.all_arms) == (config, provenance, run.arms):
        return EditBenchOutcome(path, stored, True)
    with folder_lock(run.folder):
        edited = run.edit(items, model, scorer, log)
        results = EditBenchResults(
            model=study.model,
            world=world.name,
            items=len(edited),
            cells=summarise(edited, run.arms),
            config=config,
            provenance=provenance,
        )
        results.save(path)
    return EditBenchOutcome(path, results, False)


def _first_of_each_type(items: Sequence[EditItem], config: EditBenchConfig) -> list[EditItem]:
    own = [item for kind in config.types for item in [item for item in items if item.type == kind][: config.count]]
    if not own:
        raise BadInput(f"There is no item of the types {', '.join(config.types)}. Name other types.")
    return own


def _key(config: EditBenchConfig, provenance: Provenance, places: Sequence[TransferPlace]) -> str:
    """Return a checksum of all that the scores of an item depend on, besides the item: not of which items there are."""
    same = replace(config, types=EDIT_TYPES, count=1)
    names = [(place.method, place.name) for place in places]
    return hashlib.sha256(json.dumps([asdict(same), asdict(provenance), names], sort_keys=True).encode()).hexdigest()


@final
@dataclass(frozen=True)
class _EditBenchRun:
    """The run of a benchmark."""

    editor: StudyEditor
    places: Sequence[TransferPlace]
    config: EditBenchConfig
    world: EditWorld
    folder: Path
    key: str

    @property
    def arms(self) -> list[EditArm]:
        """All arms, the references first."""
        return [*REFERENCES, *(arm for place in self.places for arm in place.arms(self.config))]

    def edit(
        self,
        items: Sequence[EditItem],
        model: Callable[[], ModelFunctions],
        scorer: Callable[[], ImageScorer],
        log: Callable[[str], None],
    ) -> list[EditedItem]:
        """Return the scores of all items: of those that are finished from their files, of the others after editing them."""
        finished = {item.id: stored for item in items if (stored := self._stored(item)) is not None}
        missing = [item for item in items if item.id not in finished]
        if finished:
            log(f"{len(finished)} of {len(items)} items are finished already")
        if missing:
            self._check_masks(missing, model)
            session = _EditSession(self, model(), scorer())
            with ProgressBar(total=len(missing) * len(self.arms), unit=" images", desc="edit-bench") as bar:
                for batch in _batches(missing):
                    for entry in session.edit(batch, bar):
                        entry.save(self._record(entry.item))
                        finished[entry.item.id] = entry
        return [finished[item.id] for item in items]

    def _record(self, item: EditItem) -> Path:
        return self.folder / f"{item.id}.json"

    def _stored(self, item: EditItem) -> EditedItem | None:
        """Return the scores of an item if they are up to date."""
        path, sheet = self._record(item), sheet_path(self.folder, item)
        if not path.is_file() or not sheet.is_file():
            return None
        try:
            entry = EditedItem.load(path)
        except BrokenFile:
            return None  # it is edited again
        is_current = (entry.key, entry.item, entry.sheet) == (self.key, item, file_sha256(sheet))
        return entry if is_current else None

    def _check_masks(self, items: Sequence[EditItem], model: Callable[[], ModelFunctions]) -> None:
        """Refuse items without masks, after their images are written, from which masks can be made."""
        try:
            self.world.check(items, self.folder)
        except BadInput:
            paths = {item: [self.folder / item.id / f"{side}.png" for side in ("source", "target")] for item in items}
            lacking = [item for item in items if not all(path.is_file() for path in paths[item])]
            if lacking:
                functions, sites = model(), self.places[0].sites
                for batch in _batches(lacking):
                    for side, prompts in enumerate(zip(*((item.source, item.target) for item in batch), strict=True)):
                        keys = [(prompt, item.seed) for prompt, item in zip(prompts, batch, strict=True)]
                        images = _Runs(functions, sites, keys, every_step=False).images
                        for item, key in zip(batch, keys, strict=True):
                            write_image(images[key], paths[item][side])
            raise


def _batches(items: Sequence[EditItem]) -> Iterator[list[EditItem]]:
    """Yield items in batches in which no two edit the same image, since hooks tell images apart by prompt and seed."""
    batch: list[EditItem] = []
    for item in items:
        if len(batch) == BATCH or any((other.source, other.seed) == (item.source, item.seed) for other in batch):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@final
class _Runs:
    """Runs of the model: their images, and the activations of sites."""

    def __init__(
        self,
        model: ModelFunctions,
        sites: Sequence[Site],
        keys: Sequence[RunKey],
        hooks: Sequence[SteeringHook] = (),
        every_step: bool = True,
    ) -> None:
        """Generate the images of prompts and seeds; the activations are of all steps, or of the first step."""
        first = model.shots(range(1))[0]
        shot = replace(first, timestep=None) if every_step else first
        shots = [replace(shot, prompt=prompt, seed=seed, split=Shot.split_of(prompt)) for prompt, seed in dict.fromkeys(keys)]
        images, self.activations = list[Image.Image](), list[Activations]()
        for batch, activations in model.finish(shots, sites if every_step else sites[:1], hooks):
            images += batch
            self.activations += [replace(own, values=own.values.cpu()) for own in activations]
        self.images = {(shot.prompt, shot.seed): image for shot, image in zip(shots, images, strict=True)}

    def pixels(self, keys: Sequence[RunKey]) -> Images:
        """Return the images of runs."""
        return to_tensor(self.images[key] for key in keys)

    def recorded(self) -> dict[RunKey, RecordedRun]:
        """Return the activations of each run."""
        return record_runs(self.activations)


class _PreparedBatch(NamedTuple):
    """Items with both of their images, and their transfers."""

    items: Sequence[EditItem]
    sources: Images
    targets: Images
    transfers: Sequence[ItemTransfer]
    directions: Sequence[Mapping[Site, Tensor]]
    """Of the contrast of each item, by site."""

    @property
    def keys(self) -> list[RunKey]:
        """The runs of the source images."""
        return [(item.source, item.seed) for item in self.items]


@final
class _EditSession:
    """Edits items with a model."""

    def __init__(self, run: _EditBenchRun, model: ModelFunctions, scorer: ImageScorer) -> None:
        self._run, self._model, self._scorer = run, model, scorer
        self._sites = list(dict.fromkeys(site for place in run.places for site in place.sites))

    def edit(self, items: Sequence[EditItem], bar: ProgressBar) -> list[EditedItem]:
        """Return the scores of items under all arms, and write their sheets."""
        batch = self._prepare(items)
        scores: list[dict[str, dict[str, float]]] = [{} for _ in items]
        tiles: list[list[Tensor]] = [[] for _ in items]
        for arm, images in self._images(batch):
            for own, row, tile, image in zip(scores, self._score(batch, images), tiles, images, strict=True):
                own[str(arm)] = with_score(row)
                tile.append(image)
            bar.update(len(items))
        entries = []
        for item, own, images in zip(items, scores, tiles, strict=True):
            sheet = write_file(sheet_path(self._run.folder, item), _sheet(torch.stack(images)))
            entries.append(EditedItem(key=self._run.key, item=item, scores=own, sheet=sheet))
        return entries

    def _prepare(self, items: Sequence[EditItem]) -> _PreparedBatch:
        keys = [[(item.source, item.seed) for item in items], [(item.target, item.seed) for item in items]]
        runs = _Runs(self._model, self._sites, [*keys[0], *keys[1]])
        recorded, (sources, targets) = runs.recorded(), map(runs.pixels, keys)
        missing = [site for site in self._sites if not any(own.site == site for own in runs.activations)]
        if missing:
            raise UnknownName(f"The site {missing[0]} is not written as the model names it. difflex sites lists them.")
        masks = self._run.world.masks(items, sources, targets)
        transfers = [
            ItemTransfer(item, TransferMasks.of(item, own), recorded[source], recorded[target])
            for item, own, source, target in zip(items, masks, *keys, strict=True)
        ]
        return _PreparedBatch(items, sources, targets, transfers, [self._directions(item) for item in items])

    def _images(self, batch: _PreparedBatch) -> Iterator[tuple[EditArm, Images]]:
        """Yield the images of each arm, the references first."""
        yield from zip(REFERENCES, (batch.sources, batch.targets), strict=True)
        for place in self._run.places:
            for count, deltas in self._deltas(place, batch):
                by_run = dict(zip(batch.keys, deltas, strict=True))
                for arm in (arm for arm in place.arms(self._run.config) if arm.features == count):
                    hooks = transfer_hooks(by_run, arm.strength)
                    yield arm, _Runs(self._model, place.sites, batch.keys, hooks, every_step=False).pixels(batch.keys)

    def _deltas(
        self, place: TransferPlace, batch: _PreparedBatch
    ) -> Iterator[tuple[int | None, Sequence[Mapping[Site, Deltas]]]]:
        """Yield what is added for each item, by how many parts are transferred."""
        if place.method == "contrast":
            pairs = zip(batch.transfers, batch.directions, strict=True)
            yield None, [transfer.contrast_deltas(place.sites, directions) for transfer, directions in pairs]
            return
        counts, encoders = place.counts(self._run.config), self._encoders(place)
        by_item = [transfer.deltas(encoders, counts) for transfer in batch.transfers]
        for count in counts:
            yield count, [next(deltas) for deltas in by_item]

    def _encoders(self, place: TransferPlace) -> dict[Site, Encode]:
        if place.method == "features":
            return {ref.site: partial(CodedTokens, self._run.editor.dictionary(ref)) for ref in place.dictionaries}
        return dict.fromkeys(place.sites, NeuronTokens if place.method == "neurons" else WholeTokens)

    def _directions(self, item: EditItem) -> dict[Site, Tensor]:
        """Return the directions of an item's contrasts at all of their sites."""
        sites = dict.fromkeys(site for place in self._run.places if place.method == "contrast" for site in place.sites)
        seeds = range(FIRST_PAIR, FIRST_PAIR + self._run.config.pairs) if sites else ()
        keys = [(prompt, seed) for prompt in (item.source, item.target) for seed in seeds]
        return contrast_directions(item, list(sites), _Runs(self._model, list(sites), keys).activations) if sites else {}

    def _score(self, batch: _PreparedBatch, edited: Images) -> list[dict[str, float]]:
        changed = [transfer.masks.changed for transfer in batch.transfers]
        rows = self._scorer(batch.items, changed, batch.sources, batch.targets, edited)
        judge = self._run.world.judge
        judged = judge(batch.items, batch.sources, edited) if judge is not None else [{} for _ in rows]
        return [{**verdict, **row} for verdict, row in zip(judged, rows, strict=True)]


def _sheet(images: Images) -> bytes:
    """Return a WebP file of images in rows, reduced to tiles."""
    tiles, buffer = list(to_images(images)), io.BytesIO()
    for tile in tiles:
        tile.thumbnail((TILE, TILE))
    (width, height), rows = tiles[0].size, math.ceil(len(tiles) / COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(tiles)), height * rows))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % COLUMNS * width, number // COLUMNS * height))
    sheet.save(buffer, "WEBP", lossless=width <= SHARP, quality=QUALITY)
    return buffer.getvalue()
