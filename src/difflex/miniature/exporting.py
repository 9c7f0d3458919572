"""The trained miniature as a pipeline folder that anyone with diffusers can read, and its model card."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from jaxtyping import Float
from torch import Tensor

from difflex.miniature.architecture import MiniatureConfig, untrained_pipeline
from difflex.miniature.captions import WORDS
from difflex.miniature.flow import FlowModel
from difflex.miniature.training import TrainingFolder, write_average
from difflex.miniature.world import PIXELS

STEPS = 4


def export(workshop: TrainingFolder, target: Path, architecture: MiniatureConfig) -> FluxPipeline:
    """Writes the averaged weights as a pipeline folder, the transformer in bfloat16; gives the pipeline back as read from it."""
    pipeline = untrained_pipeline(architecture, seed=0)
    write_average(FlowModel(pipeline), workshop.flow)
    vae = AutoencoderKL.from_pretrained(workshop.autoencoder)
    pipeline.register_modules(vae=vae, transformer=pipeline.transformer.to(torch.bfloat16))
    pipeline.save_pretrained(target)
    _without_origins(target)
    (target / "difflex.json").write_text(json.dumps(settings(architecture), indent=1) + "\n")
    return FluxPipeline.from_pretrained(target, dtype=torch.float32)


def _without_origins(folder: Path) -> None:
    """Nothing; the configs no longer say from which folders of this machine their parts were read."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def settings(architecture: MiniatureConfig) -> dict[str, object]:
    """What a loader should know of the model besides its weights."""
    return {
        "format": 1,
        "name": "mini-flux",
        "family": "flux",
        "pixels": [[PIXELS, PIXELS]],
        "steps": STEPS,
        "guidance": 0.0,
        "text_length": architecture.text_length,
        "words": list(WORDS),
    }


@torch.no_grad()
def images(
    pipeline: FluxPipeline, captions: list[str], steps: int = STEPS, seed: int = 0
) -> Float[Tensor, "caption 3 height width"]:
    """Generated images in [0, 1], caption i from the noise of seed + i."""
    chunks = []
    for first in range(0, len(captions), 32):
        chunk = captions[first : first + 32]
        chunks.append(
            pipeline(
                prompt=chunk,
                height=PIXELS,
                width=PIXELS,
                num_inference_steps=steps,
                guidance_scale=0.0,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))],
                output_type="pt",
                return_dict=False,
            )[0]
        )
    return torch.cat(chunks).float().clamp(0, 1)
