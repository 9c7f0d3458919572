"""Image similarity: SSIM, CLIP (arXiv 2103.00020) and LPIPS (arXiv 1801.03924), the last two from published weights.

CLIP is that of transformers. LPIPS is written out here (five convolutions and five weighted sums), because the packages that
offer it need a torchvision build that fits the torch build.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # torch raises it for a damaged weights file; nothing is unpickled
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from difflex.devices import find_device
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.files import file_sha256

Images = Float[Tensor, "image channel row column"]
"""Pixels between 0 and 1."""
ImageMeasure = Callable[[Images, Images], Float[Tensor, " image"]]
"""Similarity, or distance, of each pair of edited and unedited images."""

CLIP, LPIPS = "clip:", "lpips"
BATCH = 64
"""Images or texts per forward pass."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the pixels that AlexNet expects, also within LPIPS."""
SMALLEST = 31
"""The smallest side in pixels that AlexNet accepts."""
WINDOW, WINDOW_DEVIATION = 11, 1.5
"""Side and standard deviation in pixels of SSIM's Gaussian window."""
LUMINANCE, CONTRAST = 0.01**2, 0.03**2
"""SSIM's stabilising constants for pixels between 0 and 1."""


class _PublishedFile(NamedTuple):
    """A file of published weights."""

    url: str
    name: str
    """In torch's cache; ends in the first digits of its SHA-256, which torch checks."""


ALEXNET = _PublishedFile("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "alexnet-owt-7be5be79.pth")
HEADS = _PublishedFile(
    "https://github.com/richzhang/PerceptualSimilarity/raw/c33f89e9f46522a584cf41d8880eb0afa982708b/lpips/weights/v0.1/alex.pth",
    "lpips-df73285e.pth",
)
LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
"""AlexNet's convolutions: number in the names of the weights, stride, padding, and whether the input is max-pooled first."""


def check_measure(name: str) -> None:
    """Raise `UnknownName` unless `name` is that of an image measure."""
    if name != LPIPS and (not name.startswith(CLIP) or name == CLIP):
        raise UnknownName(
            f"The measure '{name}' is unknown. Write lpips, or clip: and the folder or hub name of a CLIP of transformers, as in "
            "clip:openai/clip-vit-large-patch14."
        )


def load_measure(name: str, *, offline: bool = False) -> ImageMeasure:
    """Load the measure `clip:MODEL` (cosine similarity of CLIP's image embeddings) or `lpips` (a distance)."""
    if name == LPIPS:
        return LpipsDistance(_published_weights(ALEXNET, offline), _published_weights(HEADS, offline))
    return ClipModel(name.removeprefix(CLIP), offline=offline)


def ssim(images: Images, references: Images) -> Float64[Tensor, " image"]:
    """Return the structural similarity of each pair of images (Wang, Bovik, Sheikh & Simoncelli 2004).

    It is the mean over channels and over all windows inside the image; 1 for equal images.
    """
    if min(images.shape[2:]) < WINDOW:
        raise BadInput(f"Images of {images.shape[2]} x {images.shape[3]} pixels are smaller than SSIM's window of {WINDOW}.")
    x, y = images.double(), references.double()
    x_mean, y_mean = _blurred(x), _blurred(y)
    # Rounding can make the variance of a flat window slightly negative.
    x_variance = (_blurred(x * x) - x_mean * x_mean).clamp_min(0)
    y_variance = (_blurred(y * y) - y_mean * y_mean).clamp_min(0)
    covariance = _blurred(x * y) - x_mean * y_mean
    luminance = (2 * x_mean * y_mean + LUMINANCE) / (x_mean.square() + y_mean.square() + LUMINANCE)
    structure = (2 * covariance + CONTRAST) / (x_variance + y_variance + CONTRAST)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(
    x: Float64[Tensor, "image channel row column"],
) -> Float64[Tensor, "image channel window_row window_column"]:
    """Return the Gaussian means of all windows, computed along the rows, then along the columns."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    bell = torch.softmax(-offsets.square() / (2 * WINDOW_DEVIATION**2), dim=0)
    flat = x.flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).squeeze(1).unflatten(0, x.shape[:2])


@contextmanager
def _opening(model: str) -> Iterator[None]:
    """Explain what goes wrong in a block that opens a CLIP."""
    try:
        yield
    except DifflexError:
        raise
    except Exception as error:  # whatever transformers raises for damaged, foreign or missing files
        reason = str(error).strip().split("\n")[0][:300]
        raise BadInput(
            f"'{model}' cannot be opened as a CLIP: {reason}. Name a folder that holds one, or a hub name that can be reached."
        ) from error


@final
class ClipModel:
    """A CLIP of transformers: embeds images and texts in one space."""

    def __init__(self, model: str, *, offline: bool = False) -> None:
        """Load `model`, a folder or a hub name; `offline` takes it from the local cache only."""
        import transformers

        self._device = find_device()
        with _opening(model):
            config = transformers.AutoConfig.from_pretrained(model, local_files_only=offline)
            if config.model_type != "clip":
                raise BadInput(f"'{model}' is a model of type '{config.model_type}', not a CLIP. Name a CLIP of transformers.")
            # The annotations of transformers do not describe what these calls return.
            self._tokeniser: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=offline)
            loading = {"dtype": torch.float32, "local_files_only": offline, "output_loading_info": True}
            loaded, information = cast("Any", transformers.CLIPModel).from_pretrained(model, **loading)
            # The class that reads this file needs torchvision.
            path = transformers.utils.cached_file(model, "preprocessor_config.json", local_files_only=offline)
            preprocessing = json.loads(Path(str(path)).read_bytes())
            statistics = [_per_channel(preprocessing[name], self._device) for name in ("image_mean", "image_std")]
        if missing := sorted(information["missing_keys"]):
            raise BrokenFile(f"The CLIP '{model}' lacks {len(missing)} weights, such as {missing[0]}. Copy or download it again.")
        infinite = [name for name, weights in loaded.named_parameters() if not bool(torch.isfinite(weights).all())]
        if infinite:
            raise NonFinite(f"The weights {infinite[0]} of the CLIP '{model}' hold NaN or infinity. Copy or download it again.")
        self._model = loaded.to(self._device).eval().requires_grad_(False)
        self._mean, self._deviation = statistics

    @staticmethod
    def checksum(model: str, *, offline: bool = False) -> str:
        """Return a checksum that changes with the files of `model`: over a folder, or the commit of a hub name."""
        import transformers

        with _opening(model):
            if not Path(model).is_dir():
                return Path(str(transformers.utils.cached_file(model, "config.json", local_files_only=offline))).parent.name
            files = sorted(path for path in Path(model).iterdir() if path.is_file())
            lines = [f"{path.name} {file_sha256(path)}" for path in files]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def logit_scale(self) -> float:
        """The factor from cosine similarities to logits."""
        return math.exp(self._model.logit_scale.item())

    def embed_images(self, pixels: Images) -> Float[Tensor, "image width"]:
        """Return unit embeddings of images, which are resized to CLIP's size by the shorter side and cropped.

        They have gradients if `pixels` have.
        """
        with torch.set_grad_enabled(pixels.requires_grad):
            outputs = [self._model.get_image_features(pixel_values=self._preprocess(part)) for part in pixels.split(BATCH)]
            return F.normalize(torch.cat([output.pooler_output for output in outputs]), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """Return unit embeddings of texts, truncated to CLIP's maximum length."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokeniser([*texts], padding=True, truncation=True, return_tensors="pt", max_length=longest)
        output = self._model.get_text_features(**tokens.to(self._device))
        return F.normalize(output.pooler_output, dim=1)

    def __call__(self, images: Images, references: Images) -> Float[Tensor, " image"]:
        """Return the cosine similarity of the embeddings of each pair of images."""
        return (self.embed_images(images) * self.embed_images(references)).sum(1)

    def _preprocess(self, pixels: Images) -> Float[Tensor, "image channel side side"]:
        side = self._model.config.vision_config.image_size
        scale = side / min(pixels.shape[2:])
        size = [max(side, round(length * scale)) for length in pixels.shape[2:]]
        scaled = F.interpolate(pixels.to(self._device).float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        return (scaled[..., top : top + side, left : left + side] - self._mean) / self._deviation


@final
class LpipsDistance:
    """LPIPS 0.1 with AlexNet: a distance of images by AlexNet features, weighted to agree with human judgements."""

    def __init__(self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Take the weights of torchvision's AlexNet and of LPIPS 0.1 for it, by their published names."""
        self._device = device = find_device()
        self._convolutions = [
            (trunk[f"features.{number}.weight"].to(device), trunk[f"features.{number}.bias"].to(device)) for number, *_ in LAYERS
        ]
        self._heads = [heads[f"lin{number}.model.1.weight"].to(device) for number in range(len(LAYERS))]
        self._mean, self._deviation = _per_channel(MEAN, device), _per_channel(DEVIATION, device)

    @torch.inference_mode()
    def __call__(self, images: Images, references: Images) -> Float[Tensor, " image"]:
        """Return the distance of each pair of images; 0 for equal images."""
        if min(images.shape[2:]) < SMALLEST:
            raise BadInput(f"Images of {images.shape[2]} x {images.shape[3]} pixels are too small for LPIPS: use larger ones.")
        return torch.cat([self._distance(*pair) for pair in zip(images.split(BATCH), references.split(BATCH), strict=True)])

    def _distance(self, images: Images, references: Images) -> Float[Tensor, " image"]:
        sums = torch.zeros(len(images), device=self._device)
        for x, y, head in zip(self._features(images), self._features(references), self._heads, strict=True):
            sums += F.conv2d((x - y).square(), head).mean((1, 2, 3))
        return sums

    def _features(self, pixels: Images) -> list[Float[Tensor, "image map _ _"]]:
        """Return the output of each layer after its ReLU, normalised to length 1 at every position."""
        x, features = (pixels.to(self._device).float() - self._mean) / self._deviation, []
        for (_, stride, padding, pooled), (weight, bias) in zip(LAYERS, self._convolutions, strict=True):
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            features.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return features


def _published_weights(file: _PublishedFile, offline: bool) -> dict[str, Tensor]:
    """Load published weights from torch's cache; download them first if they are not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    advice = f"LPIPS needs {file.url}: download it on a machine with network access and save it in {folder} as {file.name}."
    if offline and not (folder / file.name).is_file():
        raise BadInput(f"There is no {folder / file.name}, and --offline forbids downloading it. {advice}")
    try:
        return torch.hub.load_state_dict_from_url(
            file.url, map_location="cpu", check_hash=True, file_name=file.name, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise BadInput(f"The weights of LPIPS cannot be loaded ({error}). {advice}") from error


def _per_channel(values: Sequence[float], device: torch.device) -> Float[Tensor, "channel 1 1"]:
    return torch.tensor(values, device=device).view(-1, 1, 1)
