"""Strips: the image of a task's first trial under a method, at rising strengths, as files next to the results."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image

from difflex.effects.judging import SteeringTask, StrengthCurve
from difflex.files import file_sha256, write_file


@final
@dataclass(frozen=True, kw_only=True)
class ImageStrip:
    """The image of the first trial of a task under a method at rising strengths."""

    method: str
    concept: str
    group: str
    prompt: str
    """Of the unedited image."""
    strengths: tuple[float, ...]
    file: str
    """In the folder named like the record: the unedited image, then one for each strength, side by side."""
    sha256: str
    """Of the file."""


def draw_strips(
    task: SteeringTask, curves: Sequence[StrengthCurve], images: Sequence[Image.Image]
) -> Iterator[tuple[ImageStrip, bytes]]:
    """Yield a strip for each of `curves` and its file; `images` are the unedited one, then those of the points in order."""
    unedited, edited = images[0], iter(images[1:])
    for curve in curves:
        content = _side_by_side([unedited, *(next(edited) for _ in curve.points)])
        strip = ImageStrip(
            method=curve.method,
            concept=curve.concept,
            group=curve.group,
            prompt=task.trials[0].prompt,
            strengths=tuple(point.strength for point in curve.points),
            file=f"{curve.group}-{curve.method}.webp",
            sha256=hashlib.sha256(content).hexdigest(),
        )
        yield strip, content


def _side_by_side(tiles: Sequence[Image.Image]) -> bytes:
    """Return a WebP file of `tiles` in a row."""
    width, height = tiles[0].size
    strip, buffer = Image.new("RGB", (width * len(tiles), height)), io.BytesIO()
    for column, tile in enumerate(tiles):
        strip.paste(tile, (column * width, 0))
    strip.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def has_strips(strips: Sequence[ImageStrip], path: Path) -> bool:
    """Return whether the files of `strips`, next to the results in `path`, are as they were written."""
    files = [(path.with_suffix("") / strip.file, strip.sha256) for strip in strips]
    return all(file.is_file() and file_sha256(file) == checksum for file, checksum in files)


def write_strips(strips: Mapping[ImageStrip, bytes], path: Path) -> None:
    """Write the files of `strips` to the folder named like the results in `path`."""
    for strip, content in strips.items():
        write_file(path.with_suffix("") / strip.file, content)


def delete_other_strips(strips: Sequence[ImageStrip], path: Path) -> None:
    """Delete all files of strips next to the results in `path` but those of `strips`."""
    for file in path.with_suffix("").glob("*.webp"):
        if file.name not in {strip.file for strip in strips}:
            file.unlink()
