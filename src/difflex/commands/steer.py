"""`difflex steer`: the same images with a feature added, set, scaled or taken away, as one labelled grid."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, final

from PIL import Image, ImageChops
from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Operation, Unit
from difflex.commands.flags import Range, Strengths
from difflex.commands.generate import FORMATS, write_image
from difflex.commands.inputs import load_study_model, stored_strength
from difflex.errors import BadInput
from difflex.images import contact_sheet
from difflex.pipeline import GeneratedImage, Pipeline
from difflex.records import Edit, Rectangle, Shot, Site, TransplantSource
from difflex.steering import EditRecord, StudyEditor, rectangle
from difflex.steering.hooks import TransplantMaps
from difflex.study import Command, DictionaryRef, Study

__all__ = ["SteerCommand"]

AMPLIFIED = 4
"""How much stronger a difference is shown than it is."""


@final
@dataclass(frozen=True, kw_only=True)
class SteerCommand(Command):
    """Draw images while features of a dictionary, or a direction found by contrast, are changed; unedited ones stand first."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with a dictionary or a contrast."""
    dictionary: Annotated[Positional[str | None], arg(metavar="DICTIONARY", help_behavior_hint="(or --contrast)")] = None
    """SITE/LABEL, or the site alone where it has one dictionary: double.18."""
    features: Annotated[Positional[tuple[int, ...]], arg(metavar="FEATURE...")] = ()
    """Which features; all are changed alike."""
    prompt: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ("",)
    """What to draw."""
    contrast: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(instead of a dictionary)")] = None
    """A direction that `difflex contrast` found."""
    operation: Operation = "add"
    """Add without looking; set, scale or ablate what the feature says of the image; let nothing else through; or transplant."""
    strength: Annotated[Strengths | None, arg(help_behavior_hint="(default: the largest that is safe, at most 2 peaks)")] = None
    """How much; several make a column each. What is ablated or transplanted has no strength."""
    unit: Unit = "peak"
    """What 1 is: the feature's largest code, its mean code, the mean length of an activation, or a code of 1."""
    region: Annotated[str | None, arg(metavar="REGION", help_behavior_hint="(default: everywhere)")] = None
    """LEFT,TOP,RIGHT,BOTTOM in fractions or pixels; an image that is white there; or `fires`: where the features fire."""
    edit_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps; END is left out."""
    half: Literal["conditional", "both", "opposed"] = "conditional"
    """Under guidance: the conditional half, both, or the unconditional one with the opposite sign."""
    source: Annotated[str | None, arg(metavar="PROMPT", help_behavior_hint="(needed to transplant)")] = None
    """Which generation a transplant takes the maps of the features from."""
    source_seed: Annotated[int, arg(metavar="SEED")] = 0
    """And its seed."""
    source_region: Annotated[str | None, arg(metavar="REGION", help_behavior_hint="(default: everywhere)")] = None
    """Which part of it; laid onto the region, middle on middle."""
    seeds: Range = range(1)
    """Seeds of the noise; END is left out."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's own)")] = None
    """Denoising steps in all."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="(default: the model's own)")] = None
    """How strongly the prompt is followed."""
    differences: FlagCreatePairsOff[bool] = False
    """Beneath each row, how far it is from the unedited image, four times as strong."""
    record: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: nowhere)")] = None
    """Write the edit down, so that --replay makes the same images again."""
    replay: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(instead of all of the above)")] = None
    """Make a recorded edit again."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("steered.png")
    """Where the grid goes: .png, .webp or .jpg."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if self.out.suffix.lower() not in FORMATS:
            raise BadInput(f"--out {self.out} does not name an image file. End it with one of: {' '.join(FORMATS)}")
        toolbox = StudyEditor(Study.open(self.study))
        recorded = None if self.replay is None else EditRecord.load(self.replay)
        if recorded is not None:
            recorded.check(toolbox)
        pipe = load_study_model(toolbox.study, None, self.offload, self.offline)
        columns = [recorded.edits] if recorded else [(edit,) for edit in self._edits(toolbox, pipe)]
        plain = [recorded.shot] if recorded else self._shots(pipe)
        if self.record is not None and (len(plain) > 1 or len(columns) > 1):
            raise BadInput(
                f"One edit of one image can be recorded; there are {len(columns)} edits and {len(plain)} images. Name one."
            )
        drawn = [self._drawn(pipe, toolbox, plain, edits) for edits in [(), *columns]]
        write_image(self._sheet(plain, columns, drawn), self.out)
        written = [self.out]
        if self.record is not None:
            recorded = EditRecord(shot=plain[0], edits=tuple(columns[0]), checksums=toolbox.checksums(columns[0]))
            written.append(recorded.save(self.record))
        print(f"{', '.join(str(path.resolve()) for path in written)}: {len(plain) * len(drawn)} images")
        return written

    def _edits(self, toolbox: StudyEditor, pipe: Pipeline) -> list[Edit]:
        """One for each strength."""
        pixels = next(pipe.shots("")).pixels
        place = None if self.dictionary is None else toolbox.study.find_dictionary(self.dictionary)
        if place is None and self.contrast is None:
            raise BadInput("What to steer with was not said. Name a dictionary and a feature, or --contrast NAME.")
        site = place.site if place is not None else toolbox.contrast(self.contrast or "").site
        source = (
            None
            if self.source is None
            else TransplantSource(prompt=self.source, seed=self.source_seed, region=_region(self.source_region, pixels))
        )
        edit = Edit(
            operation=self.operation,
            site=site,
            dictionary=None if place is None else place.label,
            features=self.features,
            contrast=self.contrast,
            unit=self.unit,
            region=_region(self.region, pixels),
            steps=None if self.edit_steps is None else (self.edit_steps.start, self.edit_steps.stop),
            half=self.half,
            source=source,
        )
        if self.strength is None:
            return [self._safe(edit, toolbox)]
        return [replace(edit, strength=strength) for strength in self.strength]

    def _safe(self, edit: Edit, toolbox: StudyEditor) -> Edit:
        """The edit at the strength that is taken where none is named."""
        if self.operation == "scale":
            raise BadInput(
                "--operation scale multiplies codes, and by 1 nothing changes. Name a --strength: 0 for none, 2 for twice."
            )
        if edit.dictionary is None or self.operation not in ("add", "set", "replace"):
            return edit
        if edit.unit != "peak":
            raise BadInput(
                f"Without --strength it is in peaks, not in units of {edit.unit}. Name a --strength, or leave out --unit."
            )
        kept = stored_strength(toolbox.study, DictionaryRef(edit.site, edit.dictionary), edit.features)
        return toolbox.with_default_strength(edit, kept)

    def _shots(self, pipe: Pipeline) -> list[Shot]:
        shots = pipe.shots(self.prompt, seeds=self.seeds, steps=self.steps, keep_steps=[0], guidance=self.guidance)
        return [replace(shot, timestep=None) for shot in shots]

    def _drawn(self, pipe: Pipeline, toolbox: StudyEditor, shots: Sequence[Shot], edits: Sequence[Edit]) -> list[Image.Image]:
        """The image of each shot under `edits`, each transplant's source drawn as the shot is."""

        def draw(source: TransplantSource, site: Site, maps: TransplantMaps) -> None:
            with pipe.at(site, maps):
                _generate(pipe, replace(shots[0], prompt=source.prompt, seed=source.seed))

        steered = toolbox.steering_hooks(edits, draw)
        return [_generate(pipe, shot, steered).image for shot in shots]

    def _sheet(
        self, shots: Sequence[Shot], columns: Sequence[Sequence[Edit]], drawn: Sequence[Sequence[Image.Image]]
    ) -> Image.Image:
        rows, labels = [], []
        for number, shot in enumerate(shots):
            rows.append([column[number] for column in drawn])
            labels.append(f"{shot.prompt or '(empty prompt)'}, seed {shot.seed}")
            if self.differences:
                rows.append([_difference(image, rows[-1][0]) for image in rows[-1]])
                labels.append(f"differences, x {AMPLIFIED}")
        return contact_sheet(rows, row_labels=labels, column_labels=["unedited", *map(_said, columns)])


def _generate(pipe: Pipeline, shot: Shot, edits: Sequence = ()) -> GeneratedImage:
    return pipe.generate(shot.prompt, seed=shot.seed, steps=shot.steps, pixels=shot.pixels, guidance=shot.guidance, edits=edits)[
        0
    ]


def _region(said: str | None, pixels: tuple[int, int]) -> Rectangle | str | None:
    if said is None or said == "fires":
        return said
    if re.fullmatch(r"[-+\d.,\s]+", said):
        return rectangle([float(number) for number in said.split(",") if number.strip()], pixels)
    if not Path(said).is_file():
        raise BadInput(f"The region {said} is no file. Write LEFT,TOP,RIGHT,BOTTOM, name an image, or say fires.")
    return str(Path(said).resolve())


def _difference(image: Image.Image, plain: Image.Image) -> Image.Image:
    return ImageChops.difference(image, plain).point([min(255, AMPLIFIED * value) for value in range(256)] * 3)


def _said(edits: Sequence[Edit]) -> str:
    return ", ".join(f"{edit.operation}" if edit.operation in ("ablate", "transplant") else _strength(edit) for edit in edits)


def _strength(edit: Edit) -> str:
    return f"{edit.operation} {edit.strength:g}" + ("" if edit.operation == "scale" else f" {edit.unit}")
