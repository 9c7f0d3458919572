"""The miniature FLUX: a rectified flow on latents that are packed in 2 x 2 patches."""

import string
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from difflex.miniature.architecture import DenoisingProblem, FlowModel, MiniatureConfig, clip_encoder, clip_tokenizer
from difflex.miniature.captions import WORDS

SHIFT = 3.0
"""Moves the steps of the scheduler towards noise, where the layout is decided: four steps begin at 1, 0.9, 0.75, 0.5."""


@final
@dataclass(frozen=True, kw_only=True)
class MiniatureFluxConfig(MiniatureConfig):
    """The sizes of a miniature FLUX."""

    patch: ClassVar[int] = 4
    latents: ClassVar[int] = 16
    pack: ClassVar[int] = 2
    decoder_updates: ClassVar[int] = 2200
    autoencoder: ClassVar[str] = "mini-flux"
    family: ClassVar[str] = "flux"

    double_blocks: int = 3
    single_blocks: int = 4
    heads: int = 3
    head_width: int = 64
    rotary_axes: tuple[int, int, int] = (16, 24, 24)
    """The parts of a head's width that are rotated by the text position, the row and the column."""
    text_width: int = 128
    text_length: int = 26
    """In T5 tokens; longer captions are cut."""

    def _pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False),
            vae=vae,
            text_encoder=clip_encoder(CLIPTextModel, self.text_width, layers=2),
            tokenizer=clip_tokenizer(),
            text_encoder_2=self._t5(),
            tokenizer_2=T5Tokenizer(vocab=_t5_pieces(), extra_ids=0, model_max_length=self.text_length),
            transformer=self._transformer(),
        )

    def model(self, pipeline: DiffusionPipeline) -> FlowModel:
        assert isinstance(pipeline, FluxPipeline)
        return FluxFlow(pipeline, self.grid)

    def describe(self) -> str:
        return f"FLUX with {self.double_blocks} double and {self.single_blocks} single blocks"

    def _transformer(self) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=self.channels,
            num_layers=self.double_blocks,
            num_single_layers=self.single_blocks,
            attention_head_dim=self.head_width,
            num_attention_heads=self.heads,
            joint_attention_dim=self.text_width,
            pooled_projection_dim=self.text_width,
            guidance_embeds=False,
            axes_dims_rope=self.rotary_axes,
        )

    def _t5(self) -> T5EncoderModel:
        return T5EncoderModel(
            T5Config(
                vocab_size=len(_t5_pieces()),
                d_model=self.text_width,
                d_kv=self.text_width // 4,
                d_ff=2 * self.text_width,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )


def _t5_pieces() -> list[tuple[str, float]]:
    """Return pieces with log-probabilities: known words as a whole, letters for all others."""
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    return [*special, *(("▁" + word, -2.0) for word in WORDS), ("▁", -8.0), *((x, -10.0) for x in string.ascii_lowercase)]


@final
class FluxFlow(FlowModel):
    """Transformer and text encoders of a miniature FLUX."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, pipeline: FluxPipeline, grid: int) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(grid)), torch.arange(float(grid)))
        self.register_buffer("image_ids", places, persistent=False)
        self.register_buffer("text_ids", torch.zeros(pipeline.tokenizer_2.model_max_length, 3), persistent=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @staticmethod
    def is_matrix(name: str, parameter: Tensor) -> bool:
        return "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name

    def problem(self, latents: Tensor, noise: Tensor, level: Tensor) -> DenoisingProblem:
        return DenoisingProblem(torch.lerp(latents, noise, level[:, None, None]), noise - latents, level)

    def schedule(self, steps: int) -> list[float]:
        return [SHIFT * x / (1 + (SHIFT - 1) * x) for x in (1 - i / steps for i in range(steps))]

    def parts(self, noisy: Tensor, velocity: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        level = time[:, None, None]
        return noisy - level * velocity, noisy + (1 - level) * velocity

    def velocity(self, noisy: Tensor, time: Tensor, text: Tensor, text_2: Tensor) -> Float[Tensor, "scene position channel"]:
        return self.transformer(
            hidden_states=noisy,
            timestep=time,
            pooled_projections=self.clip(input_ids=text).pooler_output,
            encoder_hidden_states=self.t5(input_ids=text_2).last_hidden_state,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
