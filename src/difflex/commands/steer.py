"""`difflex steer` and `difflex icon`: images under edits as labelled grids."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from PIL import Image, ImageChops
from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Operation, Unit
from difflex.commands.flags import (
    NUMBER,
    SEED,
    STRENGTHS,
    FeatureNames,
    Seeds,
    StepRange,
    Strengths,
    StudyImagesCommand,
)
from difflex.commands.inputs import first_and_end, load_study_model, named_features, open_study, stored_strength
from difflex.errors import BadInput
from difflex.images import check_image_path, check_output, check_sheet, contact_sheet, write_image
from difflex.records import Edit, Rectangle, Shot, TransplantSource
from difflex.study import DictionaryRef

if TYPE_CHECKING:
    from difflex.pipeline import Pipeline
    from difflex.steering import StudyEditor

AMPLIFIED = 4
"""The factor by which differences between images are amplified."""
MEASURED = 4
"""The default strength is measured on at most so many images."""


@final
@dataclass(frozen=True, kw_only=True)
class SteerCommand(StudyImagesCommand):
    """Generate images while features, a contrast direction or whole blocks are edited; the first column is unedited."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with a dictionary or a contrast."""
    features: Positional[FeatureNames] = ()
    """Numbers of the features to edit, all in the same way, or words that `difflex search` finds them by: red."""
    dictionary: Annotated[
        str | None, arg(metavar="SITE/LABEL", help_behavior_hint="(default: the only one, or the best for names)")
    ] = None
    """The dictionary of the features; the site alone if it has one dictionary."""
    prompt: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ("",)
    """Prompts; a row each."""
    contrast: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(instead of a dictionary)")] = None
    """A direction found by `difflex contrast`."""
    operation: Operation = "add"
    """`add` to the activation; `set`, `scale`, `ablate` or `transplant` codes; `replace` the activation by the features,
    `reconstruct` it by the dictionary, or set it to `zero`."""
    strength: Annotated[
        tuple[float, ...] | None, STRENGTHS, arg(help_behavior_hint="(default: the largest at which the images stay intact)")
    ] = None
    """Strengths; a column each. Only add, set, scale and replace have one."""
    unit: Unit = "peak"
    """What a strength of 1 is: the feature's largest code, its mean code, the mean norm of an activation, or a code of 1."""
    region: Annotated[str | None, arg(metavar="REGION", help_behavior_hint="(default: everywhere)")] = None
    """LEFT,TOP,RIGHT,BOTTOM in fractions or pixels; an image that is white inside; or `fires`: where the features fire."""
    at: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: that of the features)")] = ()
    """Sites to edit, with the same features: double.18..single.37. What is set to zero is named here alone."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""
    half: Literal["conditional", "both", "opposed"] = "conditional"
    """Under guidance: edit the conditional half, both, or the unconditional one with the opposite sign."""
    source: Annotated[str | None, arg(metavar="PROMPT", help_behavior_hint="(needed to transplant)")] = None
    """Prompt of the image that a transplant takes codes from."""
    source_seed: Annotated[int, SEED] = 0
    """Seed of that image."""
    source_region: Annotated[str | None, arg(metavar="REGION", help_behavior_hint="(default: everywhere)")] = None
    """Region of that image; it is centred on the region of the edit."""
    seeds: Seeds = range(1)
    """Seeds of the noise; END is not included."""
    differences: FlagCreatePairsOff[bool] = False
    """Add a row of differences to the unedited image below each row, amplified four times."""
    also: Annotated[tuple[Path, ...], arg(metavar="FILE.json...", help_behavior_hint="(default: none)")] = ()
    """Recorded edits to make in the same runs."""
    record: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """Write the edits to a file, for --replay and --also."""
    replay: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(instead of all of the above)")] = None
    """Make a recorded edit again."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("steered.png")
    """Image file of the grid: .png, .webp or .jpg."""

    def __call__(self) -> list[Path]:
        from difflex.steering import EditRecord, StudyEditor

        check_image_path(self.out)
        if self.record is not None:
            check_output(self.record)
        editor = StudyEditor(open_study(self.study, self))
        replay, *others = [path and EditRecord.load(path) for path in (self.replay, *self.also)]
        for record in filter(None, (replay, *others)):
            record.check(editor)
        given = [f"--{name}" for name in ("pixels", "steps", "guidance", "also") if getattr(self, name) not in (None, ())]
        if replay is not None and given:
            raise BadInput(f"A replay has the settings that were recorded: leave out {', '.join(given)}.")
        place, features = (None, ()) if replay else self._features(editor)
        pipe = load_study_model(editor.study.run_in(replay.shot.precision if replay and not self.precision else None), self)
        if replay is not None:
            pipe.engine.set_text_length(replay.shot.text_length)
        shots = [replay.shot] if replay else self._shots(pipe)
        rows = 1 if replay else len(shots) * (1 + self.differences)
        check_sheet(self.out, rows, 1 + len(self.strength or (1,)), shots[0].pixels)
        also = [edit for record in others if record for edit in record.edits]
        columns = [replay.edits] if replay else [(edit, *also) for edit in self._edits(editor, pipe, shots, place, features)]
        if self.record is not None and (len(shots) > 1 or len(columns) > 1):
            raise BadInput(
                f"One edit of one image can be recorded, but there are {len(columns)} edits and {len(shots)} images. Name one."
            )
        for edits in columns:
            editor.check(edits)
        images = [generate_edited(pipe, editor, shots, edits) for edits in [(), *columns]]
        write_image(self._sheet(shots, columns, images), self.out)
        paths = [self.out]
        if self.record is not None:
            record = EditRecord(shot=shots[0], edits=columns[0], checksums=editor.checksums(columns[0]))
            paths.append(record.save(self.record))
        print(f"{', '.join(str(path.resolve()) for path in paths)}: {len(shots) * len(images)} images")
        return paths

    def _features(self, editor: "StudyEditor") -> tuple[DictionaryRef | None, tuple[int, ...]]:
        """Return the features to steer with, and their dictionary; none with a contrast, which must exist."""
        if self.operation == "zero":
            if self.features or self.dictionary is not None or self.contrast is not None:
                raise BadInput("zero sets whole activations to zero. Leave out features, --dictionary and --contrast.")
            if not self.at:
                raise BadInput("There is nothing to set to zero. Name sites with --at, as in --at double.3:update.")
            return None, ()
        if self.operation == "reconstruct":
            if self.features or self.contrast is not None:
                raise BadInput("A reconstruction is that of a whole dictionary. Leave out features and --contrast.")
            return editor.study.find_dictionary(self.dictionary), ()
        if not self.features and self.contrast is None:
            raise BadInput("There is nothing to steer with. Name features, or --contrast NAME.")
        if self.contrast is not None and self.dictionary is None:
            editor.contrast(self.contrast)
            return None, ()
        return named_features(editor.study, self.features, self.dictionary)

    def _edits(
        self,
        editor: "StudyEditor",
        pipe: "Pipeline",
        shots: Sequence[Shot],
        place: DictionaryRef | None,
        features: tuple[int, ...],
    ) -> list[Edit]:
        """Return an edit for each strength; without strengths, one at the default for `shots`."""
        pixels = next(pipe.shots("")).pixels
        source_region = _parse_region(self.source_region, pixels)
        at = tuple(pipe.expand(self.at))
        home = (
            place.site if place is not None else at[0] if self.operation == "zero" else editor.contrast(self.contrast or "").site
        )
        edit = Edit(
            operation=self.operation,
            site=home,
            at=() if at == (home,) else at,
            dictionary=None if place is None else place.label,
            features=features,
            contrast=self.contrast,
            unit=self.unit,
            region=_parse_region(self.region, pixels),
            steps=first_and_end(self.edit_steps),
            half=self.half,
            source=None
            if self.source is None
            else TransplantSource(prompt=self.source, seed=self.source_seed, region=source_region),
        )
        if self.strength is not None:
            return [replace(edit, strength=strength) for strength in self.strength]
        if place is not None and edit.operation == "add" and edit.unit == "peak":
            editor.check([edit])
            return [_with_intact_strength(pipe, editor, shots[:MEASURED], edit)]
        stored = None
        if place is not None and edit.operation in ("set", "replace") and edit.unit == "peak":
            stored = stored_strength(editor.study, place, edit.features)
        return [editor.with_default_strength(edit, stored)]

    def _shots(self, pipe: "Pipeline") -> list[Shot]:
        shots = pipe.shots(self.prompt, seeds=self.seeds, keep_steps=[0])
        return [replace(shot, timestep=None) for shot in shots]

    def _sheet(
        self, shots: Sequence[Shot], columns: Sequence[Sequence[Edit]], images: Sequence[Sequence[Image.Image]]
    ) -> Image.Image:
        rows, labels = [], []
        for number, shot in enumerate(shots):
            rows.append([column[number] for column in images])
            labels.append(f"{shot.prompt or '(empty prompt)'}, seed {shot.seed}")
            if self.differences:
                rows.append([_difference(image, rows[-1][0]) for image in rows[-1]])
                labels.append(f"differences, x {AMPLIFIED}")
        return contact_sheet(rows, row_labels=labels, column_labels=["unedited", *map(_column_label, columns)])


@final
@dataclass(frozen=True, kw_only=True)
class IconCommand(StudyImagesCommand):
    """Generate what features draw on their own, for an empty prompt; a row each.

    At an `update` site the block writes nothing but the feature. At other sites the feature is added to the activation: without
    its stream, which carries the noise, a model draws nothing.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with a dictionary."""
    features: Positional[FeatureNames]
    """Numbers of the features, or words that `difflex search` finds them by."""
    dictionary: Annotated[
        str | None, arg(metavar="SITE/LABEL", help_behavior_hint="(default: the only one, or the best for names)")
    ] = None
    """The dictionary of the features; the site alone if it has one dictionary."""
    strength: Strengths = (0.5, 1.0, 2.0)
    """Strengths; a column each."""
    unit: Unit = "peak"
    """What a strength of 1 is: the feature's largest code, its mean code where it fires, or as for `difflex steer`."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""
    seed: Annotated[int, SEED] = 0
    """Seed of the noise."""
    record: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """Write a single icon to a file, for `difflex steer --replay`."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("icons.png")
    """Image file of the grid: .png, .webp or .jpg."""

    def __call__(self) -> list[Path]:
        from difflex.steering import EditRecord, StudyEditor

        check_image_path(self.out)
        if self.record is not None:
            check_output(self.record)
        if not self.features:
            raise BadInput("No feature was named. Name one or more, by numbers or by words.")
        editor = StudyEditor(open_study(self.study, self))
        place, features = named_features(editor.study, self.features, self.dictionary)
        if self.record is not None and len(features) * len(self.strength) > 1:
            raise BadInput(f"One icon can be recorded, not {len(features)} features at {len(self.strength)} strengths.")
        pipe = load_study_model(editor.study, self)
        template = Edit(
            operation="replace" if place.site.kind == "update" else "add",
            site=place.site,
            dictionary=place.label,
            features=features,
            unit=self.unit,
            steps=first_and_end(self.edit_steps),
        )
        shot = replace(next(iter(pipe.shots("", seeds=[self.seed]))), timestep=None)
        check_sheet(self.out, len(features), len(self.strength), shot.pixels)
        edits = [[replace(template, features=(feature,), strength=each) for each in self.strength] for feature in features]
        rows = [[generate_edited(pipe, editor, [shot], [edit])[0] for edit in row] for row in edits]
        columns = [f"{strength:g} {self.unit}" for strength in self.strength]
        labels = [f"{place}, feature {feature}" for feature in features]
        write_image(contact_sheet(rows, row_labels=labels, column_labels=columns), self.out)
        paths = [self.out]
        if self.record is not None:
            [[edit]] = edits
            paths.append(EditRecord(shot=shot, edits=(edit,), checksums=editor.checksums([edit])).save(self.record))
        print(f"{', '.join(str(path.resolve()) for path in paths)}: {len(rows)} features at {len(columns)} strengths")
        return paths


def generate_edited(pipe: "Pipeline", editor: "StudyEditor", shots: Sequence[Shot], edits: Sequence[Edit]) -> list[Image.Image]:
    """Generate the image of each shot under `edits`, and before it the source of each transplant, like the first shot."""

    def generate(shot: Shot, hooks: Sequence = ()) -> Image.Image:
        settings = {"steps": shot.steps, "pixels": shot.pixels, "guidance": shot.guidance}
        return pipe.generate(shot.prompt, seed=shot.seed, edits=hooks, **settings)[0].image

    def source_run(source: TransplantSource, site, maps) -> None:
        with pipe.at(site, maps):
            generate(replace(shots[0], prompt=source.prompt, seed=source.seed))

    hooks = editor.steering_hooks(edits, source_run)
    return [generate(shot, hooks) for shot in shots]


def _with_intact_strength(pipe: "Pipeline", editor: "StudyEditor", shots: Sequence[Shot], edit: Edit) -> Edit:
    """Return `edit` at the largest strength at which none of the images of `shots` is damaged, and print it."""
    from difflex.steering.strengths import LOSS_LEVELS, intact_strengths

    def losses(strengths: Sequence[float]):
        edits = [(replace(edit, strength=strength),) if strength else () for strength in strengths]
        images = [generate_edited(pipe, editor, [shot], own)[0] for shot, own in zip(shots, edits, strict=True)]
        return pipe.losses(images, LOSS_LEVELS).mean(1)

    chosen = min(intact_strengths(losses, len(shots)))
    print(
        f"strength {chosen.strength:g} peak: the largest at which the images stay intact (the model's loss on them is "
        f"{chosen.loss:.2f} times that on unedited ones). Choose others with --strength, as in --strength 0.5:3:0.5."
    )
    return replace(edit, strength=chosen.strength)


def _parse_region(text: str | None, pixels: tuple[int, int]) -> Rectangle | str | None:
    from difflex.steering import rectangle

    if text is None or text == "fires":
        return text
    if re.fullmatch(r"[-+\d.,\s]+", text):
        numbers = [part.strip() for part in text.split(",") if part.strip()]
        if not all(re.fullmatch(NUMBER, part) for part in numbers):
            raise BadInput(
                f"The region {text:.60} is not LEFT,TOP,RIGHT,BOTTOM. Write four numbers: 0.5,0,1,1 is the right half."
            )
        return rectangle(list(map(float, numbers)), pixels)
    if not os.path.isfile(text):
        raise BadInput(f"The region {text:.200} is no file. Write LEFT,TOP,RIGHT,BOTTOM, the name of an image, or fires.")
    return str(Path(text).resolve())


def _difference(image: Image.Image, unedited: Image.Image) -> Image.Image:
    return ImageChops.difference(image, unedited).point([min(255, AMPLIFIED * value) for value in range(256)] * 3)


def _column_label(edits: Sequence[Edit]) -> str:
    strong = ("add", "set", "scale", "replace")
    return ", ".join(_strength(edit) if edit.operation in strong else edit.operation for edit in edits)


def _strength(edit: Edit) -> str:
    return f"{edit.operation} {edit.strength:g}" + ("" if edit.operation == "scale" else f" {edit.unit}")
