"""What it costs to collect the examples of features, in time and memory, and how soon a feature's sheet is there.

All times are of one core (process time), so that what else runs does not count. Before each sheet the files of the book are
dropped from the memory of the operating system; what waiting for the disk adds is told by the clock, beside the bar.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

import difflex
from difflex.commands.drawn_world import drawn_images
from difflex.dictionaries import SAE, DictionaryOrigin, Neurons, Normalisation, SAEWeights
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum, sheet
from difflex.features.collecting import CollectBatch, CollectConfig, CollectTarget, collect
from difflex.features.collector import FeatureCollector
from difflex.features.entries import FeatureStats, ImageFile, TokenMap
from difflex.features.firing import BatchImages
from difflex.features.writer import PackedExample
from difflex.records import Activations, Codes, Shot, Site

torch.set_num_threads(1)
COST, PAIRS, MEMORY, SHEET = 1.25, 4e6, 1.5, 0.05
SIZE, K, GRID, BATCH = 65_536, 64, (16, 16), 16
STREAM = 4800
"""Images of the synthetic stream."""
IMAGES = 1000
"""Images that mini-flux is shown: what `difflex collect` takes by default."""


def merged() -> tuple[float, float]:
    """Pairs of token and feature merged in a second, and the gigabytes that this took at most, in this process."""
    generator, tokens = torch.Generator().manual_seed(0), GRID[0] * GRID[1]
    site = Site("double.1", "neurons")

    def codes(_: torch.Tensor) -> Codes:
        """Features that fire at 8 neighbouring tokens, so that maps are maps."""
        features = torch.randint(SIZE, (BATCH, tokens // 8, K), generator=generator, dtype=torch.int32)
        wide = features.repeat_interleave(8, 1).flatten(0, 1).long()
        return Codes(torch.rand(wide.shape, generator=generator) + 0.01, wide)

    given = Neurons(width=SIZE, k=K, origin=DictionaryOrigin(site=site))
    waiting: list[Codes] = []
    given.encode = lambda x: waiting.pop()  # pyright: ignore[reportAttributeAccessIssue]
    shot = Shot(model="none", pixels=(256, 256), steps=1, guidance=0.0, timestep=1000.0)
    seen = Activations(site=site, values=torch.zeros(BATCH, tokens, 1), shots=(shot,) * BATCH, grid=GRID)
    codes(seen.values)
    before, spent = _resident(), 0.0
    gathering = FeatureCollector(given, CollectConfig())
    for first in range(0, STREAM, BATCH):
        waiting.append(codes(seen.values))
        keys = torch.randint(2**62, (BATCH,), generator=generator)
        held_out = torch.rand(BATCH, generator=generator) < 0.1
        began = time.process_time()
        gathering.add([seen], BatchImages(torch.arange(first, first + BATCH)[:, None], keys, held_out, False))
        spent += time.process_time() - began
    began = time.process_time()
    gathering.shots()
    spent += time.process_time() - began
    return STREAM * tokens * K / spent, _resident() - before


def _resident() -> float:
    """The most memory that this process ever held, in gigabytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def costs() -> tuple[float, float, float]:
    """Seconds for each image: to harvest and encode; to collect besides; to write the book in the end."""
    pipe, site = difflex.load("mini-flux"), Site("double.2")
    directions = torch.nn.functional.normalize(torch.randn(2048, 192, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions, bias=torch.zeros(192), encoder_bias=torch.zeros(2048))
    origin, plain = DictionaryOrigin(site=site, model="mini-flux"), Normalisation.identity(192)
    dictionary = SAE(kind="topk", k=32, origin=origin, normalisation=plain, weights=weights)
    scenes = list(drawn_images(IMAGES))
    spent = {"harvest": 0.0, "encode": 0.0}

    def stream(start: int) -> Iterator[CollectBatch]:
        for first in range(start, IMAGES, 32):
            group = scenes[first : first + 32]
            images, prompts = [each.image for each in group], [each.prompt for each in group]
            names = [each.name for each in group]
            began = time.process_time()
            seen = list(pipe.harvest_images(images, 0.25, site, prompts, names, seed=first, batch=32, progress=False))
            spent["harvest"] += time.process_time() - began
            yield CollectBatch(images, seen)

    encode = dictionary.encode

    def timed(x: torch.Tensor) -> Codes:
        began = time.process_time()
        codes = encode(x)
        spent["encode"] += time.process_time() - began
        return codes

    dictionary.encode = timed  # pyright: ignore[reportAttributeAccessIssue]
    written = 0.0

    def flow(start: int) -> Iterator[CollectBatch]:
        nonlocal written
        yield from stream(start)
        written = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        given = CollectTarget(dictionary=dictionary, name="double.2/topk", fingerprint="", book=Path(folder) / "book.sqlite")
        began = time.process_time()
        collect([given], flow, ImageAlbum(Path(folder) / "images"), data="", checkpoint=Path(folder) / "state", progress=False)
        ended = time.process_time()
    base = spent["harvest"] + spent["encode"]
    return base / IMAGES, (written - began - base) / IMAGES, (ended - written) / IMAGES


def large_book(folder: Path) -> Book:
    """A book of 65,536 features with 56 examples each, and images of 256 pixels."""
    album = ImageAlbum(folder / "images")
    noise = torch.randint(256, (64, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(each.numpy()).resize((256, 256)) for each in noise]
    filed = [ImageFile(number, *album.add(image)[0]) for number, image in enumerate(images)]
    about = BookInfo(
        dictionary="double.18/topk-65536-k64",
        kind="topk",
        size=SIZE,
        k=K,
        fingerprint="",
        model="none",
        data="",
        grid=GRID,
        tokens=10**6,
        shots={"train": 64, "held-out": 0},
        images=64,
    )
    blob = TokenMap(tuple(range(40, 56)), tuple(1.0 - i / 20 for i in range(16))).packed()
    shot = Shot(model="none", prompt="noise", pixels=(256, 256), steps=1, guidance=0.0, timestep=1000.0)

    def examples() -> Iterator[PackedExample]:
        for feature in range(SIZE):
            for rank in range(32):
                yield PackedExample(feature, "top", "train", rank, (feature + rank) % 64, 1.0, None, blob)
            for rank in range(16):
                yield PackedExample(feature, "quantile", "train", rank, (feature + 40 + rank) % 64, 1.0, 0.5, blob)
            for rank in range(8):
                yield PackedExample(feature, "silent", "train", rank, rank, 0.0, None, b"")

    with BookWriter.open(folder / "book.sqlite", about) as writer:
        writer.add_images(filed)
        writer.add_shots((number, number, shot) for number in range(64))
        writer.add_features(
            FeatureStats(feature=feature, firings=16, shots=32, density=1e-3, peak=1.0, mean=0.5) for feature in range(SIZE)
        )
        writer.add_examples(examples())
    return Book.open(folder / "book.sqlite")


def sheets() -> tuple[float, float]:
    """Seconds of work, and by the clock, until a feature's sheet is drawn, from a book that nobody has read yet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large_book(folder).close()
        took = []
        for feature in range(0, SIZE, SIZE // 21):
            for path in (folder / "book.sqlite", *(folder / "images").iterdir()):
                _forget(path)
            began, clock = time.process_time(), time.perf_counter()
            with Book.open(folder / "book.sqlite") as book:
                sheet(book, ImageAlbum(folder / "images"), feature)
            took.append((time.process_time() - began, time.perf_counter() - clock))
        worked, waited = (statistics.median(each) for each in zip(*took, strict=True))
        return worked, waited


def _forget(path: Path) -> None:
    """Nothing; the operating system reads the file from the disk the next time."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def main() -> int:
    """0 if every bar is met."""
    if sys.argv[1:] == ["merge"]:
        print(*merged())
        return 0
    alone = subprocess.run([sys.executable, __file__, "merge"], capture_output=True, text=True, check=True)
    pairs, memory = map(float, alone.stdout.split())
    print(f"  merging at size {SIZE:,}: {pairs / 1e6:.1f} M pairs/s (bar {PAIRS / 1e6:.0f})", flush=True)
    print(f"  memory for {STREAM:,} images, 32 of each split kept: {memory:.2f} GB (bar {MEMORY} GB)", flush=True)
    base, more, write = costs()
    cost = (base + more + write) / base
    print(f"  mini-flux, size 2,048: harvest and encode {base * 1e3:.2f} ms an image, collecting {more * 1e3:.2f} ms more")
    print(f"  writing the book: {write * IMAGES:.1f} s for all, {write * 1e3:.2f} ms an image of {IMAGES:,}", flush=True)
    drawn, clock = sheets()
    told = f"{drawn * 1e3:.0f} ms (bar {SHEET * 1e3:.0f} ms), {clock * 1e3:.0f} ms by the clock"
    print(f"  a sheet from a book of {SIZE:,} features: {told}", flush=True)
    met = pairs >= PAIRS and memory <= MEMORY and cost <= COST and drawn <= SHEET
    told = f"{cost - 1:.0%} over harvest and encoding (bar {COST - 1:.0%}), {pairs / 1e6:.1f} M pairs/s, {memory:.2f} GB"
    print(f"collect: {told}, a sheet in {drawn * 1e3:.0f} ms: {'met' if met else 'MISSED'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
