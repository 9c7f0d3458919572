"""The drawn world: its concepts, and the scene of each seed.

A scene depends on its seed alone, not on its batch: every choice is a hash of (seed, number of the choice).
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.errors import BadInput

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered", "shiny")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("paper", "slate", "sky", "grass", "sand", "brick", "night", "wood")
STYLES = ("flat", "cartoon", "watercolor", "pixelated")
COUNTS = ("one", "two", "three")

CONCEPTS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "row": ROWS,
    "column": COLUMNS,
    "background": BACKGROUNDS,
    "style": STYLES,
    "count": COUNTS,
}
"""Concept group -> its concepts; the first six belong to objects, the others to the image."""

OBJECT_GROUPS = ("shape", "colour", "texture", "size", "row", "column")
PIXELS = 64
SLOTS = 3
HELD_OUT_SEEDS = 1 << 40
"""Training never uses seeds from this one on."""

RADII = ((9.4, 9.9), (13.8, 14.6))
"""The smallest and largest radius of small and of large objects, in pixels."""
JITTER = 1.0
GAP = 4.0
"""Pixels between two objects, before jitter."""


@dataclass(frozen=True)
class SceneSpecs:
    """The content of scenes, as indices into the concept tuples; a row per scene, a column per object slot."""

    seed: Int[Tensor, " scene"]
    count: Int[Tensor, " scene"]
    """The number of objects, 1 to 3; slots from `count` on are empty."""
    background: Int[Tensor, " scene"]
    style: Int[Tensor, " scene"]
    shape: Int[Tensor, "scene slot"]
    colour: Int[Tensor, "scene slot"]
    texture: Int[Tensor, "scene slot"]
    size: Int[Tensor, "scene slot"]
    row: Int[Tensor, "scene slot"]
    column: Int[Tensor, "scene slot"]
    radius: Float[Tensor, "scene slot"]
    """In pixels."""
    centre: Float[Tensor, "scene slot 2"]
    """x and y in pixels."""
    phase: Float[Tensor, "scene 8"]
    """Eight numbers in [0, 1) for background patterns and other details."""


class SceneMix(NamedTuple):
    """The shares of kinds of scenes."""

    single: float = 1 / 3
    """One object."""
    different: float = 1 / 3
    """Two objects that differ in shape and colour."""
    copies: float = 1 / 3
    """Two or three equal objects."""


def uniform(seeds: Int[Tensor, " scene"], draws: int, stream: int = 0) -> Float[Tensor, "scene draws"]:
    """Return numbers in [0, 1) that depend on (seed, stream, position) alone: splitmix64, on any device."""
    counter = torch.arange(1, draws + 1, device=seeds.device) + stream * 4096
    x = _signed(0x9E3779B97F4A7C15) * (seeds[:, None] + 1) + _signed(0xD1B54A32D192ED03) * counter
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x2545F4914F6CDD1D)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return (_shift_right(x ^ _shift_right(x, 32), 40).double() * 2.0**-24).float()


def scenes(seeds: Int[Tensor, " scene"], mix: SceneMix = SceneMix(), held_out: bool = False) -> SceneSpecs:  # noqa: B008 (a constant)
    """Choose the scenes of these seeds; with `held_out`, all objects are (shape, colour, texture) that training never shows."""
    u = uniform(seeds, 32)
    kind = torch.bucketize(u[:, 0] * sum(mix), torch.tensor([mix.single, mix.single + mix.different], device=u.device))
    copies = kind == 2
    count = torch.where(copies, 2 + _pick(u[:, 1], 2), 1 + (kind == 1).long())
    shape, colour = _all_different(_pick(u[:, 2:5], 8), 8, u[:, 5:7]), _all_different(_pick(u[:, 7:10], 10), 10, u[:, 10:12])
    texture, size = _pick(u[:, 12:15], len(TEXTURES)), _pick(u[:, 15:18], len(SIZES))
    if held_out:
        colour, texture = _only_held_out(shape, texture)
    else:
        texture = torch.where(held_out_combination(shape, colour, texture), (texture + 1) % len(TEXTURES), texture)
    shape, colour, texture, size = (torch.where(copies[:, None], x[:, :1], x) for x in (shape, colour, texture, size))
    cells = _cells(count, size, u[:, 18])
    low, high = torch.tensor(RADII, device=u.device).unbind(1)
    radius = low[size] + u[:, 19:20] * (high - low)[size]
    row, column = cells // 3, cells % 3
    offset = torch.stack([column - 1, row - 1], dim=-1) * _offset(size)[..., None]
    jitter = (uniform(seeds, 2 * SLOTS, stream=1).view(-1, SLOTS, 2) * 2 - 1) * JITTER
    return SceneSpecs(
        seed=seeds,
        count=count,
        background=_pick(u[:, 20], len(BACKGROUNDS)),
        style=_pick(u[:, 21], len(STYLES)),
        shape=shape,
        colour=colour,
        texture=texture,
        size=size,
        row=row,
        column=column,
        radius=radius,
        centre=PIXELS / 2 + offset + jitter,
        phase=u[:, 22:30],
    )


def held_out_combination(shape: Tensor, colour: Tensor, texture: Tensor) -> Tensor:
    """Return whether a combination is one of the 40 of 400 that training never shows: one colour per shape and texture."""
    return (shape + 3 * colour + 4 * texture) % len(COLOURS) == 0


def _only_held_out(shape: Tensor, texture: Tensor) -> tuple[Tensor, Tensor]:
    """Return held-out colours and textures for these shapes, with different colours in the first two slots."""
    colour_of = lambda t: (-(shape + 4 * t) * 7) % len(COLOURS)  # noqa: E731 (7 is the inverse of 3 modulo 10)
    colour = colour_of(texture)
    clash = (colour == colour[:, :1]) & (torch.arange(SLOTS, device=shape.device) > 0)
    texture = torch.where(clash, (texture + 1) % len(TEXTURES), texture)
    return colour_of(texture), texture


def _all_different(first: Tensor, of: int, u: Tensor) -> Tensor:
    """Choose three values, the second unlike the first, the third unlike the second."""
    second = (first[:, 0] + 1 + _pick(u[:, 0], of - 1)) % of
    third = (second + 1 + _pick(u[:, 1], of - 1)) % of
    return torch.stack([first[:, 0], second, third], dim=1)


def _offset(size: Tensor) -> Tensor:
    """Return the distance of the outer cells' centres from the centre, in pixels: smaller for large objects."""
    return torch.tensor([20.0, 17.0], device=size.device)[size]


def _cells(count: Tensor, size: Tensor, u: Tensor) -> Tensor:
    """Choose a cell 0..8 for every slot, so that objects do not touch."""
    table, lengths = _placements()
    key = (count - 1) * 8 + size[:, 0] + 2 * size[:, 1] + 4 * size[:, 2]
    return table.to(u.device)[key, (u * lengths.to(u.device)[key]).long()]


@cache
def _placements() -> tuple[Tensor, Tensor]:
    """Return for every (count, sizes) the allowed cells of the slots, padded, and their number."""
    lists = []
    for count in (1, 2, 3):
        for code in range(8):
            sizes = torch.tensor([code & 1, code >> 1 & 1, code >> 2 & 1])
            lists.append([cells for cells in permutations(range(9), SLOTS) if _separate(cells[:count], sizes)])
    longest = max(map(len, lists))
    table = torch.tensor([(rows * longest)[:longest] for rows in lists])
    return table, torch.tensor([float(len(rows)) for rows in lists])


def _separate(cells: tuple[int, ...], sizes: Tensor) -> bool:
    offset, reach = _offset(sizes), torch.tensor([high for _, high in RADII])[sizes]
    centres = torch.tensor([[c % 3 - 1, c // 3 - 1] for c in cells]) * offset[: len(cells), None]
    return all((centres[i] - centres[j]).norm() >= reach[i] + reach[j] + GAP for i in range(len(cells)) for j in range(i))


def _pick(u: Tensor, of: int) -> Tensor:
    return (u * of).long().clamp_(max=of - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def check_drawn_pixels(pixels: tuple[int, int]) -> None:
    """Raise an error unless scenes can be drawn at this size."""
    if pixels[0] != pixels[1] or pixels[0] < PIXELS or pixels[0] % PIXELS:
        raise BadInput(
            f"The drawn world has no images of {pixels[0]} x {pixels[1]} pixels: they are square, of a multiple of {PIXELS}. "
            f"Name such a size, as {max(1, round(min(pixels) / PIXELS)) * PIXELS}, or images of your own in a folder."
        )
