"""The trained miniature as diffusers pipeline folders, and its model card, with every figure from the training itself."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from difflex.files import parsing, read_json, write_json
from difflex.miniature.architecture import MiniatureConfig
from difflex.miniature.captions import WORDS
from difflex.miniature.flow import SIZES
from difflex.miniature.scoring import Examination, as_markdown, shortfalls
from difflex.miniature.training import FORMAT, RESTART, TrainingFolder
from difflex.miniature.world import PIXELS
from difflex.tensors import read_tensors

STEPS, MANY_STEPS = 4, 20
"""Steps for models with and without guidance folded in."""
RECORD = "training.json"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

{architecture}: {millions:.2f} M parameters without the autoencoder. It was
trained from scratch on the drawn world of `difflex.miniature`, whose concepts are known at every pixel, so that interpretability
tools can be checked against the truth.

## Training
- {record.made_by}: {minutes:.1f} minutes on {record.machine}{siblings}.
- Data: {scenes:,} scenes drawn on the fly, none twice: one object ({recipe[mixes][0][0]:.0%}), two different objects
  ({recipe[mixes][0][1]:.0%}), two or three equal ones ({recipe[mixes][0][2]:.0%}); in the last {late:.0%} of the training before
  guidance {recipe[mixes][1][0]:.0%}, {recipe[mixes][1][1]:.0%} and {recipe[mixes][1][2]:.0%}. A fixed tenth of the (shape,
  colour, texture) combinations never appears. {recipe[drop_caption]:.0%} of the captions are empty.
- Loss: {loss}, in bfloat16 on a GPU, in float32 on a CPU. {place} on an object
  weighs up to {weight:g} times as much as one on the background; the extra weight falls to zero between noise levels
  {recipe[doubt][0]} and {recipe[doubt][1]}. Noise levels are the sigmoid of normal numbers of mean {recipe[levels][0][0]} and
  spread {recipe[levels][0][1]}, in that last part {recipe[levels][1][0]} and {recipe[levels][1][1]}.
  {heads}
- Optimisers: Muon for the matrices of the blocks (learning rate {record.muon_rate:g}), AdamW for the rest
  ({record.adam_rate:g}), level until {recipe[decay_from]:.0%} of the training before guidance, then along a cosine to 2%.
  {record.updates:,} updates of {recipe[batch]} scenes. The weights are a running average ({recipe[averaging][0]} an update).
- Guidance: {guidance}
{one_step}- Autoencoder: the encoder is the principal components of {patch} x {patch} patches, in closed form; the decoder was
  trained on its latents.
{notes}
## Results
Captions that training never saw, with one image each. An attribute counts only where the caption states it, and it is correct
if it is correct for all objects. The judge is a small network trained on true drawings alone; the last row is the judge on true
drawings. The last column counts unseen combinations of shape, colour and texture with both shape and colour correct.

{tables}

## Limits
{missed}
- It knows the words of `difflex.json` only; other words are spelled letter by letter and mean nothing to it.
- One image size, at most three objects, one kind of scene; captions are cut after {length} tokens.
"""
FOLDED = """of {recipe[guidance]:g}, folded into the weights in {record.guided_updates:,} more updates: targets are moved by
  {share:g} times the change that the caption makes in the velocity of the average weights from before; learning rates from
  {recipe[guided_rate]:.0%} to zero, running average {recipe[averaging][1]}. Generate with `guidance_scale=0`."""
ONE_STEP = """- One step: in {record.one_step_updates:,} last updates {recipe[one_step_share]:.0%} of a batch were noise alone.
  Their targets were what the average weights from before draw of the same noise in {recipe[one_step_of]} steps, those of the
  others the velocity of these weights. Learning rates from {recipe[one_step_rate]:.0%} to zero, running average
  {recipe[averaging][1]}.
"""
FLUX = """A text-to-image model with the architecture of FLUX.1, small enough to be part of a Python package: a diffusers
`FluxPipeline` with a `FluxTransformer2DModel` of {config.num_layers} double and {config.num_single_layers} single blocks
({width} wide, {config.num_attention_heads} heads), a CLIP and a T5 text encoder of two layers each
({config.joint_attention_dim} wide), and an `AutoencoderKL`. {pixels} x {pixels} pixels are 8 x 8 image tokens"""
SDXL = """A text-to-image model with the architecture of SDXL, small enough to be part of a Python package: a diffusers
`StableDiffusionXLPipeline` with a `UNet2DConditionModel` of {config.block_out_channels} channels, two CLIP text encoders of three
layers each ({text_width} wide), an `AutoencoderKL` and an `EulerDiscreteScheduler` whose first step begins at noise alone.
{pixels} x {pixels} pixels are 8 x 8 positions at the attention blocks `down.2.0`, `down.2.1`, `mid.0`, `up.0.0`, `up.0.1` and
`up.0.2`; unlike in SDXL, the middle resolution has no attention"""
PLACES = """Two linear heads help, as a U-Net has no positional encoding: one reads the row and the column of each place from the
  last residual layer before `down.2.1`, one from the middle block whether an object covers it; no head reads concepts."""
PLAIN = """none is folded in, unlike in `{base}`, which was trained further from these weights. Guidance of
  {recipe[guidance]:g} takes a second call in each step, with the empty caption (`{flag}={recipe[guidance]:g}`)."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How the weights of a pipeline folder came to be; `training.json` in the folder."""

    made_by: str
    """What was run."""
    machine: str
    seconds: float
    """Of the training up to these weights, without compilation."""
    updates: int
    """Those before guidance."""
    guided_updates: int
    """Those in which guidance was folded in; 0 for weights from before."""
    one_step_updates: int = 0
    """Those in which the model learned to draw in one step."""
    sizes: list[str]
    """All sizes that were trained on the same scenes."""
    muon_rate: float
    adam_rate: float
    recipe: dict[str, Any]
    """The fields of the `FlowRecipe`."""
    notes: list[str]
    """More lines for the model card."""

    def save(self, model: Path) -> None:
        """Write the record to the folder of the model."""
        write_json(model / RECORD, 1, asdict(self))

    @classmethod
    def load(cls, model: Path) -> "TrainingRecord":
        """Read the record in the folder of a model."""
        advice = "`python -m difflex.miniature export` writes it."
        with parsing(model / RECORD, "the record of a training", advice):
            return cls(**read_json(model / RECORD, 1, advice))


def export(run: TrainingFolder, target: Path) -> list[Path]:
    """Write the average weights of each size as pipeline folders in `target`; return these.

    NAME-base has the average from before guidance, NAME that of the end. Before guidance begins there is only the former.
    """
    header, tensors = read_tensors(run.flow, FORMAT, RESTART)
    folders = []
    with parsing(run.flow, "a training state", RESTART):
        for name in header["sizes"]:
            kinds = {f"{name}-base": "base", name: "average"} if f"{name}.base.0" in tensors else {f"{name}-base": "average"}
            for model, kind in kinds.items():
                config = SIZES[name].config
                pipeline = config.pipeline(0)
                for i, parameter in enumerate(config.model(pipeline).parameters()):
                    parameter.data.copy_(tensors[f"{name}.{kind}.{i}"])
                pipeline.register_modules(vae=run.load_autoencoder(config))
                folders.append(target / model)
                save_pipeline(pipeline, folders[-1], 0.0 if model == name else header["recipe"]["guidance"], config)
                _record(header, name, model == name).save(folders[-1])
    return folders


def _record(header: dict[str, Any], name: str, is_folded: bool) -> TrainingRecord:
    return TrainingRecord(
        made_by="Made by `python -m difflex.miniature train`",
        machine=header["machine"],
        seconds=header["seconds" if is_folded else "plain_seconds"],
        updates=header["plain_updates"],
        guided_updates=is_folded * header["guided_updates"],
        one_step_updates=is_folded * (header["updates"] - header["plain_updates"] - header["guided_updates"]),
        sizes=header["sizes"],
        muon_rate=SIZES[name].muon_rate,
        adam_rate=SIZES[name].adam_rate,
        recipe=header["recipe"],
        notes=[],
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, guidance: float, config: MiniatureConfig) -> None:
    """Write a pipeline folder named as its model, the denoiser in bfloat16.

    `guidance` is that of the model by default, 0 where it is folded in.
    """
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    pipeline.register_modules(**{denoiser: pipeline.components[denoiser].to(torch.bfloat16)})
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("_name_or_path", None) is not None:  # a path of this machine
            path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = "before guidance is folded in: made for more steps, with guidance" if guidance else "guidance is folded in"
    defaults = {
        "format": 1,
        "name": folder.name,
        "description": f"{config.describe()}, trained on the drawn world; {state}.",
        "family": config.family,
        "pixels": [[PIXELS, PIXELS]],
        "steps": MANY_STEPS if guidance else STEPS,
        "guidance": guidance,
        "text_length": pipeline.tokenizer_2.model_max_length,
        "words": list(WORDS),
    }
    (folder / "difflex.json").write_text(json.dumps(defaults, indent=1) + "\n")


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline, captions: list[str], steps: int = STEPS, seed: int = 0, guidance: float = 1.0
) -> Float[Tensor, "caption 3 height width"]:
    """Generate images in [0, 1], that of caption i from the noise of seed + i.

    Guidance above 1 takes a second call in each step, or one of both halves.
    """
    chunks, generate = [], cast("Callable[..., tuple[Tensor]]", pipeline)  # the base class has no call
    for first in range(0, len(captions), 32):
        chunk = captions[first : first + 32]
        guided: dict[str, object] = {"guidance_scale": guidance}
        if isinstance(pipeline, FluxPipeline):
            guided = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(chunk), "guidance_scale": 0.0}
            guided["max_sequence_length"] = pipeline.tokenizer_2.model_max_length
        chunks.append(
            generate(
                prompt=chunk,
                height=PIXELS,
                width=PIXELS,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))],
                output_type="pt",
                return_dict=False,
                **guided,
            )[0]
        )
    return torch.cat(chunks).float().clamp(0, 1)


def write_card(model: Path, examinations: dict[str, Examination]) -> None:
    """Write the model card of a pipeline folder with a record; `examinations` are by title, the most important first."""
    record, pipeline = TrainingRecord.load(model), DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    recipe, base = record.recipe, model.name.removesuffix("-base")
    guidance = FOLDED if record.guided_updates else PLAIN
    is_unet = isinstance(pipeline, StableDiffusionXLPipeline)
    trained = [part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "vae"]
    title, examination = next(iter(examinations.items()))
    card = CARD.format(
        name=model.name,
        architecture=_describe_unet(pipeline) if is_unet else _describe_flux(pipeline),
        loss="plain diffusion, velocity prediction" if is_unet else "plain rectified flow",
        patch=2 ** (len(pipeline.vae.config["block_out_channels"]) - 1),
        place="A place" if is_unet else "A token",
        heads=PLACES if is_unet else "There is no other loss: no head reads concepts from the activations.",
        millions=sum(x.numel() for part in trained for x in part.parameters()) / 1e6,
        record=record,
        recipe=recipe,
        minutes=record.seconds / 60,
        siblings="".join(f", together with `{name}` on the same scenes" for name in record.sizes if name != base),
        scenes=(record.updates + record.guided_updates + record.one_step_updates) * recipe["batch"],
        late=1 - recipe["layout_from"],
        weight=1 + recipe["object_weight"],
        guidance=guidance.format(
            base=base,
            record=record,
            recipe=recipe,
            share=recipe["guidance"] - 1,
            flag="guidance_scale" if is_unet else "true_cfg_scale",
        ),
        one_step=ONE_STEP.format(record=record, recipe=recipe) if record.one_step_updates else "",
        notes="".join(f"- {note}\n" for note in record.notes),
        tables="\n\n".join(f"{name}:\n\n{as_markdown(rows)}" for name, rows in examinations.items()),
        missed="\n".join(f"- {title}: {line}." for line in shortfalls(examination)),
        length=pipeline.tokenizer_2.model_max_length,
    )
    (model / "README.md").write_text(card)


def _describe_flux(pipeline: DiffusionPipeline) -> str:
    transformer = pipeline.components["transformer"]
    return FLUX.format(config=transformer.config, width=transformer.inner_dim, pixels=PIXELS)


def _describe_unet(pipeline: DiffusionPipeline) -> str:
    width = pipeline.components["text_encoder"].config.hidden_size
    return SDXL.format(config=pipeline.components["unet"].config, text_width=width, pixels=PIXELS)
