"""Drawing: images of scenes from analytic distances, with the concepts of every pixel."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difflex.errors import UnknownName
from difflex.miniature.captions import write_captions
from difflex.miniature.world import (
    CONCEPTS,
    OBJECT_GROUPS,
    PIXELS,
    SLOTS,
    STYLES,
    SceneMix,
    SceneSpecs,
    check_drawn_pixels,
    scenes,
)

PALETTE = torch.tensor(
    [
        [0.88, 0.10, 0.10],  # red
        [1.00, 0.52, 0.04],  # orange
        [1.00, 0.90, 0.10],  # yellow
        [0.10, 0.62, 0.18],  # green
        [0.10, 0.85, 0.92],  # cyan
        [0.12, 0.22, 0.90],  # blue
        [0.52, 0.14, 0.72],  # purple
        [1.00, 0.48, 0.74],  # pink
        [0.98, 0.98, 0.98],  # white
        [0.05, 0.05, 0.05],  # black
    ]
)
GROUNDS = torch.tensor(
    [
        [[0.94, 0.91, 0.84], [0.70, 0.76, 0.86]],  # paper: sheet, ruled lines
        [[0.33, 0.37, 0.41], [0.43, 0.47, 0.51]],  # slate: stone, scratches
        [[0.52, 0.74, 0.94], [0.90, 0.95, 1.00]],  # sky: air, clouds
        [[0.42, 0.60, 0.30], [0.30, 0.46, 0.20]],  # grass: blades, gaps
        [[0.88, 0.78, 0.56], [0.76, 0.64, 0.42]],  # sand: crests, troughs
        [[0.62, 0.32, 0.26], [0.78, 0.72, 0.66]],  # brick: bricks, mortar
        [[0.07, 0.08, 0.22], [0.75, 0.78, 0.90]],  # night: sky, stars
        [[0.62, 0.44, 0.28], [0.48, 0.31, 0.17]],  # wood: plank, grain
    ]
)
OUTLINE = 1.6
"""The width of a cartoon's outline, in pixels."""
BLOCKS = (4, 2)
"""The side of the blocks of a pixelated image, in pixels: of the background, and of objects, which stay legible."""


@dataclass(frozen=True)
class Scenes:
    """A batch of drawn scenes: their content, images, captions, and the concepts of each pixel."""

    specs: SceneSpecs
    images: Float[Tensor, "scene 3 height width"]
    """Red, green, blue in [0, 1]."""
    slots: Int[Tensor, "scene height width"]
    """The object slot of each pixel, -1 for background."""

    @cached_property
    def captions(self) -> list[str]:
        """One caption per scene; the attributes that it leaves out depend on the seed."""
        return write_captions(self.specs)

    def labels(self, group: str) -> Int[Tensor, "scene height width"]:
        """Return the concept of `group` at each pixel as an index into `CONCEPTS[group]`, -1 for none."""
        if group in OBJECT_GROUPS:
            per_slot = F.pad(getattr(self.specs, group), (1, 0), value=-1)
            return per_slot.gather(1, (self.slots + 1).flatten(1)).view_as(self.slots)
        whole = (self.specs.count - 1 if group == "count" else getattr(self.specs, group))[:, None, None]
        if group == "style":
            return whole.expand_as(self.slots)
        return torch.where(self.slots < 0 if group == "background" else self.slots >= 0, whole, -1)

    def mask(self, concept: str) -> Bool[Tensor, "scene height width"]:
        """Return the pixels of a concept in each scene."""
        group, index = concept_index(concept)
        return self.labels(group) == index

    def on_tokens(self, concept: str, grid: int) -> Float[Tensor, "scene row column"]:
        """Return the share of each token's area that a concept covers, on a grid of `grid` x `grid` tokens."""
        return F.adaptive_avg_pool2d(self.mask(concept).float(), grid)

    def shares(self, rows: int, columns: int) -> Float[Tensor, "scene concept row column"]:
        """Return the share of each token's area that every concept covers, on any grid, in the order of `CONCEPTS`."""
        masks = [self.labels(group)[:, None] == torch.arange(len(names))[:, None, None] for group, names in CONCEPTS.items()]
        return F.adaptive_avg_pool2d(torch.cat(masks, dim=1).float(), (rows, columns))


def concept_index(concept: str) -> tuple[str, int]:
    """Return the group of a concept and its index in it."""
    for group, names in CONCEPTS.items():
        if concept in names:
            return group, names.index(concept)
    raise UnknownName.among("the concept", concept, [name for names in CONCEPTS.values() for name in names])


def draw(
    seeds: Iterable[int] | Int[Tensor, " scene"],
    mix: SceneMix = SceneMix(),  # noqa: B008 (a constant)
    held_out: bool = False,
    pixels: int = PIXELS,
) -> Scenes:
    """Draw the scenes of these seeds; larger ones than of 64 pixels show the same at a higher resolution."""
    check_drawn_pixels((pixels, pixels))
    scale = pixels // PIXELS
    specs = scenes(seeds if isinstance(seeds, Tensor) else torch.tensor(list(seeds)), mix, held_out)
    exists = torch.arange(SLOTS, device=specs.seed.device) < specs.count[:, None]
    scene, slot = exists.nonzero(as_tuple=True)
    style = specs.style[scene]
    local = _local_frame(specs, scene, slot, pixels)
    distance = _distances(specs.shape[scene, slot], local) * specs.radius[scene, slot][:, None, None]
    painted = _paint(specs, scene, slot, style, local, distance)
    alpha = (0.5 - distance * scale).clamp(0, 1)[:, None]
    image = _background(specs, pixels)
    coarse = style == STYLES.index("pixelated")
    painted[coarse], alpha[coarse] = (_blocks(part[coarse], BLOCKS[1] * scale) for part in (painted, alpha))
    coarse = specs.style == STYLES.index("pixelated")
    image[coarse] = _blocks(image[coarse], BLOCKS[0] * scale)

    slots = torch.full((len(image), pixels, pixels), -1, device=image.device)
    for number in range(SLOTS):
        objects = slot == number
        target = scene[objects]
        image[target] = torch.lerp(image[target], painted[objects], alpha[objects])
        slots[target] = torch.where(alpha[objects, 0] > 0.5, number, slots[target])
    return Scenes(specs, image.clamp_(0, 1), slots)


def _grid(device: torch.device, pixels: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the centres of `pixels` along each side, in a world of 64 units."""
    centres = (torch.arange(pixels, device=device) + 0.5) * (PIXELS / pixels)
    return centres.expand(pixels, pixels), centres[:, None].expand(pixels, pixels)


def _local_frame(specs: SceneSpecs, scene: Tensor, slot: Tensor, pixels: int) -> Float[Tensor, "2 object height width"]:
    """Return pixel positions relative to each object's centre, in units of its radius; distorted in watercolours."""
    x, y = _grid(specs.seed.device, pixels)
    centre = specs.centre[scene, slot]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    wet = (specs.style[scene] == STYLES.index("watercolor")).float()[:, None, None]
    turn = specs.phase[scene, 0][:, None, None] * math.tau
    dx = dx + wet * 0.45 * torch.sin(dy * 0.55 + turn)
    dy = dy + wet * 0.45 * torch.sin(dx * 0.50 + 2 * turn)
    return torch.stack([dx, dy]) / specs.radius[scene, slot][:, None, None]


def _distances(shape: Tensor, local: Tensor) -> Tensor:
    """Return the signed distance to each object's edge in units of its radius, negative inside."""
    distance = torch.empty_like(local[0])
    for number, formula in enumerate(FORMULAS):
        objects = shape == number
        if objects.any():
            distance[objects] = formula(local[0, objects], local[1, objects])
    return distance


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the plane is folded into a tenth, in which the star is a half plane."""
    tenth = math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle / (2 * tenth) - (angle / (2 * tenth)).round()).abs() * 2 * tenth
    radius = torch.hypot(x, y)
    px, py = radius * torch.sin(folded), radius * torch.cos(folded)
    inner = 0.46
    ax, ay = inner * math.sin(tenth), inner * math.cos(tenth)
    nx, ny = 1.05 - ay, ax
    length = math.hypot(nx, ny)
    return (px * nx + (py - 1.05) * ny) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs and a wedge that touches both."""
    discs = torch.hypot(x.abs() - 0.46, y + 0.34) - 0.50
    lines = torch.maximum(x.abs() * 0.7544 + (y - 0.95) * 0.6565, x.abs() - 0.9)
    wedge = torch.maximum(lines, -(y + 0.34))
    return torch.minimum(discs, wedge)


FORMULAS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 0.92,  # circle
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,  # square
    lambda x, y: torch.maximum(x.abs() * 0.894 - (y + 0.95) * 0.447, y - 0.80),  # triangle
    lambda x, y: (x.abs() * 1.25 + y.abs()) * 0.625 - 0.625,  # diamond
    _star,
    _heart,
    lambda x, y: torch.maximum(torch.maximum(x.abs(), y.abs()) - 0.94, torch.minimum(x.abs(), y.abs()) - 0.34),  # cross
    lambda x, y: (torch.hypot(x, y) - 0.68).abs() - 0.29,  # ring
)
"""The signed distance to the edge of each shape, in the order of `SHAPES`."""


def _paint(specs: SceneSpecs, scene: Tensor, slot: Tensor, style: Tensor, local: Tensor, distance: Tensor) -> Tensor:
    """Paint each object as if it filled the image: texture, rim, outline, pigment."""
    colour = PALETTE.to(local.device)[specs.colour[scene, slot]][:, :, None, None]
    luma = (colour * torch.tensor([0.3, 0.59, 0.11], device=local.device)[:, None, None]).sum(1, keepdim=True)
    contrast = torch.where(luma > 0.55, colour * 0.42, colour * 0.45 + 0.55)
    pixels = local * specs.radius[scene, slot][:, None, None]
    amount = _pattern(specs.texture[scene, slot], local, pixels)[:, None]
    shiny = (specs.texture[scene, slot] == 4)[:, None, None, None]
    light = torch.where(amount > 0, colour + (1 - colour) * amount, colour * (1 + 0.75 * amount))
    glare = torch.where(luma > 0.9, colour * (1 - 0.55 * amount.abs()), light)
    body = torch.where(shiny, glare, torch.lerp(colour.expand_as(light), contrast.expand_as(light), amount.clamp(0, 1)))
    rim = torch.where(luma > 0.3, body * 0.72, body * 0.6 + 0.4)
    body = torch.where((distance > -1.0)[:, None] & (style == 0)[:, None, None, None], rim, body)
    ink = torch.where(luma < 0.12, torch.full_like(body, 0.93), torch.full_like(body, 0.03))
    edge = ((distance + OUTLINE + 0.5).clamp(0, 1))[:, None]
    body = torch.where((style == 1)[:, None, None, None], torch.lerp(body, ink, edge), body)
    wet = (style == 2)[:, None, None, None]
    return torch.where(wet, _pigment(body, specs.phase[scene], distance), body)


def _pattern(texture: Tensor, local: Tensor, pixels: Tensor) -> Tensor:
    """Return the share (0..1) of the contrast colour at each pixel; for shiny objects light (+) and shade (-)."""
    x, y = pixels
    stripes = _soft(torch.sin((x + y) * (math.tau / 8.5)))
    cell = 6.0
    dx, dy = (x / cell - (x / cell).round()) * cell, (y / cell - (y / cell).round()) * cell
    dots = (2.0 - torch.hypot(dx, dy)).clamp(0, 1)
    checks = _soft(torch.sin(x * (math.pi / 5)) * torch.sin(y * (math.pi / 5)))
    highlight = torch.exp(-((local[0] + 0.3) ** 2 + (local[1] + 0.35) ** 2) / 0.12) * 0.95
    shade = -(((local[0] + local[1]) - 0.1).clamp(0, 1) * 0.9)
    shiny = torch.where(highlight > 0.1, highlight, shade)
    stack = torch.stack([torch.zeros_like(x), stripes, dots, checks, shiny])
    return stack.gather(0, texture.view(1, -1, 1, 1).expand(1, *x.shape))[0]


def _soft(wave: Tensor) -> Tensor:
    return (0.5 + wave * 1.6).clamp(0, 1)


def _pigment(body: Tensor, phase: Tensor, distance: Tensor) -> Tensor:
    """Make a watercolour: lighter, blotchy, darker at the edge where the pigment dries."""
    thin = body * 0.72 + 0.26
    blot = _blotches(phase, body.shape[-1])[:, None] * 0.14
    rim = torch.exp(-(((distance + 1.2) / 1.1) ** 2))[:, None] * 0.30
    return thin * (1 - rim) + blot


def _blotches(phase: Tensor, pixels: int) -> Tensor:
    x, y = _grid(phase.device, pixels)
    turn = phase * math.tau
    first, second = (
        torch.sin(x * fx + y * fy + turn[:, i, None, None]) for i, (fx, fy) in enumerate(((0.21, 0.13), (-0.12, 0.24)))
    )
    return first * second


def _background(specs: SceneSpecs, pixels: int) -> Tensor:
    amount = _ground_pattern(specs, pixels)[:, None]
    style = specs.style[:, None, None, None]
    amount = torch.where(style == 1, (amount * 1.7).clamp(0, 1), amount)
    first, second = GROUNDS.to(specs.seed.device)[specs.background].unbind(1)
    ground = torch.lerp(first[:, :, None, None], second[:, :, None, None], amount)
    wash = (ground * 0.62 + 0.34) + _blotches(specs.phase[:, 2:], pixels)[:, None] * 0.13
    return torch.where(style == 2, wash, ground)


def _ground_pattern(specs: SceneSpecs, pixels: int) -> Tensor:
    """Return the share (0..1) of the background's second colour at each pixel."""
    x, y = _grid(specs.seed.device, pixels)
    phase = specs.phase[:, :, None, None]
    turn = phase * math.tau
    amount = torch.zeros(len(specs.seed), pixels, pixels, device=x.device)

    def put(background: int, pattern: Callable[[Tensor, Tensor], Tensor]) -> None:
        selected = specs.background == background
        if selected.any():
            amount[selected] = pattern(phase[selected], turn[selected])

    put(0, lambda p, t: (torch.sin(y * (math.tau / 8) + t[:, 4]) * 4 - 3).clamp(0, 1))
    put(1, lambda p, t: (torch.sin((x - 2 * y) * 0.35 + t[:, 4]) * torch.sin(x * 0.11 + t[:, 5]) * 2.0).clamp(0, 1))
    put(2, lambda p, t: _clouds(x, y, p))
    put(3, lambda p, t: 0.5 + 0.5 * torch.sin(x * 1.25 + t[:, 4] + 1.2 * torch.sin(y * 0.35 + t[:, 5])))
    put(4, lambda p, t: 0.5 + 0.5 * torch.sin(y * 0.75 + t[:, 4] + 1.5 * torch.sin(x * 0.16 + t[:, 5])))
    put(5, lambda p, t: _bricks(x, y, p))
    put(6, lambda p, t: _night(x, y, p))
    put(7, lambda p, t: (0.4 + 0.6 * torch.sin(x * 0.8 + t[:, 4] + 1.6 * torch.sin(y * 0.09 + t[:, 5]))).clamp(0, 1))
    return amount


def _clouds(x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    haze = (y / PIXELS) * 0.55
    for i in (4, 6):
        cx, cy = phase[:, i] * PIXELS, phase[:, i + 1] * PIXELS
        haze = haze + 0.8 * torch.exp(-(((x - cx) / 13) ** 2) - ((y - cy) / 5) ** 2)
    return haze.clamp(0, 1)


def _bricks(x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    row = (y / 8 + phase[:, 4]).floor()
    across = (x / 16 + phase[:, 5] + 0.5 * (row % 2)) % 1 * 16
    down = (y / 8 + phase[:, 4]) % 1 * 8
    return torch.maximum((across < 1.6).float(), (down < 1.6).float())


def _night(x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    sx, sy = (x + phase[:, 4] * 16) % 16 - 8, (y + phase[:, 5] * 16 + 5 * ((x + phase[:, 4] * 16) / 16).floor()) % 16 - 8
    return (1.6 - torch.hypot(sx, sy)).clamp(0, 1)


def _blocks(image: Tensor, side: int) -> Tensor:
    """Replace every block of `side` x `side` pixels by its mean."""
    return F.interpolate(F.avg_pool2d(image, side), scale_factor=side)
