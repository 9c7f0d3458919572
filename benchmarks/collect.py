"""Time and memory of collecting examples of features, and the time to draw a feature's sheet.

Times are process times of one core. Before each sheet the files of the book are dropped from the page cache; the wall time, which
includes waiting for the disk, is printed as well.
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
from difflex.dictionaries import SAE, DictionaryOrigin, Neurons, Normalisation, SAEWeights
from difflex.evaluation.concepts import drawn_images
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum, sheet
from difflex.features.collecting import CollectBatch, CollectConfig, CollectTarget, collect
from difflex.features.collector import FeatureCollector
from difflex.features.entries import FeatureStats, ImageFile, TokenMap
from difflex.features.firing import BatchImages
from difflex.features.writing import PackedExample
from difflex.records import Activations, Codes, Shot, Site

torch.set_num_threads(1)
COST, PAIRS, MEMORY, SHEET = 1.25, 4e6, 1.5, 0.05
SIZE, K, GRID, BATCH = 65_536, 64, (16, 16), 16
STREAM = 4800
"""Images of the synthetic stream."""
IMAGES = 1000
"""Images for mini-flux, as many as `difflex collect` uses by default."""


def measure_merging() -> tuple[float, float]:
    """Return the firing pairs merged per second and the memory used for it, in gigabytes, in this process."""
    generator, tokens = torch.Generator().manual_seed(0), GRID[0] * GRID[1]
    site = Site("double.1", "neurons")

    def codes(_: torch.Tensor) -> Codes:
        """Return codes of features that fire at 8 adjacent tokens each."""
        features = torch.randint(SIZE, (BATCH, tokens // 8, K), generator=generator, dtype=torch.int32)
        wide = features.repeat_interleave(8, 1).flatten(0, 1).long()
        return Codes(torch.rand(wide.shape, generator=generator) + 0.01, wide)

    dictionary = Neurons(width=SIZE, k=K, origin=DictionaryOrigin(site=site))
    pending: list[Codes] = []
    dictionary.encode = lambda x: pending.pop()  # pyright: ignore[reportAttributeAccessIssue]
    shot = Shot(model="none", pixels=(256, 256), steps=1, guidance=0.0, timestep=1000.0)
    activations = Activations(site=site, values=torch.zeros(BATCH, tokens, 1), shots=(shot,) * BATCH, grid=GRID)
    codes(activations.values)
    memory, seconds = _peak_memory(), 0.0
    collector = FeatureCollector(dictionary, CollectConfig())
    for first in range(0, STREAM, BATCH):
        pending.append(codes(activations.values))
        keys = torch.randint(2**62, (BATCH,), generator=generator)
        held_out = torch.rand(BATCH, generator=generator) < 0.1
        start = time.process_time()
        collector.add([activations], BatchImages(torch.arange(first, first + BATCH)[:, None], keys, held_out))
        seconds += time.process_time() - start
    start = time.process_time()
    collector.shots()
    seconds += time.process_time() - start
    return STREAM * tokens * K / seconds, _peak_memory() - memory


def _peak_memory() -> float:
    """Return the peak memory of this process, in gigabytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure_pass() -> tuple[float, float, float]:
    """Return the seconds per image to harvest and encode, to collect, and to write the book."""
    pipe, site = difflex.load("mini-flux"), Site("double.2")
    directions = torch.nn.functional.normalize(torch.randn(2048, 192, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions, bias=torch.zeros(192), encoder_bias=torch.zeros(2048))
    origin, normalisation = DictionaryOrigin(site=site, model="mini-flux"), Normalisation.identity(192)
    dictionary = SAE(kind="topk", k=32, origin=origin, normalisation=normalisation, weights=weights)
    scenes = list(drawn_images(IMAGES))
    seconds = {"harvest": 0.0, "encode": 0.0}

    def batches(start: int) -> Iterator[CollectBatch]:
        for first in range(start, IMAGES, 32):
            group = scenes[first : first + 32]
            images, prompts = [scene.image for scene in group], [scene.prompt for scene in group]
            names = [scene.name for scene in group]
            begin = time.process_time()
            activations = list(pipe.harvest_images(images, 0.25, site, prompts, names, seed=first, batch=32, progress=False))
            seconds["harvest"] += time.process_time() - begin
            yield CollectBatch(images, activations)

    encode = dictionary.encode

    def timed_encode(x: torch.Tensor) -> Codes:
        begin = time.process_time()
        codes = encode(x)
        seconds["encode"] += time.process_time() - begin
        return codes

    dictionary.encode = timed_encode  # pyright: ignore[reportAttributeAccessIssue]
    collected = 0.0

    def source(start: int) -> Iterator[CollectBatch]:
        nonlocal collected
        yield from batches(start)
        collected = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        target = CollectTarget(dictionary=dictionary, name="double.2/topk", fingerprint="", book=Path(folder) / "book.sqlite")
        start = time.process_time()
        collect([target], source, ImageAlbum(Path(folder) / "images"), data="", checkpoint=Path(folder) / "state", progress=False)
        end = time.process_time()
    base = seconds["harvest"] + seconds["encode"]
    return base / IMAGES, (collected - start - base) / IMAGES, (end - collected) / IMAGES


def large_book(folder: Path) -> Book:
    """Write a book of 65,536 features with 56 examples each and images of 256 x 256 pixels."""
    album = ImageAlbum(folder / "images")
    noise = torch.randint(256, (64, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(each.numpy()).resize((256, 256)) for each in noise]
    files = [ImageFile(number, *album.add(image)[0]) for number, image in enumerate(images)]
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
        writer.add_images(files)
        writer.add_shots((number, number, shot) for number in range(64))
        writer.add_features(
            FeatureStats(feature=feature, firings=16, shots=32, density=1e-3, peak=1.0, mean=0.5) for feature in range(SIZE)
        )
        writer.add_examples(examples())
    return Book.open(folder / "book.sqlite")


def measure_sheets() -> tuple[float, float]:
    """Return the median process time and wall time to draw a feature's sheet from a book that is not in the page cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large_book(folder).close()
        times = []
        for feature in range(0, SIZE, SIZE // 21):
            for path in (folder / "book.sqlite", *(folder / "images").iterdir()):
                _drop_from_cache(path)
            start, clock = time.process_time(), time.perf_counter()
            with Book.open(folder / "book.sqlite") as book:
                sheet(book, ImageAlbum(folder / "images"), feature)
            times.append((time.process_time() - start, time.perf_counter() - clock))
        process, wall = (statistics.median(column) for column in zip(*times, strict=True))
        return process, wall


def _drop_from_cache(path: Path) -> None:
    """Make the operating system read the file from the disk the next time."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def main() -> int:
    """Print the measurements; return 0 if all of them are within the limits."""
    if sys.argv[1:] == ["merge"]:
        print(*measure_merging())
        return 0
    process = subprocess.run([sys.executable, __file__, "merge"], capture_output=True, text=True, check=True)
    pairs, memory = map(float, process.stdout.split())
    print(f"  merging at size {SIZE:,}: {pairs / 1e6:.1f} M pairs/s (limit {PAIRS / 1e6:.0f})", flush=True)
    print(f"  memory for {STREAM:,} images, 32 examples per split: {memory:.2f} GB (limit {MEMORY} GB)", flush=True)
    base, more, write = measure_pass()
    cost = (base + more + write) / base
    print(f"  mini-flux, size 2,048: harvest and encode {base * 1e3:.2f} ms an image, collecting {more * 1e3:.2f} ms more")
    print(f"  writing the book: {write * IMAGES:.1f} s for all, {write * 1e3:.2f} ms an image of {IMAGES:,}", flush=True)
    drawn, clock = measure_sheets()
    times = f"{drawn * 1e3:.0f} ms (limit {SHEET * 1e3:.0f} ms), {clock * 1e3:.0f} ms of wall time"
    print(f"  a sheet from a book of {SIZE:,} features: {times}", flush=True)
    met = pairs >= PAIRS and memory <= MEMORY and cost <= COST and drawn <= SHEET
    costs = f"{cost - 1:.0%} over harvest and encoding (limit {COST - 1:.0%}), {pairs / 1e6:.1f} M pairs/s, {memory:.2f} GB"
    print(f"collect: {costs}, a sheet in {drawn * 1e3:.0f} ms: {'met' if met else 'MISSED'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
