"""What collecting examples of features costs on top of generating the images and harvesting them."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import difflex
from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights
from difflex.features import ImageAlbum
from difflex.features.collecting import CollectBatch, CollectTarget, collect
from difflex.records import Site
from gpu_parts import Bar, PartResult, wait

OVERHEAD = 0.25
"""Of the time to generate and harvest."""
FLUX = ("black-forest-labs/FLUX.1-schnell", 0, "double.18", 256, 3072, 65_536, 64, 128, 32)
TINY = ("mini-flux", None, "double.2", 64, 192, 512, 8, 8, 4)


class _PassEnded(Exception):
    """All images have been collected: the book is not written."""


def random_sae(site: Site, width: int, size: int, k: int, device: torch.device) -> SAE:
    """Return an SAE with random weights."""
    rows = torch.nn.functional.normalize(torch.randn(size, width, device=device), dim=1)
    bias, encoder_bias = torch.zeros(width, device=device), torch.zeros(size, device=device)
    weights = SAEWeights(encoder=rows, decoder=rows, bias=bias, encoder_bias=encoder_bias)
    normalisation = Normalisation.identity(width, device)
    return SAE(kind="topk", k=k, origin=DictionaryOrigin(site=site), normalisation=normalisation, weights=weights)


def examples(device: torch.device) -> PartResult:
    """Return the seconds of the same images with and without collecting; the book itself is written once a pass and left out."""
    on_gpu = device.type == "cuda"
    model, untrained, name, pixels, width, size, k, images, batch = FLUX if on_gpu else TINY
    pipe, site = difflex.load(model, precision="bf16" if on_gpu else None, device=device, untrained=untrained), Site.parse(name)
    dictionary = random_sae(site, width, size, k, device)
    prompts = [f"image number {number}" for number in range(images + batch)]
    shots = list(pipe.shots(prompts, steps=1, pixels=(pixels, pixels), guidance=0.0))
    harvest = lambda part: pipe.harvest_with_images(part, [site], batch)  # noqa: E731
    seconds = {"generate and harvest": 0.0, "collect": 0.0}

    def source(start: int) -> Iterator[CollectBatch]:
        """Yield the batches and time them; the first one, which warms everything up, is not counted."""
        batches, ready = harvest(shots[start:]), 0.0
        while True:
            wait(device)
            asked = time.perf_counter()
            found = next(batches, None)
            wait(device)
            if ready:
                seconds["collect"] += asked - ready
                seconds["generate and harvest"] += time.perf_counter() - asked
            ready = time.perf_counter()
            if found is None:
                raise _PassEnded
            yield CollectBatch(*found)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        target = CollectTarget(dictionary=dictionary, name=f"{name}/topk", fingerprint="", book=path / "book.sqlite")
        album = ImageAlbum(path / "images")
        with suppress(_PassEnded):
            collect([target], source, album, data="", checkpoint=path / "state", progress=False, device=device)
    overhead = seconds["collect"] / seconds["generate and harvest"]
    result = PartResult(
        f"Collecting examples at {name} of {model}, {pixels} pixels, 1 step, batch {batch}, size {size:,}, k {k}:",
        ("images", *(f"{part}, s" for part in seconds), "overhead"),
    )
    result.add(images, *(f"{value:.2f}" for value in seconds.values()), f"{overhead:.0%}")
    if on_gpu:
        result.bars.append(Bar("overhead of collecting over the harvest", overhead, OVERHEAD))
    return result


PARTS = {"collect": examples}
