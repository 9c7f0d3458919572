"""`record`: write the activations of a harvest, of several sites at once, as stores that survive a kill at any moment."""

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import final

import torch

from difflex.choices import StoredDtype
from difflex.errors import BadInput, StaleWork
from difflex.files import AtomicFile, folder_lock
from difflex.progress import ProgressBar
from difflex.records import Activations, Shot, Site
from difflex.store.basis import ROWS, BasisTally
from difflex.store.handover import HandedOver
from difflex.store.manifest import StoreHeader, check_split, finished_shards
from difflex.store.reading import check_rank
from difflex.store.recorder import SiteRecorder, check_disk, check_next_shard, format_size, store_bytes, text_bytes
from difflex.store.shard import ShardFormat, check_dtype, non_finite
from difflex.store.store import Store

FIRST_SHOTS = 32
"""Shots from which the units of int8 are estimated, at least."""
QUEUE = 2
"""Batches that may wait to be written while the model makes the next one."""

Harvest = Callable[[Sequence[Shot], Sequence[Site], int], Iterable[Activations]]
"""A source of activations, as `Pipeline.harvest`: called with shots, sites and the number of runs to make at once.

It yields each shot once at each site, in any order that is always the same.
"""


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How activations are stored."""

    dtype: StoredDtype = "bf16"
    """int8 takes half the space; its rounding adds at most 0.07 % of its variance to every axis, the smallest ones too."""
    tokens: int | None = None
    """Rows to store at each site, rounded up to whole runs; None for all shots."""
    batch: int = 16
    """Runs that the model makes at once."""
    shard_bytes: int = 2**28
    """Of the largest site's shards, rounded to whole batches. A store that is continued keeps its own."""
    max_bytes: int | None = None
    """Bytes that all files of all sites may take; checked before anything is written, and again before each shard."""
    source: str = ""
    """Where the shots come from, such as the checksum of a file of prompts: to continue with another one is an error."""
    rank: int = 0
    """Of this process: each rank makes its share of the shards, and the last one to end completes the store."""
    world_size: int = 1
    progress: bool = True

    def check_folder(self, folder: Path, sites: Iterable[str]) -> None:
        """Raise the errors of `record` that need no model: `folder` cannot be written, or another process records `sites`.

        Patterns of sites and folders that do not exist yet pass.
        """
        names = [site.replace(":", "+") for site in sites]
        stores = [place for place in folder.glob("*") if any(fnmatchcase(place.name, name) for name in names)]
        with ExitStack() as stack:
            for place in stores:
                _lock(stack, place, self)
        AtomicFile(next(path for path in (folder, *folder.absolute().parents) if path.exists()) / "write-test").discard()


def record(
    folder: Path | str,
    shots: Iterable[Shot],
    sites: Iterable[Site | str] | Site | str,
    harvest: Harvest,
    config: RecordingConfig | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> list[Store]:
    """Store the activations of each of `sites` in its own folder under `folder`; stores that are begun are continued.

    Which rows a shard holds depends only on the order of `shots` and on the config: a recording that was killed and resumed, or
    that several processes share, gives the same files as an undisturbed one. `before_writing` is called when it is clear that
    there is room for the rows, before anything is written.
    """
    config, folder = config or RecordingConfig(), Path(folder)
    several = [sites] if isinstance(sites, (Site, str)) else sites
    parsed = [Site.parse(site) if isinstance(site, str) else site for site in several]
    folders = {site: folder / site.folder for site in parsed}
    _check(folders, config)
    with ExitStack() as stack:
        existing = [place for place in folders.values() if place.exists()]
        for place in existing:
            _lock(stack, place, config)
        recorders = [SiteRecorder(place, site, config.world_size) for site, place in folders.items()]
        shots, total = _plan(recorders, shots, harvest, config)
        before_writing()
        for recorder in recorders:
            if recorder.folder not in existing:
                _lock(stack, recorder.folder, config, new=True)
            recorder.open()
        if config.progress:
            ProgressBar.write(_describe(recorders, total))
        shards = _write_shards(shots, total, recorders, harvest, config)
        for recorder in recorders:
            recorder.complete(shards)
    return [Store.open(recorder.folder) for recorder in recorders]


def _check(sites: Collection[Site], config: RecordingConfig) -> None:
    check_dtype(config.dtype)
    if not sites:
        raise BadInput("No site was named to record. Name at least one.")
    if config.batch < 1:
        raise BadInput(f"Batches of {config.batch} runs are not possible. Ask for 1 or more.")
    if config.tokens is not None and config.tokens < 1:
        raise BadInput(f"{config.tokens} tokens cannot be recorded. Ask for 1 or more.")
    check_rank(config.rank, config.world_size)


def _lock(stack: ExitStack, folder: Path, config: RecordingConfig, new: bool = False) -> None:
    """Make `folder` and keep other recordings from writing in it until `stack` is closed."""
    stack.enter_context(folder_lock(folder, shared=config.world_size > 1))
    if new and config.world_size == 1 and finished_shards(folder):
        raise BadInput(f"Another process has written in {folder} meanwhile. Run the same command again to continue from there.")


def _plan(
    recorders: Sequence[SiteRecorder], shots: Iterable[Shot], harvest: Harvest, config: RecordingConfig
) -> tuple[Iterator[Shot], int]:
    """Fix the headers of new stores and return the shots with the number of them to record; nothing is written.

    There may be endlessly many shots, or fewer than the number.
    """
    shots = distinct(shots)
    if config.tokens is None:
        shots = list(shots)
    run, rest = _first_run(iter(shots))
    begun = [recorder for recorder in recorders if recorder.begun]
    for recorder in begun:
        recorder.check_settings(run[0], config.dtype, config.batch, config.source)
    if len({recorder.head.shots_per_shard for recorder in begun}) > 1:
        raise StaleWork("These sites were begun with shards of different lengths. Continue them one by one.")
    if len(begun) < len(recorders):
        _fix_headers(recorders, run, harvest, config)
    if isinstance(shots, list):
        total = len(shots)
    else:
        total = shots_for(config.tokens or 0, [recorder.head.form for recorder in recorders], len(run))
    check_disk(recorders, config.max_bytes, total, run, shots if isinstance(shots, list) else run)
    counts = {each.site: _first_shots(each.head, len(run), total) for each in recorders if each.lacks_basis}
    first = list(islice(chain(run, rest), max(counts.values(), default=0)))
    _fix_bases(recorders, first, counts, harvest, config.batch)
    for recorder in recorders:
        recorder.check_rows(total)
    return chain(first or run, rest), total


def _first_shots(head: StoreHeader, run: int, total: int) -> int:
    """Return how many shots fix the units of int8 at a site, in whole batches of runs of `run` shots.

    It depends on nothing else, so that a lost basis is made again from the same batches, whatever sites are harvested with it.
    """
    batch = head.batch * run
    return min(-(-max(FIRST_SHOTS, -(-ROWS * head.width // head.tokens)) // batch) * batch, total)


def _fix_bases(
    recorders: Sequence[SiteRecorder], shots: Sequence[Shot], counts: Mapping[Site, int], harvest: Harvest, batch: int
) -> None:
    """Harvest `shots`, of which the first few fix the units of int8 at each site where they are not known yet."""
    if not counts:
        return
    tallies = {site: BasisTally() for site in counts}
    firsts = {site: set(shots[:count]) for site, count in counts.items()}
    for activations in harvest(shots, list(counts), batch):
        if firsts[activations.site].issuperset(activations.shots):
            if not bool(torch.isfinite(activations.values).all()):
                raise non_finite(activations.values, activations.shots, activations.site)
            tallies[activations.site].add(activations.values)
    for recorder in recorders:
        if recorder.site in counts:
            recorder.set_basis(tallies[recorder.site].basis())


def _describe(recorders: Sequence[SiteRecorder], total: int) -> str:
    """Describe what `total` shots take on disk at each site."""
    shards = -(-total // recorders[0].head.shots_per_shard)
    lines = []
    for recorder in recorders:
        head, rows = recorder.head, total * recorder.head.tokens
        lines.append(
            f"{recorder.site}: {rows:,} rows of width {head.width} in {head.dtype}, {format_size(rows * head.form.row_bytes)} in "
            f"{shards} shard{'s' * (shards > 1)}" + (f"; {recorder.rows:,} rows are stored already" if recorder.rows else "")
        )
    return "\n".join(lines)


def distinct(shots: Iterable[Shot]) -> Iterator[Shot]:
    """Drop shots that repeat one of the same run: the same prompt twice in a row adds nothing."""
    run, timesteps = None, set[float | None]()
    for shot in shots:
        shot_run = replace(shot, timestep=None)
        if shot_run != run:
            run, timesteps = shot_run, set()
        if shot.timestep not in timesteps:
            timesteps.add(shot.timestep)
            yield shot


def _first_run(stream: Iterator[Shot]) -> tuple[list[Shot], Iterator[Shot]]:
    """Return the shots of the first run, which differ in their timestep alone, and all others."""
    first = next(stream, None)
    if first is None:
        raise BadInput("There is nothing to record: no shot was given. Give at least one prompt.")
    run = [first]
    for shot in stream:
        if replace(shot, timestep=None) != replace(first, timestep=None):
            return run, chain([shot], stream)
        run.append(shot)
    return run, iter(())


def probe(shot: Shot, sites: Sequence[Site], harvest: Harvest) -> dict[Site, Activations]:
    """Harvest one shot at each site, to learn the shapes of all activations."""
    by_site = {activations.site: activations for activations in harvest([shot], sites, 1)}
    for site in sites:
        if site not in by_site:
            names = ", ".join(map(str, by_site)) or "nothing"
            raise BadInput(f"The harvest gave nothing at the site '{site}'. It gave: {names}.")
        if len(by_site[site].shots) != 1 or len(by_site[site].values) != 1:
            raise BadInput("The harvest gave several shots for one. Give shots that have a timestep.")
    return by_site


def _fix_headers(recorders: Sequence[SiteRecorder], run: Sequence[Shot], harvest: Harvest, config: RecordingConfig) -> None:
    """Fix the headers of new stores; all sites have the same number of shots per shard, so that they share passes."""
    shot, new = run[0], [recorder for recorder in recorders if not recorder.begun]
    examples = probe(shot, [recorder.site for recorder in new], harvest)
    forms = {site: ShardFormat(site, config.dtype, *activations.values.shape[1:]) for site, activations in examples.items()}
    lengths = [recorder.head.shots_per_shard for recorder in recorders if recorder.begun]
    length = lengths[0] if lengths else _shots_per_shard([*forms.values()], len(run), config)
    for recorder in new:
        recorder.begin(
            StoreHeader(
                **forms[recorder.site]._asdict(),
                model=shot.model,
                revision=shot.revision,
                precision=shot.precision,
                grid=examples[recorder.site].grid,
                shots_per_shard=length,
                batch=config.batch,
                source=config.source,
            )
        )


def shots_for(tokens: int, forms: Sequence[ShardFormat], run: int) -> int:
    """Return how many shots give `tokens` rows at every site, in whole runs of `run` shots."""
    shots = -(-tokens // min(form.tokens for form in forms))
    return -(-shots // run) * run


def _shots_per_shard(forms: Sequence[ShardFormat], run: int, config: RecordingConfig) -> int:
    """Return the shots of a shard, in whole batches of runs of `run` shots."""
    batch = config.batch * run
    largest = max(form.tokens * form.row_bytes for form in forms)
    return max(config.shard_bytes // largest // batch, 1) * batch


def recorded_bytes(forms: Sequence[ShardFormat], examples: Sequence[Shot], run: int, total: int, config: RecordingConfig) -> int:
    """Return the bytes that new stores of these formats take for `total` shots like `examples`."""
    return store_bytes(forms, _shots_per_shard(forms, run, config), text_bytes(examples), total)


def _write_shards(
    shots: Iterator[Shot], total: int, recorders: Sequence[SiteRecorder], harvest: Harvest, config: RecordingConfig
) -> int:
    """Write the missing shards of this rank and return the number of shards of all ranks."""
    stream, number, count = islice(shots, total), 0, 0
    rows = sum(total * recorder.head.tokens for recorder in recorders) // config.world_size
    try:
        with (
            ProgressBar(total=rows, unit=" tokens", unit_scale=True, desc="harvest", show=config.progress) as bar,
            BackgroundWriter() as writer,
        ):
            while part := list(islice(stream, recorders[0].head.shots_per_shard)):
                if number % config.world_size == config.rank:
                    missing = [recorder for recorder in recorders if not recorder.has(number, part)]
                    bar.update(sum(len(part) * recorder.head.tokens for recorder in recorders if recorder not in missing))
                    if missing and config.max_bytes is not None:
                        writer.wait()  # before that the bytes on disk are not known
                        check_next_shard(recorders, config.max_bytes, part, missing)
                    if missing:
                        _write_shard(number, part, missing, harvest, config, writer, bar)
                number, count = number + 1, count + len(part)
    except BaseException:
        for recorder in recorders:
            recorder.discard_unfinished()
        raise
    if count < total:
        warnings.warn(f"The prompts gave {count} shots, fewer than the {total} to record.", stacklevel=3)
    return number


def _write_shard(
    number: int,
    shots: list[Shot],
    recorders: Sequence[SiteRecorder],
    harvest: Harvest,
    config: RecordingConfig,
    writer: "BackgroundWriter",
    bar: ProgressBar,
) -> None:
    """Write one shard of each site from one call of the harvest; files are written in the background."""
    for shot in shots:
        check_split(shot)
    by_site = {recorder.site: recorder for recorder in recorders}
    shards = {site: recorder.writer(number, len(shots)) for site, recorder in by_site.items()}
    shots_of: dict[Site, list[Shot]] = {site: [] for site in by_site}
    for activations in harvest(shots, list(by_site), config.batch):
        by_site[activations.site].check_shape(activations)
        shots_of[activations.site].extend(activations.shots)
        writer.submit(shards[activations.site].append, HandedOver(activations.values), activations.shots)
        bar.update(activations.values.shape[:2].numel())
    for site, recorder in by_site.items():
        if len(shots_of[site]) != len(shots) or set(shots_of[site]) != set(shots):
            raise BadInput(f"The harvest gave other shots at the site '{site}' than requested. Their shard was discarded.")
        writer.submit(recorder.add, number, shards[site], shots_of[site])


@final
class BackgroundWriter(AbstractContextManager["BackgroundWriter"]):
    """A thread that runs tasks one after the other. After an error it runs no further ones, and the next call raises it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._tasks: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, task: Callable[..., None], *arguments: object) -> None:
        """Run `task` soon. Wait while too many tasks are queued."""
        self.wait(QUEUE)
        self._tasks.append(self._pool.submit(self._run, task, arguments))

    def wait(self, queued: int = 0) -> None:
        """Wait until at most `queued` tasks are left."""
        while len(self._tasks) > queued:
            self._tasks.popleft().result()

    def _run(self, task: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if self._failed:
            return
        try:
            task(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()
