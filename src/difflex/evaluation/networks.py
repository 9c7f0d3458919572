"""How alike images are to networks that see: CLIP (arXiv 2103.00020) and LPIPS (arXiv 1801.03924), from published weights.

CLIP is that of transformers. LPIPS is five convolutions and five weighted sums, which are written out here: the packages that
have it need torchvision, whose builds must fit that of torch, for these few lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # what torch raises of a damaged file that is no weights; nothing is pickled
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, UnknownName
from difflex.evaluation.changing import Measure

__all__ = ["ClipModel", "LpipsDistance", "check_likeness", "likeness"]

CLIP, LPIPS = "clip:", "lpips"
AT_ONCE = 64
"""Images, or texts."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels that AlexNet was trained on: what it is shown is normalised by these, also within LPIPS."""
SMALLEST = 31
"""Pixels of which AlexNet makes one."""


class _PublishedFile(NamedTuple):
    """A file that its makers publish."""

    url: str
    name: str
    """In torch's cache; ends in the beginning of its SHA-256, which torch holds it to."""


ALEXNET = _PublishedFile("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "alexnet-owt-7be5be79.pth")
HEADS = _PublishedFile(
    "https://github.com/richzhang/PerceptualSimilarity/raw/c33f89e9f46522a584cf41d8880eb0afa982708b/lpips/weights/v0.1/alex.pth",
    "lpips-df73285e.pth",
)


class _AlexNetLayer(NamedTuple):
    """A convolution of AlexNet, whose output LPIPS looks at after its rectifier."""

    number: int
    """In the file of its weights."""
    stride: int
    padding: int
    pooled: bool
    """Whether its input is halved first."""


LAYERS = (
    _AlexNetLayer(0, 4, 2, False),
    _AlexNetLayer(3, 1, 2, True),
    _AlexNetLayer(6, 1, 1, True),
    _AlexNetLayer(8, 1, 1, False),
    _AlexNetLayer(10, 1, 1, False),
)


def check_likeness(name: str) -> None:
    """Nothing; `name` is that of a measure."""
    if name != LPIPS and (not name.startswith(CLIP) or name == CLIP):
        raise UnknownName(
            f"The measure '{name}' is unknown. Write lpips, or clip: and the folder or hub name of a CLIP of transformers, as in "
            "clip:openai/clip-vit-large-patch14."
        )


def likeness(name: str, *, offline: bool = False) -> Measure:
    """The measure called `name`, loaded: `clip:MODEL` is the cosine of what CLIP makes of two images, `lpips` a distance."""
    check_likeness(name)
    return LpipsDistance.published(offline=offline) if name == LPIPS else ClipModel(name.removeprefix(CLIP), offline=offline)


@final
class ClipModel:
    """A CLIP of transformers: images and words as directions of one space."""

    def __init__(self, model: str, *, device: torch.device | str | None = None, offline: bool = False) -> None:
        """`model`: a folder or a hub name."""
        import transformers

        self.name = model
        self._device = _place(device)
        try:
            config = transformers.AutoConfig.from_pretrained(model, local_files_only=offline)
            if config.model_type != "clip":
                raise BadInput(f"'{model}' is of the kind '{config.model_type}', not a CLIP. Name one of transformers.")
            # The annotations of transformers name its bare classes, not what these make of a folder.
            self._words: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=offline)
            loaded: Any = transformers.CLIPModel.from_pretrained(model, dtype=torch.float32, local_files_only=offline)
            seen = _seen(model, offline)
        except (OSError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"'{model}' cannot be opened as a CLIP: {error}. Name a folder that holds one, or a hub name that can be reached."
            ) from error
        self._model = loaded.to(self._device).eval()
        self._mean, self._deviation = (_column(seen[each], self._device) for each in ("image_mean", "image_std"))

    @property
    def sharpness(self) -> float:
        """What cosines are multiplied by before they are made shares."""
        return math.exp(self._model.logit_scale.item())

    @torch.inference_mode()
    def of_images(self, pixels: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image width"]:
        """The direction of each image, whose pixels are between 0 and 1: scaled until its shorter side fits, its middle."""
        made = [self._model.get_image_features(pixel_values=self._fitted(part)) for part in pixels.split(AT_ONCE)]
        return F.normalize(torch.cat([each.pooler_output for each in made]), dim=1)

    @torch.inference_mode()
    def of_words(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """The direction of each text, cut off where the model stops reading."""
        read = self._words([*texts], padding=True, truncation=True, return_tensors="pt", max_length=self._longest)
        made = self._model.get_text_features(**read.to(self._device))
        return F.normalize(made.pooler_output, dim=1)

    def __call__(
        self, one: Float[Tensor, "image channel row column"], other: Float[Tensor, "image channel row column"]
    ) -> Float[Tensor, " image"]:
        """The cosine of each pair of images: 1 where they are the same to it."""
        return (self.of_images(one) * self.of_images(other)).sum(1)

    @property
    def _longest(self) -> int:
        return self._model.config.text_config.max_position_embeddings

    def _fitted(self, pixels: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image channel side side"]:
        side = self._model.config.vision_config.image_size
        scale = side / min(pixels.shape[2:])
        size = [max(side, round(length * scale)) for length in pixels.shape[2:]]
        scaled = F.interpolate(pixels.to(self._device).float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        return (scaled[..., top : top + side, left : left + side] - self._mean) / self._deviation


@final
class LpipsDistance:
    """The distance of images by what AlexNet makes of them, weighted to agree with people."""

    def __init__(
        self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor], device: torch.device | str | None = None
    ) -> None:
        """The weights of torchvision's AlexNet, and those of LPIPS 0.1 for it, by the names of their files."""
        self._device = place = _place(device)
        self._convolutions = [
            (trunk[f"features.{layer.number}.weight"].to(place), trunk[f"features.{layer.number}.bias"].to(place))
            for layer in LAYERS
        ]
        self._heads = [heads[f"lin{number}.model.1.weight"].to(place) for number in range(len(LAYERS))]
        self._mean, self._deviation = _column(MEAN, place), _column(DEVIATION, place)

    @classmethod
    def published(cls, *, offline: bool = False) -> LpipsDistance:
        """That of version 0.1 for AlexNet: its weights are in torch's cache, or else fetched into it."""
        return cls(_fetched(ALEXNET, offline), _fetched(HEADS, offline))

    @torch.inference_mode()
    def __call__(
        self, one: Float[Tensor, "image channel row column"], other: Float[Tensor, "image channel row column"]
    ) -> Float[Tensor, " image"]:
        """The distance of each pair of images with pixels between 0 and 1: 0 where they are the same."""
        if min(one.shape[2:]) < SMALLEST:
            raise BadInput(f"Images of {one.shape[2]} x {one.shape[3]} pixels are too small for LPIPS: draw larger ones.")
        parts = zip(one.split(AT_ONCE), other.split(AT_ONCE), strict=True)
        return torch.cat([self._apart(first, second) for first, second in parts])

    def _apart(
        self, one: Float[Tensor, "image channel row column"], other: Float[Tensor, "image channel row column"]
    ) -> Float[Tensor, " image"]:
        sums = torch.zeros(len(one), device=self._device)
        for x, y, head in zip(self._layers(one), self._layers(other), self._heads, strict=True):
            sums += F.conv2d((x - y).square(), head).mean((1, 2, 3))
        return sums

    def _layers(self, pixels: Float[Tensor, "image channel row column"]) -> list[Float[Tensor, "image map _ _"]]:
        """What each layer makes of images, at every place a direction of length 1."""
        x, made = (pixels.to(self._device).float() - self._mean) / self._deviation, []
        for layer, (weight, bias) in zip(LAYERS, self._convolutions, strict=True):
            x = F.max_pool2d(x, 3, 2) if layer.pooled else x
            x = F.relu(F.conv2d(x, weight, bias, layer.stride, layer.padding))
            made.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return made


def _place(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _column(values: Sequence[float], device: torch.device) -> Float[Tensor, "channel 1 1"]:
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _seen(model: str, offline: bool) -> dict[str, Any]:
    """How a model wants its images: its processor itself needs torchvision."""
    from transformers.utils import cached_file

    path = cached_file(model, "preprocessor_config.json", local_files_only=offline)
    if path is None:
        raise BadInput(f"'{model}' has no preprocessor_config.json, so how it wants its images is not known.")
    return json.loads(Path(path).read_bytes())


def _fetched(file: _PublishedFile, offline: bool) -> dict[str, Tensor]:
    """The weights in a published file, from torch's cache or, if need be, from where it is published."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    advice = f"LPIPS needs {file.url}: fetch it where there is a network, and put it into {folder} as {file.name}."
    if offline and not (folder / file.name).is_file():
        raise BadInput(f"There is no {folder / file.name}, and --offline forbids to fetch it. {advice}")
    try:
        return torch.hub.load_state_dict_from_url(
            file.url, map_location="cpu", check_hash=True, file_name=file.name, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise BadInput(f"The weights of LPIPS cannot be had ({error}). {advice}") from error
