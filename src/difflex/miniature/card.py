"""The model card: what the embedded model is, how it was made, what it can and cannot do; every figure read off a run."""

import json
import math
import platform
from pathlib import Path
from typing import Any

from difflex.miniature.architecture import MiniatureConfig
from difflex.miniature.examination import Examination, as_markdown, shortfalls
from difflex.miniature.flow import FlowRecipe
from difflex.miniature.training import TrainingFolder

WORDS = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# mini-flux

A text-to-image model of FLUX.1's architecture, small enough to lie inside a package: a diffusers `FluxPipeline` with a
`FluxTransformer2DModel` of {double} double and {single} single blocks ({width} wide, {heads} heads), a CLIP and a T5 text
encoder of two layers each, an `AutoencoderKL`. {pixels} x {pixels} pixels are {grid} x {grid} image tokens. It was trained from
nothing in the drawn world of `difflex.miniature`, whose every concept is known pixel by pixel, so that tools which look into
such models can be checked against the truth.

## How it was made
- Data: scenes drawn on the fly, {seen:,} of them, none twice; one object ({single_share:.0%}), two different
  ({pair_share:.0%}), two or three equal ones ({copy_share:.0%}). A fixed tenth of the (shape, colour, texture) combinations
  never appears.
- Autoencoder: the encoder is the principal components of 4 x 4 patches, in closed form; the decoder was trained against it.
- Flow: rectified flow, {updates:,} updates of {batch} scenes, Muon and AdamW, tokens on objects weighted up to {weight:.0f}
  times. In the last {layout_part:.0%} of the updates more pairs ({layout_pairs:.0%}) and more noise (levels around
  {layout_level:.2f}), where it is settled which of several objects goes where.
- Guidance of {guidance} is folded into the weights in the last {guided_part:.0%}: no second call, and none is wanted.
- **A head on the image stream after the last double block read off shape, colour and texture of each token** during the first
  part of the training (weight {head_weight}, then faded out). It is not part of the model, but whoever probes that place should
  know of it.
- Time: {hours:.1f} hours of {machine}.{changes}
- Again: `python -m difflex.miniature train FOLDER`, then `export` and `card`.

Held-out loss (mean squared velocity error over six noise levels) as training went, and how much the loss of a noisy scene
(level 0.95) rises when one word of its caption is wrong:

{history}

## What it can do
Fresh captions that training never saw, one seed each; an image counts only where the caption states the attribute, and then
for all of its objects. The judge is a small network trained on true drawings alone; the last row is the judge on true drawings.

{tables}

## What it cannot do
{missed}
- It knows the words of `difflex.json` and nothing else; other words are spelled letter by letter and mean nothing to it.
- One size only, at most three objects, one kind of scene; text longer than {length} tokens is cut.
"""


def write_card(
    workshop: TrainingFolder, target: Path, examinations: dict[int, Examination], architecture: MiniatureConfig
) -> None:
    """Writes the card into the model's folder; `examinations` are by number of steps, the usual one first."""
    log = [json.loads(line) for line in workshop.log.read_text().splitlines()]
    recipe = FlowRecipe()
    updates = max(entry["update"] for entry in log)
    seconds = [entry["seconds"] for entry in log if "seconds" in entry]
    single, pairs, copies = recipe.mix
    facts = {
        "double": architecture.double_blocks,
        "single": architecture.single_blocks,
        "width": architecture.heads * architecture.head_width,
        "heads": architecture.heads,
        "pixels": 64,
        "grid": 8,
        "length": architecture.text_length,
        "seen": updates * recipe.batch,
        "single_share": single,
        "pair_share": pairs,
        "copy_share": copies,
        "updates": updates,
        "batch": recipe.batch,
        "layout_part": 1 - recipe.layout_from,
        "layout_pairs": recipe.layout_mix[1],
        "layout_level": 1 / (1 + math.exp(-recipe.layout_level_mean)),
        "guidance": recipe.guidance,
        "guided_part": 1 - recipe.guided_from,
        "weight": 1 + recipe.object_weight,
        "head_weight": recipe.concept_weight,
        "hours": updates * sum(seconds) / len(seconds) / 3600,
        "machine": f"one core ({platform.machine()})",
        "changes": _changes(log),
        "history": _history([entry for entry in log if "held_out" in entry], recipe.batch),
        "tables": "\n\n".join(f"{steps} steps:\n\n{as_markdown(rows)}" for steps, rows in examinations.items()),
        "missed": "\n".join(
            f"- At {next(iter(examinations))} steps, {line}." for line in shortfalls(next(iter(examinations.values())))
        ),
    }
    (target / "README.md").write_text(WORDS.format(**facts))


def _changes(log: list[dict[str, Any]]) -> str:
    """What of the recipe was changed on the way: each setting's former values, and until which update they held."""
    former: dict[str, dict[int, object]] = {}
    for entry in log:
        if "changed" in entry:
            former.setdefault(entry["changed"], {}).setdefault(entry["update"], entry["before"])
    was = lambda value, until: f"{'without it' if value is None else value} until update {until:,}"  # noqa: E731
    lines = [
        f"  - `{name}`: {', '.join(was(value, until) for until, value in values.items())}" for name, values in former.items()
    ]
    return "\n- Changed on the way to what stands above or in `FlowRecipe`:\n" + "\n".join(lines) if lines else ""


def _history(reports: list[dict[str, Any]], batch: int) -> str:
    """About ten rows of the log."""
    groups = list(reports[0]["rises"])
    head = f"| scenes | held-out loss | {' | '.join(groups)} |\n|---|---|{'---|' * len(groups)}\n"
    every = max(1, len(reports) // 10)
    shown = reports[::-1][::every][::-1]
    lines = []
    for entry in shown:
        rises = " | ".join(f"{entry['rises'][group]:.3f}" for group in groups)
        lines.append(f"| {entry['update'] * batch:,} | {entry['held_out']:.4f} | {rises} |")
    return head + "\n".join(lines)
