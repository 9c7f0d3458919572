"""`record`: activations from a harvest, of several sites at once, written as stores that a kill at any moment cannot hurt."""

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple, final

from tqdm import tqdm

from difflex.errors import BadInput
from difflex.files import folder_lock
from difflex.records import Shot, Site
from difflex.store.ledger import SiteRecorder
from difflex.store.manifest import check_dtype, check_split, found_shards
from difflex.store.planning import Harvest, RecordingConfig, RecordingPlan, plan
from difflex.store.shard import ShardWriter, pack
from difflex.store.store import Store

__all__ = ["record"]

AHEAD = 2
"""Batches that the model may be ahead of the disk."""


def record(
    folder: Path | str,
    shots: Iterable[Shot],
    sites: Iterable[Site | str] | Site | str,
    harvest: Harvest,
    settings: RecordingConfig | None = None,
    accepted: Callable[[], None] = lambda: None,
) -> list[Store]:
    """The stores of `sites`, each in its own folder under `folder`; what is already there is kept and gone on with.

    Which rows a shard holds depends on the order of `shots` and on the settings alone: a killed and resumed recording, or one
    shared by several processes, gives the same files as an undisturbed one. `accepted` is called when it is clear that there is
    room for it, before anything is written.
    """
    settings, folder = settings or RecordingConfig(), Path(folder)
    places = {site: folder / site.folder for site in _parsed(sites)}
    _check(places, settings)
    with ExitStack() as stack:
        there = [place for place in places.values() if place.exists()]
        for place in there:
            _claim(stack, place, settings)
        ledgers = [SiteRecorder(place, site, settings.rank, settings.of) for site, place in places.items()]
        what = plan(ledgers, shots, harvest, settings)
        accepted()
        for ledger in ledgers:
            if ledger.folder not in there:
                _claim(stack, ledger.folder, settings, new=True)
            ledger.open()
        if settings.progress:
            tqdm.write(what.said(ledgers))
        shards = _carry_out(what, ledgers, harvest, settings)
        for ledger in ledgers:
            ledger.finish(shards)
    return [Store.open(ledger.folder) for ledger in ledgers]


def _parsed(sites: Iterable[Site | str] | Site | str) -> list[Site]:
    several = [sites] if isinstance(sites, (Site, str)) else sites
    return [Site.parse(site) if isinstance(site, str) else site for site in several]


def _check(sites: Collection[Site], settings: RecordingConfig) -> None:
    check_dtype(settings.dtype)
    if not sites:
        raise BadInput("No site was named to record. Name at least one.")
    if settings.batch < 1:
        raise BadInput(f"Batches of {settings.batch} runs are not possible. Ask for 1 or more.")
    if not 0 <= settings.rank < settings.of:
        raise BadInput(f"Rank {settings.rank} of {settings.of} does not exist. Ranks count from 0 to {settings.of - 1}.")


def _claim(stack: ExitStack, folder: Path, settings: RecordingConfig, new: bool = False) -> None:
    """Nothing; until the stack is left, `folder` is there and only processes of this recording write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"The folder {folder} cannot be made: {error}. Name another one, or move away what is there.") from error
    stack.enter_context(folder_lock(folder, shared=settings.of > 1))
    if new and settings.of == 1 and found_shards(folder):
        raise BadInput(f"Another process has written in {folder} meanwhile. Give the same command again to go on from there.")


def _carry_out(what: RecordingPlan, ledgers: Sequence[SiteRecorder], harvest: Harvest, settings: RecordingConfig) -> int:
    """How many shards there are when all are done; this rank's are made where they are missing."""
    stream, number, given = islice(what.shots, what.total), 0, 0
    rows = sum(what.total * ledger.head.tokens for ledger in ledgers) // settings.of
    silent = None if settings.progress else True
    try:
        with (
            tqdm(total=rows, unit=" tokens", unit_scale=True, desc="harvest", disable=silent) as bar,
            BackgroundWriter() as saver,
        ):
            while unit := list(islice(stream, what.shots_per_shard)):
                if number % settings.of == settings.rank:
                    missing = [ledger for ledger in ledgers if not ledger.has(number, unit)]
                    bar.update(sum(len(unit) * ledger.head.tokens for ledger in ledgers if ledger not in missing))
                    if missing:
                        if settings.limit is not None:
                            saver.wait()  # until then what is on disk is not known
                            what.room.check_shard(unit, missing)
                        _make(number, unit, missing, harvest, settings, saver, bar)
                number, given = number + 1, given + len(unit)
    except BaseException:
        for ledger in ledgers:
            ledger.abandon()
        raise
    if given < what.total:
        warnings.warn(f"The prompts gave {given} shots where {what.total} were wanted: fewer tokens are stored.", stacklevel=3)
    return number


class OpenShard(NamedTuple):
    """A shard of one site while its rows arrive."""

    ledger: SiteRecorder
    writer: ShardWriter
    shots: list[Shot]


def _make(
    number: int,
    unit: list[Shot],
    ledgers: Sequence[SiteRecorder],
    harvest: Harvest,
    settings: RecordingConfig,
    saver: "BackgroundWriter",
    bar: tqdm,
) -> None:
    """One shard of each site, from one call of the harvest; it is written behind the model's back."""
    for shot in unit:
        check_split(shot)
    making = {ledger.site: OpenShard(ledger, ledger.writer(number, len(unit)), []) for ledger in ledgers}
    for activations in harvest(unit, list(making), settings.batch):
        here = making[activations.site]
        here.ledger.fits(activations)
        packed = pack(activations.values, settings.dtype).cpu()
        here.shots.extend(activations.shots)
        saver.later(here.writer.append, packed, activations.shots)
        bar.update(activations.values.shape[:2].numel())
    for site, here in making.items():
        if len(here.shots) != len(unit) or set(here.shots) != set(unit):
            raise BadInput(f"The harvest gave other shots at the site '{site}' than were asked. Their shard was not kept.")
        saver.later(here.ledger.enter, number, here.writer, here.shots)


@final
class BackgroundWriter:
    """A thread that does one thing after the other; after a failure it does nothing more, and says so at the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def later(self, work: Callable[..., None], *arguments: object) -> None:
        """Nothing; `work` is done soon. Waits while too much is left to do."""
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, work, arguments))

    def wait(self) -> None:
        """Nothing; all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def _do(self, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if self._failed:
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        while self._waiting and kind is None:
            self._waiting.popleft().result()
