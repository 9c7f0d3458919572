"""The trained miniature as a diffusers pipeline folder, and its model card, with every figure from the run itself."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from jaxtyping import Float
from torch import Tensor

from difflex.miniature.architecture import MiniatureConfig, untrained_pipeline
from difflex.miniature.captions import WORDS
from difflex.miniature.flow import FlowModel, FlowRecipe
from difflex.miniature.scoring import Examination, as_markdown, shortfalls
from difflex.miniature.training import TrainingFolder, load_average
from difflex.miniature.world import PIXELS

STEPS = 4
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# mini-flux

A text-to-image model with the architecture of FLUX.1, small enough to be part of a Python package: a diffusers `FluxPipeline`
with a `FluxTransformer2DModel` of {double} double and {single} single blocks ({width} wide, {heads} heads), a CLIP and a T5 text
encoder of two layers each, and an `AutoencoderKL`. {pixels} x {pixels} pixels are 8 x 8 image tokens. It was trained
from scratch on the drawn world of `difflex.miniature`, whose concepts are known at every pixel, so that interpretability tools
can be checked against the truth.

## Training
- Data: {seen:,} scenes drawn on the fly, none twice: one object ({flow.mix[0]:.0%}), two different objects
  ({flow.mix[1]:.0%}), two or three equal ones ({flow.mix[2]:.0%}). A fixed tenth of the (shape, colour, texture) combinations
  never appears.
- Autoencoder: the encoder is the principal components of 4 x 4 patches, in closed form; the decoder was trained on its latents.
- Flow: rectified flow, {updates:,} updates of {flow.batch} scenes, Muon and AdamW, tokens on objects weighted up to {weight:.0f}
  times. The last {layout_part:.0%} of the updates have more pairs ({flow.layout_mix[1]:.0%}) and higher noise levels (around
  {layout_level:.2f}), at which the positions of several objects are decided.
- Guidance of {flow.guidance} is distilled into the weights in the last {guided_part:.0%}: generate with `guidance_scale=0`.
- **A head on the image stream after the last double block predicted shape, colour and texture of each token** during the first
  part of the training (weight {head_weight}, then faded out). It is not part of the model, but matters to anyone who probes
  that block.
- Time: {hours:.1f} hours of {machine}.{changes}
- To train it again: `python -m difflex.miniature train FOLDER`, then `export` and `card`.

Held-out loss (mean squared velocity error over six noise levels) during training, and the increase of the loss of a noisy scene
(level 0.95) when one word of its caption is wrong:

{history}

## Results
Captions that training never saw, with one image each. An attribute counts only where the caption states it, and it is correct
if it is correct for all objects. The judge is a small network trained on true drawings alone; the last row is the judge on true
drawings.

{tables}

## Limits
{missed}
- It knows the words of `difflex.json` only; other words are spelled letter by letter and mean nothing to it.
- One image size, at most three objects, one kind of scene; captions are cut after {length} tokens.
"""


def export(run: TrainingFolder, target: Path, architecture: MiniatureConfig) -> FluxPipeline:
    """Write the averaged weights as a pipeline folder, the transformer in bfloat16, and return the pipeline read from it."""
    pipeline = untrained_pipeline(architecture, seed=0)
    load_average(FlowModel(pipeline), run.flow)
    vae = AutoencoderKL.from_pretrained(run.autoencoder)
    pipeline.register_modules(vae=vae, transformer=pipeline.transformer.to(torch.bfloat16))
    pipeline.save_pretrained(target)
    for path in target.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:  # a path of this machine
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    defaults = {
        "format": 1,
        "name": "mini-flux",
        "family": "flux",
        "pixels": [[PIXELS, PIXELS]],
        "steps": STEPS,
        "guidance": 0.0,
        "text_length": architecture.text_length,
        "words": list(WORDS),
    }
    (target / "difflex.json").write_text(json.dumps(defaults, indent=1) + "\n")
    return FluxPipeline.from_pretrained(target, dtype=torch.float32)


@torch.no_grad()
def generate_images(
    pipeline: FluxPipeline, captions: list[str], steps: int = STEPS, seed: int = 0
) -> Float[Tensor, "caption 3 height width"]:
    """Generate images in [0, 1], that of caption i from the noise of seed + i."""
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


def write_card(run: TrainingFolder, target: Path, examinations: dict[int, Examination], architecture: MiniatureConfig) -> None:
    """Write the model card to the model's folder; `examinations` are by number of steps, the default number first."""
    log = [json.loads(line) for line in run.log.read_text().splitlines()]
    recipe = FlowRecipe()
    updates = max(entry["update"] for entry in log)
    seconds = [entry["seconds"] for entry in log if "seconds" in entry]
    default, examination = next(iter(examinations.items()))
    card = CARD.format(
        double=architecture.double_blocks,
        single=architecture.single_blocks,
        heads=architecture.heads,
        length=architecture.text_length,
        flow=recipe,
        width=architecture.heads * architecture.head_width,
        pixels=PIXELS,
        seen=updates * recipe.batch,
        updates=updates,
        layout_part=1 - recipe.layout_from,
        layout_level=1 / (1 + math.exp(-recipe.layout_level_mean)),
        guided_part=1 - recipe.guided_from,
        weight=1 + recipe.object_weight,
        head_weight=recipe.concept_weight,
        hours=updates * sum(seconds) / len(seconds) / 3600,
        machine=f"one core ({platform.machine()})",
        changes=_changes(log),
        history=_history([entry for entry in log if "held_out" in entry], recipe.batch),
        tables="\n\n".join(f"{steps} steps:\n\n{as_markdown(rows)}" for steps, rows in examinations.items()),
        missed="\n".join(f"- At {default} steps, {line}." for line in shortfalls(examination)),
    )
    (target / "README.md").write_text(card)


def _changes(log: list[dict[str, Any]]) -> str:
    """Describe changes of the recipe during training: the former values of each setting, with their last updates."""
    former: dict[str, dict[int, object]] = {}
    for entry in log:
        if "changed" in entry:
            former.setdefault(entry["changed"], {}).setdefault(entry["update"], entry["before"])
    line = lambda value, until: f"{'absent' if value is None else value} until update {until:,}"  # noqa: E731
    lines = [
        f"  - `{name}`: {', '.join(line(value, until) for until, value in values.items())}" for name, values in former.items()
    ]
    return "\n- Settings that changed during training, with their former values:\n" + "\n".join(lines) if lines else ""


def _history(reports: list[dict[str, Any]], batch: int) -> str:
    """Return a table of about ten entries of the log."""
    groups = list(reports[0]["rises"])
    head = f"| scenes | held-out loss | {' | '.join(groups)} |\n|---|---|{'---|' * len(groups)}\n"
    lines = []
    for entry in reports[::-1][:: max(1, len(reports) // 10)][::-1]:
        rises = " | ".join(f"{entry['rises'][group]:.3f}" for group in groups)
        lines.append(f"| {entry['update'] * batch:,} | {entry['held_out']:.4f} | {rises} |")
    return head + "\n".join(lines)
