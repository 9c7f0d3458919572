"""`difflex icon`: what a feature draws on its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.flags import Range, Strengths
from difflex.commands.generate import FORMATS, write_image
from difflex.commands.inputs import load_study_model
from difflex.errors import BadInput
from difflex.images import contact_sheet
from difflex.records import Edit
from difflex.steering import StudyEditor
from difflex.study import Command, Study

__all__ = ["IconCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class IconCommand(Command):
    """Draw what features say on their own, for an empty prompt; a row for each.

    At an `update` site the block gives nothing but the feature. At others it is added to what is there: without its stream, in
    which the noise is, a model draws nothing.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with a dictionary."""
    dictionary: Annotated[Positional[str], arg(metavar="DICTIONARY")]
    """SITE/LABEL, or the site alone where it has one dictionary: double.18."""
    features: Annotated[Positional[tuple[int, ...]], arg(metavar="FEATURE...")]
    """Which features; each is drawn by itself."""
    strength: Strengths = (0.5, 1.0, 2.0)
    """How much of its peak; several make a column each."""
    steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps; END is left out."""
    seed: int = 0
    """Of the noise."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("icons.png")
    """Where the grid goes: .png, .webp or .jpg."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if self.out.suffix.lower() not in FORMATS:
            raise BadInput(f"--out {self.out} does not name an image file. End it with one of: {' '.join(FORMATS)}")
        if not self.features:
            raise BadInput("No feature was named. Name one or more by their numbers.")
        toolbox = StudyEditor(Study.open(self.study))
        place = toolbox.study.find_dictionary(self.dictionary)
        pipe = load_study_model(toolbox.study, None, self.offload, self.offline)
        edit = Edit(
            operation="replace" if place.site.kind == "update" else "add",
            site=place.site,
            dictionary=place.label,
            steps=None if self.steps is None else (self.steps.start, self.steps.stop),
        )
        rows = []
        for feature in self.features:
            edits = [replace(edit, features=(feature,), strength=strength) for strength in self.strength]
            rows.append([pipe.generate("", seed=self.seed, edits=toolbox.steering_hooks([each]))[0].image for each in edits])
        columns = [f"{strength:g} peak" for strength in self.strength]
        labels = [f"{place}, feature {feature}" for feature in self.features]
        write_image(contact_sheet(rows, row_labels=labels, column_labels=columns), self.out)
        print(f"{self.out.resolve()}: {len(rows)} features at {len(columns)} strengths")
        return [self.out]
