"""What the miniatures have in common: their config, the model in training, and text encoders that know the words of captions."""

import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from difflex.miniature.captions import WORDS
from difflex.miniature.patches import patch_vae
from difflex.miniature.world import PIXELS

CLIP_LENGTH = 32
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
ClipKind = TypeVar("ClipKind", CLIPTextModel, CLIPTextModelWithProjection)


class DenoisingProblem(NamedTuple):
    """What a model is given in training, and what it should answer."""

    noisy: Float[Tensor, "scene position channel"]
    target: Float[Tensor, "scene position channel"]
    """The velocity along which the noise grows."""
    time: Tensor
    """The noise level as the model reads it."""


class FlowModel(nn.Module, ABC):
    """The trained parts of a pipeline."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The blocks of the denoiser."""

    @staticmethod
    @abstractmethod
    def is_matrix(name: str, parameter: Tensor) -> bool:
        """Return whether a parameter is a matrix, or the kernel of a convolution, inside a block."""

    @abstractmethod
    def problem(
        self,
        latents: Float[Tensor, "scene position channel"],
        noise: Float[Tensor, "scene position channel"],
        level: Float[Tensor, " scene"],
    ) -> DenoisingProblem:
        """Add noise of levels in [0, 1], 0 for none and 1 for noise alone, as the model's scheduler does."""

    @abstractmethod
    def schedule(self, steps: int) -> Sequence[Tensor | float]:
        """Return the noise levels at which the pipeline calls the denoiser in so many steps; no GPU is waited for."""

    @abstractmethod
    def parts(self, noisy: Tensor, velocity: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents and the noise that noisy latents consist of, by their velocity."""

    @torch.no_grad()
    def draw(
        self, noise: Float[Tensor, "scene position channel"], text: Tensor, text_2: Tensor, steps: int
    ) -> Float[Tensor, "scene position channel"]:
        """Return the latents that the pipeline would make of this noise."""
        latents = torch.zeros_like(noise)
        for level in self.schedule(steps):
            noisy, _, time = self.problem(latents, noise, torch.zeros_like(noise[:, 0, 0]) + level)
            latents, noise = self.parts(noisy, self.velocity(noisy, time, text, text_2).float(), time)
        return latents

    @abstractmethod
    def velocity(self, noisy: Tensor, time: Tensor, text: Tensor, text_2: Tensor) -> Float[Tensor, "scene position channel"]:
        """Predict the target of noisy latents for captions as ids of both text encoders."""

    def extra_loss(self, objects: Float[Tensor, "scene position"]) -> Tensor | float:
        """Return what is added to the loss of the last prediction; `objects` is the share of each position that they cover."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class MiniatureConfig(ABC):
    """The sizes of a miniature; its subclasses say how it is built."""

    patch: ClassVar[int]
    """Pixels along the side of a latent."""
    latents: ClassVar[int]
    """Channels of the VAE."""
    pack: ClassVar[int]
    """Latents along the side of a position of the denoiser's input."""
    decoder_updates: ClassVar[int]
    """Of the training of the VAE's decoder."""
    autoencoder: ClassVar[str]
    """The embedded model whose VAE it has."""
    family: ClassVar[str]
    """The name of its family in difflex."""

    @property
    def grid(self) -> int:
        """Positions along each side of the denoiser's input."""
        return PIXELS // (self.patch * self.pack)

    @property
    def channels(self) -> int:
        """Channels of each position."""
        return self.latents * self.pack**2

    def pipeline(self, seed: int) -> DiffusionPipeline:
        """Make a pipeline with random weights; `write_encoder` sets those of its VAE's encoder later."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._pipeline(patch_vae(self.patch, self.latents))

    @abstractmethod
    def _pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline: ...

    @abstractmethod
    def model(self, pipeline: DiffusionPipeline) -> FlowModel:
        """Return the trained parts of a pipeline."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the architecture in a few words."""


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer for which each known word is one token."""
    vocabulary = {token: i for i, token in enumerate(_clip_vocabulary())}
    return CLIPTokenizer(vocab=vocabulary, merges=_clip_merges(), model_max_length=CLIP_LENGTH)  # pyright: ignore[reportArgumentType] (it takes pairs)


def clip_encoder(kind: type[ClipKind], width: int, layers: int) -> ClipKind:
    """Return a text encoder of class `kind` with random weights."""
    vocabulary = _clip_vocabulary()
    end = vocabulary.index(CLIP_END)
    return kind(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=vocabulary.index(CLIP_START),
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def _clip_vocabulary() -> list[str]:
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    return [*letters, *sorted({"".join(pair) for pair in _clip_merges()}), CLIP_START, CLIP_END]


def _clip_merges() -> list[tuple[str, str]]:
    """Return byte pairs that join each known word letter by letter from its end to one token; other words are spelled.

    Pairs that grow from the end of a word cannot interfere with one another.
    """
    return sorted({(word[i], word[i + 1 :] + "</w>") for word in WORDS for i in range(len(word) - 1)})
