"""The miniature SDXL: a U-Net that predicts velocities at the noise levels of Stable Diffusion, ending in noise alone.

Attention is at the lowest of three resolutions, 8 x 8, where the sites of arXiv 2410.22366 are: down.2.1, mid.0, up.0.0, up.0.1.
A U-Net has no positional encoding: it knows places by the padding at the borders alone, which it learns late or never in a short
training. So two linear heads help: one reads the row and the column of each place from the last residual layer before `down.2.1`,
and one from the middle block whether an object covers it, which only the caption says at high noise.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from difflex.miniature.architecture import DenoisingProblem, FlowModel, MiniatureConfig, clip_encoder, clip_tokenizer
from difflex.miniature.world import PIXELS

TIME_ID_WIDTH = 8
TIME_IDS = (PIXELS, PIXELS, 0, 0, PIXELS, PIXELS)
"""Original size, crop and target size, as the pipeline has them by default."""
PLACE_WEIGHT, OBJECT_WEIGHT = 0.1, 0.2
"""Of the losses of the two heads."""


@final
@dataclass(frozen=True, kw_only=True)
class MiniatureSdxlConfig(MiniatureConfig):
    """The sizes of a miniature SDXL."""

    patch: ClassVar[int] = 2
    latents: ClassVar[int] = 8
    pack: ClassVar[int] = 1
    decoder_updates: ClassVar[int] = 800
    autoencoder: ClassVar[str] = "mini-sdxl"
    family: ClassVar[str] = "sdxl"

    widths: tuple[int, int, int] = (16, 32, 96)
    """Channels at 32 x 32, 16 x 16 and 8 x 8."""
    heads: int = 2
    layers: int = 1
    """Transformer layers of each attention block."""
    text_width: int = 96
    """Of each text encoder; the U-Net reads both side by side."""

    def _pipeline(self, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=vae,
            # The pipeline reads the last layer but one of each.
            text_encoder=clip_encoder(CLIPTextModel, self.text_width, layers=3),
            text_encoder_2=clip_encoder(CLIPTextModelWithProjection, self.text_width, layers=3),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=self._unet(),
            scheduler=EulerDiscreteScheduler(  # pyright: ignore[reportArgumentType] (it is one of them)
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
            ),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )

    def model(self, pipeline: DiffusionPipeline) -> FlowModel:
        assert isinstance(pipeline, StableDiffusionXLPipeline)
        return SdxlFlow(pipeline, self.grid)

    def describe(self) -> str:
        return f"SDXL with a U-Net of {', '.join(map(str, self.widths))} channels"

    def _unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=self.grid,
            in_channels=self.channels,
            out_channels=self.channels,
            block_out_channels=self.widths,
            layers_per_block=(1, 1, 2),  # pyright: ignore[reportArgumentType] (a number for each block)
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=self.layers,
            norm_num_groups=min(8, *self.widths),
            attention_head_dim=self.heads,  # diffusers reads it as their number
            cross_attention_dim=2 * self.text_width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=len(TIME_IDS) * TIME_ID_WIDTH + self.text_width,
        )


@final
class SdxlFlow(FlowModel):
    """U-Net and text encoders of a miniature SDXL."""

    signal: Tensor
    """The share of the latents by timestep: z = signal x latents + (1 - signal^2)^0.5 x noise."""
    levels: Tensor
    """The noise level of each timestep, as in a rectified flow of the same ratio of signal and noise; rising."""
    time_ids: Tensor

    def __init__(self, pipeline: StableDiffusionXLPipeline, grid: int) -> None:
        super().__init__()
        self.unet, self.clip, self.clip_2 = pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2
        self._grid, last = grid, self.unet.down_blocks[-1].resnets[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # as the pipeline: a training depends on its settings alone
            self.places, self.objects = nn.Linear(last.out_channels, 2 * (grid // 4)), nn.Linear(last.out_channels, 1)
        self._read: dict[str, Tensor] = {}
        last.register_forward_hook(partial(self._keep, "places"))
        self.unet.mid_block.register_forward_hook(partial(self._keep, "objects"))
        for unread in (self.clip.encoder.layers[-1], self.clip.final_layer_norm):
            unread.requires_grad_(False)
        signal = pipeline.scheduler.alphas_cumprod.float().sqrt()
        noise = (1 - signal**2).sqrt()
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("levels", noise / (signal + noise), persistent=False)
        self.register_buffer("time_ids", torch.tensor([TIME_IDS], dtype=torch.float32), persistent=False)

    def _keep(self, name: str, module: nn.Module, args: object, output: Tensor) -> None:
        self._read[name] = output.float().movedim(1, 3)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    @staticmethod
    def is_matrix(name: str, parameter: Tensor) -> bool:
        inside = name.startswith("unet.") and "_block" in name
        return inside and parameter.ndim in (2, 4) and ".norm" not in name and "time_emb" not in name

    def problem(self, latents: Tensor, noise: Tensor, level: Tensor) -> DenoisingProblem:
        time = torch.searchsorted(self.levels, level).clamp(max=len(self.levels) - 1)
        signal = self.signal[time, None, None]
        rest = (1 - signal**2).sqrt()
        return DenoisingProblem(signal * latents + rest * noise, signal * noise - rest * latents, time)

    def schedule(self, steps: int) -> list[Tensor]:
        last = len(self.levels)
        return [self.levels[round(last - i * last / steps) - 1] for i in range(steps)]

    def parts(self, noisy: Tensor, velocity: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.signal[time, None, None]
        rest = (1 - signal**2).sqrt()
        return signal * noisy - rest * velocity, rest * noisy + signal * velocity

    def velocity(self, noisy: Tensor, time: Tensor, text: Tensor, text_2: Tensor) -> Float[Tensor, "scene position channel"]:
        first, second = self.clip(text, output_hidden_states=True), self.clip_2(text_2, output_hidden_states=True)
        predicted = self.unet(
            noisy.movedim(2, 1).unflatten(2, (self._grid, self._grid)),
            time,
            encoder_hidden_states=torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": self.time_ids.expand(len(noisy), -1)},
            return_dict=False,
        )[0]
        return predicted.flatten(2).movedim(1, 2)

    def extra_loss(self, objects: Float[Tensor, "scene position"]) -> Tensor:
        """Return the cross-entropies of what the heads read."""
        scores = self.places(self._read["places"]).unflatten(3, (2, -1)).movedim(4, 1)
        index = torch.arange(scores.shape[1], device=scores.device)
        truth = torch.stack(torch.meshgrid(index, index, indexing="ij"), dim=-1)
        loss = PLACE_WEIGHT * F.cross_entropy(scores, truth.expand(len(scores), -1, -1, -1))
        covered = F.adaptive_avg_pool2d(objects.unflatten(1, (self._grid, self._grid)), scores.shape[2])
        return loss + OBJECT_WEIGHT * F.binary_cross_entropy_with_logits(self.objects(self._read["objects"])[..., 0], covered)
