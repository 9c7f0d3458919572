"""What a recording will hold, and whether it can: asked of the shots, the stores at hand, the limit and the disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from difflex.errors import BadInput, StaleWork
from difflex.records import Activations, Shot, Site
from difflex.store.ledger import SiteRecorder
from difflex.store.room import DiskBudget, said_size, store_bytes, text_bytes
from difflex.store.shard import ShardFormat, Stored

__all__ = ["Harvest", "RecordingConfig", "RecordingPlan", "distinct", "plan", "probe", "recorded_bytes", "shots_for"]


Harvest = Callable[[Sequence[Shot], Sequence[Site], int], Iterable[Activations]]
"""What makes activations: `Pipeline.harvest`, or anything that is called like it, with shots, sites and a number of runs at once.

It gives each shot once at each site, in any order that is always the same.
"""


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How activations are stored."""

    dtype: Stored = "bf16"
    """int8 has a scale for each row: half the size, and exact to 1/254 of the row's largest entry."""
    tokens: int | None = None
    """Rows wanted at each site, rounded up to whole runs; None for all shots."""
    batch: int = 16
    """Runs that the model makes at once."""
    shard_bytes: int = 2**28
    """Of the largest site's shards, rounded to whole batches. A store that is gone on with keeps its own."""
    limit: int | None = None
    """Bytes that all files of all sites together may take; asked before anything is written, and again before each shard."""
    source: str = ""
    """What the shots are made from, such as the checksum of a file of prompts: to go on with another one is an error."""
    rank: int = 0
    """Which of `of` processes this is: each makes its share of the shards, the last one to end completes the store."""
    of: int = 1
    progress: bool = True


class RecordingPlan(NamedTuple):
    """What will be recorded."""

    shots: Iterator[Shot]
    """More than are wanted, perhaps endlessly many."""
    total: int
    """How many of them are wanted; there may be fewer."""
    shots_per_shard: int
    room: DiskBudget

    def said(self, ledgers: Sequence[SiteRecorder]) -> str:
        """The plan in words: what each site will take on disk."""
        shards = -(-self.total // self.shots_per_shard)
        files = f"{shards} shard{'s' * (shards > 1)}"
        rows = [self.total * ledger.head.tokens for ledger in ledgers]
        return "\n".join(
            f"{ledger.site}: {count:,} rows of width {ledger.head.width} in {ledger.head.dtype}, "
            f"{said_size(count * ledger.head.form.row_bytes)} in {files}; {ledger.rows:,} rows are there"
            for ledger, count in zip(ledgers, rows, strict=True)
        )


def plan(ledgers: Sequence[SiteRecorder], shots: Iterable[Shot], harvest: Harvest, settings: RecordingConfig) -> RecordingPlan:
    """The plan; the ledgers are begun where they were not, and nothing is written."""
    shots = distinct(shots)
    if settings.tokens is None:
        shots = list(shots)
    elif settings.tokens < 1:
        raise BadInput(f"{settings.tokens} tokens cannot be recorded. Ask for 1 or more.")
    stream = iter(shots)
    first, rest = _first_run(stream)
    begun = [ledger for ledger in ledgers if ledger.begun]
    for ledger in begun:
        ledger.check(first[0], settings.dtype, settings.batch, settings.source)
    if len({ledger.head.shots_per_shard for ledger in begun}) > 1:
        raise StaleWork("These sites were begun with shards of different lengths. Go on with them one by one.")
    if len(begun) < len(ledgers):
        _begin(ledgers, first, harvest, settings)
    if isinstance(shots, list):
        total = len(shots)
    else:
        total = shots_for(settings.tokens or 0, [ledger.head.form for ledger in ledgers], len(first))
    room = DiskBudget(ledgers, settings.limit)
    room.check(total, first, shots if isinstance(shots, list) else first)
    return RecordingPlan(chain(first, rest), total, ledgers[0].head.shots_per_shard, room)


def distinct(shots: Iterable[Shot]) -> Iterator[Shot]:
    """`shots` without those that repeat one of the same run: a prompt twice in a row says nothing new the second time."""
    run, seen = None, set[float | None]()
    for shot in shots:
        here = replace(shot, timestep=None)
        if here != run:
            run, seen = here, set()
        if shot.timestep not in seen:
            seen.add(shot.timestep)
            yield shot


def _first_run(stream: Iterator[Shot]) -> tuple[list[Shot], Iterator[Shot]]:
    """The shots of the first run, which differ in their timestep alone, and all others."""
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
    """What one shot shows at each site: the shape of all that is to come."""
    seen = {activations.site: activations for activations in harvest([shot], sites, 1)}
    for site in sites:
        if site not in seen:
            raise BadInput(f"The harvest gave nothing at the site '{site}'. It gave: {', '.join(map(str, seen)) or 'nothing'}.")
        if len(seen[site].shots) != 1 or len(seen[site].values) != 1:
            raise BadInput("The harvest gave several shots where one was asked. Give shots that say their timestep.")
    return seen


def _begin(ledgers: Sequence[SiteRecorder], run: Sequence[Shot], harvest: Harvest, settings: RecordingConfig) -> None:
    """Decide the heads that are not decided yet; all sites share the length of their shards, so that they share passes."""
    seen = probe(run[0], [ledger.site for ledger in ledgers if not ledger.begun], harvest)
    forms = {site: ShardFormat(site, settings.dtype, *activations.values.shape[1:]) for site, activations in seen.items()}
    kept = [ledger.head.shots_per_shard for ledger in ledgers if ledger.begun]
    length = kept[0] if kept else shard_length([*forms.values()], len(run), settings)
    for ledger in ledgers:
        if not ledger.begun:
            ledger.begin(forms[ledger.site], run[0], seen[ledger.site].grid, length, settings.batch, settings.source)


def shots_for(tokens: int, forms: Sequence[ShardFormat], run: int) -> int:
    """How many shots give so many rows at every site, in whole runs of `run` shots."""
    wanted = -(-tokens // min(form.tokens for form in forms))
    return -(-wanted // run) * run


def shard_length(forms: Sequence[ShardFormat], run: int, settings: RecordingConfig) -> int:
    """How many shots go into a shard, where runs have `run` of them: whole batches."""
    together = settings.batch * run
    largest = max(form.tokens * form.row_bytes for form in forms)
    return max(settings.shard_bytes // largest // together, 1) * together


def recorded_bytes(forms: Sequence[ShardFormat], known: Sequence[Shot], run: int, total: int, settings: RecordingConfig) -> int:
    """Bytes of stores that are not begun yet, of these forms and of `total` shots like those `known`."""
    length = shard_length(forms, run, settings)
    return sum(store_bytes(form, length, total, text_bytes(known)) for form in forms)
