"""Draw the pictures of README.md from the study of the recipe `mini_full`: python docs/pictures.py STUDY."""

import sys
from pathlib import Path

from PIL import Image

import difflex
from difflex.images import contact_sheet

DOCS = Path(__file__).parent
PROMPT, SEED, REGION = "a large red heart in the center on sand", 5, (0.25, 0.25, 0.75, 0.75)
FEATURES = ("heart", "star", "cyan", "green", "checkered", "dotted", "night", "brick")
STEERED = {"cyan": ("double.2", 1.5), "checkered": ("double.2", 3.0), "shiny": ("double.2", 3.0), "circle": ("double.1", 3.0)}
"""Concept -> the block whose smooth site it is added at, and the largest strength in peaks."""
FRAMES = 7


def main(folder: str) -> None:
    """Write features.png and steering.gif beside this file."""
    study = difflex.open_study(folder)
    found = {name: study.dictionary("double.2:smooth/topk-2048-k32").search(name)[0] for name in FEATURES}
    rows = [feature.images(6) for feature in found.values()]
    labels = [f"{name}: feature {feature.number}" for name, feature in found.items()]
    contact_sheet(rows, row_labels=labels, column_labels=[""] * 6, side=96).save(DOCS / "features.png", optimize=True)

    model, frames = study.model, list[Image.Image]()
    steered = {name: study.dictionary(f"{block}:smooth/topk-2048-k32").search(name)[0] for name, (block, _) in STEERED.items()}
    for frame in range(FRAMES):
        strengths = {name: most * frame / (FRAMES - 1) for name, (_, most) in STEERED.items()}
        edits = [feature.edit(strengths[name], region=REGION) for name, feature in steered.items()]
        images = [model.generate(PROMPT, seed=SEED, edits=[edit])[0].image for edit in edits]
        titles = [f"{name}, {strength:.2g} peaks" for name, strength in strengths.items()]
        frames.append(contact_sheet([images], row_labels=[""], column_labels=titles, side=192))
    still = [frames[-1]] * 3  # the end is shown longer
    frames[0].save(DOCS / "steering.gif", save_all=True, append_images=[*frames[1:], *still], duration=500, loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
