"""A judge of images: a network that finds the concepts of every pixel, trained on drawn scenes alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difflex.errors import BadInput, BrokenFile
from difflex.files import replacing
from difflex.miniature.drawing import Scenes, concept_index, draw
from difflex.miniature.world import CONCEPTS, PIXELS

DENSE = ("shape", "colour", "texture", "size", "background")
"""Concept groups with a prediction per pixel; the first four only at objects."""
WHOLE = ("style", "count")
"""Concept groups with a prediction per image."""
MIN_PIXELS = 24
"""The smallest connected region that counts as an object."""
EDGES = (PIXELS / 2 - 9.0, PIXELS / 2 + 9.0)
"""The bounds of the middle row or column of the grid, in pixels."""


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """An object that the judge detects."""

    concepts: dict[str, str]
    """Concept group -> concept, for groups of objects."""
    confidence: float
    """The mean probability of its shape, colour and texture."""
    mask: Bool[Tensor, "height width"]


@dataclass(frozen=True, kw_only=True)
class SceneReading:
    """The content of an image by the judge."""

    objects: tuple[DetectedObject, ...]
    background: str
    style: str
    count: str
    confidence: float
    """The mean probability of all predictions for the image."""


class Judge(nn.Module):
    """A small U-Net with one output per concept group; it works on blocks of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = 48, 96, 128
        self.down = nn.ModuleList((_double_conv(12, fine), _double_conv(fine, middle), _double_conv(middle, coarse)))
        self.narrow = nn.ModuleList((nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)))
        self.up = nn.ModuleList((_double_conv(middle, middle), _double_conv(fine, fine)))
        names = {"object": 1} | {group: len(CONCEPTS[group]) for group in DENSE}
        self.dense = nn.ModuleDict({group: nn.Conv2d(fine, 4 * count, 1) for group, count in names.items()})
        self.whole = nn.ModuleDict({group: nn.Linear(fine + middle + coarse, len(CONCEPTS[group])) for group in WHOLE})

    def forward(self, images: Float[Tensor, "image 3 height width"]) -> dict[str, Tensor]:
        """Return logits: `object` [image, height, width]; dense groups [image, concept, height, width]; others per image."""
        x, levels = F.pixel_unshuffle(images * 2 - 1, 2), []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        pooled = torch.cat([level.mean((2, 3)) for level in levels], dim=1)
        for narrow, block, level in zip(self.narrow, self.up, reversed(levels[:-1]), strict=True):
            x = block(F.interpolate(narrow(x), scale_factor=2) + level)
        answers = {group: F.pixel_shuffle(layer(x), 2) for group, layer in self.dense.items()}
        answers["object"] = answers["object"][:, 0]
        return answers | {group: layer(pooled) for group, layer in self.whole.items()}

    @torch.no_grad()
    def read(self, images: Float[Tensor, "image 3 height width"]) -> list[SceneReading]:
        """Read the content of each image."""
        if images.ndim != 4 or images.shape[1:] != (3, PIXELS, PIXELS):
            raise BadInput(f"The judge reads images of 3 x {PIXELS} x {PIXELS}, not {tuple(images.shape)}. Resize them.")
        answers = self(images)
        regions = connected_regions(answers["object"] > 0)
        return [_read_scene({group: x[i] for group, x in answers.items()}, regions[i]) for i in range(len(images))]

    @torch.no_grad()
    def share(
        self, images: Float[Tensor, "image 3 height width"], concept: str, region: Bool[Tensor, "height width"]
    ) -> Float[Tensor, " image"]:
        """Return the share of a region that shows the concept, out of the pixels that could show it.

        Those are object pixels for an object's concept (the share is 0 without any), background pixels for a background.
        """
        group, index = concept_index(concept)
        answers = self(images)
        if group in WHOLE:
            return answers[group].softmax(1)[:, index]
        objects = answers["object"] > 0
        candidates = region & (~objects if group == "background" else objects)
        matches = _in_row_or_column(objects, group, index) if group in ("row", "column") else answers[group].argmax(1) == index
        return (candidates & matches).sum((1, 2)) / candidates.sum((1, 2)).clamp(min=1)


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def connected_regions(objects: Bool[Tensor, "image height width"]) -> Int[Tensor, "image height width"]:
    """Label connected regions: the same positive number for all pixels of a region, 0 outside."""
    number = torch.arange(1, objects[0].numel() + 1, device=objects.device, dtype=torch.float32).view(objects.shape[1:])
    labels = objects * number
    while True:
        grown = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * objects
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def _in_row_or_column(objects: Tensor, group: str, index: int) -> Tensor:
    """Return the pixels of all objects whose centre is in the row or column."""
    selected = torch.zeros_like(objects)
    for image, labels in enumerate(connected_regions(objects)):
        for label in labels.unique().tolist():
            mask = labels == label
            if label and _cell(mask)[0 if group == "row" else 1] == index:
                selected[image] |= mask
    return selected


def _cell(mask: Tensor) -> tuple[int, int]:
    """Return row and column of the centre of the mask's bounding box, on the 3 x 3 grid."""
    low, high = mask.nonzero().aminmax(dim=0)
    row, column = torch.bucketize((low + high + 1) / 2, torch.tensor(EDGES)).tolist()
    return row, column


def _read_scene(answers: dict[str, Tensor], regions: Tensor) -> SceneReading:
    masks = [regions == label for label in regions.unique().tolist() if label]
    objects = tuple(_detect(answers, mask) for mask in masks if mask.sum() >= MIN_PIXELS)
    ground = answers["background"].softmax(0)[:, regions == 0].mean(1)
    style, count = answers["style"].softmax(0), answers["count"].softmax(0)
    confidences = [float(p.max()) for p in (ground, style, count)] + [item.confidence for item in objects]
    return SceneReading(
        objects=objects,
        background=CONCEPTS["background"][int(ground.argmax())],
        style=CONCEPTS["style"][int(style.argmax())],
        count=CONCEPTS["count"][int(count.argmax())],
        confidence=sum(confidences) / len(confidences),
    )


def _detect(answers: dict[str, Tensor], mask: Tensor) -> DetectedObject:
    probabilities = {group: answers[group].log_softmax(0)[:, mask].mean(1).softmax(0) for group in DENSE[:4]}
    concepts = {group: CONCEPTS[group][int(p.argmax())] for group, p in probabilities.items()}
    row, column = _cell(mask)
    return DetectedObject(
        concepts=concepts | {"row": CONCEPTS["row"][row], "column": CONCEPTS["column"][column]},
        confidence=sum(float(probabilities[group].max()) for group in DENSE[:3]) / 3,
        mask=mask,
    )


def training_losses(judge: Judge, updates: int, batch: int = 32, seed: int = 0) -> Iterator[float]:
    """Train the judge on new drawn scenes; yield the loss of each update."""
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=updates, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    judge.train()
    for update in range(updates):
        scenes = draw(torch.arange(batch) + update * batch)
        images = _augment(scenes.images, generator)
        with torch.autocast("cpu", torch.bfloat16):
            answers = judge(images.contiguous(memory_format=torch.channels_last))
        loss = _loss(answers, scenes)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield loss.item()
    judge.eval()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur the images, add noise and change their brightness, so that the judge does not depend on single pixels."""
    amount = torch.rand(len(images), 3, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, amount[:, 0] * 0.8)
    images = images + amount[:, 1] * 0.06 * torch.randn(images.shape, generator=generator)
    return (images * (0.94 + 0.12 * amount[:, 2])).clamp(0, 1)


def _loss(answers: dict[str, Tensor], scenes: Scenes) -> Tensor:
    objects = scenes.slots >= 0
    total = F.binary_cross_entropy_with_logits(answers["object"].float(), objects.float())
    for group in DENSE:
        total = total + F.cross_entropy(answers[group].float(), scenes.labels(group), ignore_index=-1)
    total = total + F.cross_entropy(answers["style"].float(), scenes.specs.style)
    return total + F.cross_entropy(answers["count"].float(), scenes.specs.count - 1)


def save_judge(judge: Judge, file: Path) -> None:
    """Write the weights of the judge."""
    with replacing(file) as temporary:
        save_file({name: x.contiguous() for name, x in judge.state_dict().items()}, temporary)


def load_judge(file: Path | None = None) -> Judge:
    """Load the judge of the package, or one from a file."""
    path = file or Path(str(resources.files("difflex.miniature") / "judge.safetensors"))
    judge = Judge()
    try:
        judge.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BrokenFile(f"The weights of the judge in {path} cannot be read: {error}") from error
    return judge.eval().requires_grad_(False)
