"""The trained miniature as diffusers pipeline folders, and its model card, with every figure from the training itself."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from difflex.files import parsing, read_json, write_json
from difflex.miniature.architecture import untrained_pipeline
from difflex.miniature.captions import WORDS
from difflex.miniature.flow import SIZES, FlowModel
from difflex.miniature.scoring import Examination, as_markdown, shortfalls
from difflex.miniature.training import FORMAT, RESTART, TrainingFolder
from difflex.miniature.world import PIXELS
from difflex.tensors import read_tensors

STEPS = 4
RECORD = "training.json"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A text-to-image model with the architecture of FLUX.1, small enough to be part of a Python package: a diffusers `FluxPipeline`
with a `FluxTransformer2DModel` of {double} double and {single} single blocks ({width} wide, {heads} heads), a CLIP and a T5 text
encoder of two layers each, and an `AutoencoderKL`. Transformer and text encoders have {parameters:.2f} million parameters.
{pixels} x {pixels} pixels are 8 x 8 image tokens. It was trained from scratch on the drawn world of `difflex.miniature`, whose
concepts are known at every pixel, so that interpretability tools can be checked against the truth.

## Training
- Data: {scenes:,} scenes drawn on the fly, none twice: one object ({early[0]:.0%}), two different objects ({early[1]:.0%}), two
  or three equal ones ({early[2]:.0%}); after {layout:.0%} of the plain training {late[0]:.0%}, {late[1]:.0%} and {late[2]:.0%}.
  A fixed tenth of the (shape, colour, texture) combinations never appears. {dropped:.0%} of the captions are empty.
- Autoencoder: the encoder is the principal components of 4 x 4 patches, in closed form; the decoder was trained on its latents.
- Flow: plain rectified flow and no other loss, {updates:,} updates of {batch} scenes; Muon ({muon:g}) and AdamW ({adam:g}), with
  rates that are constant until {decay:.0%} of the plain training and then fall along a cosine; tokens on objects weighted up to
  {weight:g} times. The weights are a running average.
- Guidance: {guidance}
- {made_by}: {minutes:.1f} minutes on {machine}{siblings}.{notes}

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
FOLDED = """of {scale:g}, folded into the weights in {updates:,} more updates, in which targets are moved along the change that
  the caption makes in the velocity of the average weights from before. Generate with `guidance_scale=0`."""
PLAIN = "none. In `{name}`, which was trained from these weights, guidance of {scale:g} is folded in."


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How the weights of a pipeline folder came to be; `training.json` in the folder."""

    made_by: str
    """What was run."""
    machine: str
    seconds: float
    updates: int
    """Those before guidance."""
    guided_updates: int
    """Those in which guidance was folded in; 0 for weights from before."""
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
        guided = header["updates"] - header["plain_updates"]
        for name in header["sizes"]:
            for model, kind in {f"{name}-base": "base", name: "average"}.items() if guided else [(f"{name}-base", "average")]:
                pipeline = untrained_pipeline(SIZES[name].config, 0)
                for i, parameter in enumerate(FlowModel(pipeline).parameters()):
                    parameter.data.copy_(tensors[f"{name}.{kind}.{i}"])
                pipeline.register_modules(vae=run.load_autoencoder())
                folders.append(target / model)
                save_pipeline(pipeline, folders[-1])
                _record(header, name, guided if model == name else 0).save(folders[-1])
    return folders


def _record(header: dict[str, Any], name: str, guided_updates: int) -> TrainingRecord:
    return TrainingRecord(
        made_by="`python -m difflex.miniature train`",
        machine=header["machine"],
        seconds=header["seconds"],
        updates=header["plain_updates"],
        guided_updates=guided_updates,
        sizes=header["sizes"],
        muon_rate=SIZES[name].muon_rate,
        adam_rate=SIZES[name].adam_rate,
        recipe=header["recipe"],
        notes=[],
    )


def save_pipeline(pipeline: FluxPipeline, folder: Path) -> None:
    """Write a pipeline folder named as its model, the transformer in bfloat16, with the defaults of the model."""
    pipeline.register_modules(transformer=pipeline.transformer.to(torch.bfloat16))
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:  # a path of this machine
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    defaults = {
        "format": 1,
        "name": folder.name,
        "family": "flux",
        "pixels": [[PIXELS, PIXELS]],
        "steps": STEPS,
        "guidance": 0.0,
        "text_length": pipeline.tokenizer_2.model_max_length,
        "words": list(WORDS),
    }
    (folder / "difflex.json").write_text(json.dumps(defaults, indent=1) + "\n")


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


def write_card(model: Path, examinations: dict[int, Examination]) -> None:
    """Write the model card of a pipeline folder with a record; `examinations` are by number of steps, the default first."""
    record, pipeline = TrainingRecord.load(model), FluxPipeline.from_pretrained(model, dtype=torch.float32)
    transformer, recipe = pipeline.transformer, record.recipe
    total = record.updates + record.guided_updates
    guidance = (FOLDED if record.guided_updates else PLAIN).format(
        name=model.name.removesuffix("-base"), scale=recipe["guidance"], updates=record.guided_updates
    )
    siblings = [name for name in record.sizes if name != model.name.removesuffix("-base")]
    default, examination = next(iter(examinations.items()))
    card = CARD.format(
        name=model.name,
        double=transformer.config.num_layers,
        single=transformer.config.num_single_layers,
        width=transformer.inner_dim,
        heads=transformer.config.num_attention_heads,
        parameters=sum(x.numel() for x in FlowModel(pipeline).parameters()) / 1e6,
        pixels=PIXELS,
        scenes=total * recipe["batch"],
        early=recipe["mixes"][0],
        late=recipe["mixes"][1],
        layout=recipe["layout_from"],
        dropped=recipe["drop_caption"],
        updates=record.updates,
        batch=recipe["batch"],
        muon=record.muon_rate,
        adam=record.adam_rate,
        decay=recipe["decay_from"],
        weight=1 + recipe["object_weight"],
        guidance=guidance,
        made_by=record.made_by,
        minutes=record.seconds / 60,
        machine=record.machine,
        siblings="".join(f", together with `{name}` on the same scenes" for name in siblings),
        notes="".join(f"\n- {note}" for note in record.notes),
        tables="\n\n".join(f"{steps} steps:\n\n{as_markdown(rows)}" for steps, rows in examinations.items()),
        missed="\n".join(f"- At {default} steps, {line}." for line in shortfalls(examination)),
        length=pipeline.tokenizer_2.model_max_length,
    )
    (model / "README.md").write_text(card)
