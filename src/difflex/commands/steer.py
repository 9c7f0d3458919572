"""`difflex steer`, `icon` and `contrast`: images under edits as labelled grids, and directions to edit along."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from PIL import Image, ImageChops
from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import ContrastMethod, Operation, Unit
from difflex.commands.flags import (
    BATCH,
    NUMBER,
    SEED,
    STRENGTHS,
    FeatureNames,
    KeptSteps,
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
    """Generate images while features, or a contrast direction, are edited; the first column is unedited."""

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
    """`add` to the activation; `set`, `scale` or `ablate` the codes; `replace` the activation; or `transplant` codes."""
    strength: Annotated[
        tuple[float, ...] | None, STRENGTHS, arg(help_behavior_hint="(default: the largest at which the images stay intact)")
    ] = None
    """Strengths; a column each. Ablate and transplant have none."""
    unit: Unit = "peak"
    """What a strength of 1 is: the feature's largest code, its mean code, the mean norm of an activation, or a code of 1."""
    region: Annotated[str | None, arg(metavar="REGION", help_behavior_hint="(default: everywhere)")] = None
    """LEFT,TOP,RIGHT,BOTTOM in fractions or pixels; an image that is white inside; or `fires`: where the features fire."""
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
    record: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """Write the edit to a file, for --replay."""
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
        replay = None if self.replay is None else EditRecord.load(self.replay)
        if replay is not None:
            replay.check(editor)
            if given := [f"--{name}" for name in ("pixels", "steps", "guidance") if getattr(self, name) is not None]:
                raise BadInput(f"A replay has the settings that were recorded: leave out {', '.join(given)}.")
        place, features = (None, ()) if replay else self._features(editor)
        pipe = load_study_model(editor.study.run_in(replay.shot.precision if replay and not self.precision else None), self)
        if replay is not None:
            pipe.engine.set_text_length(replay.shot.text_length)
        shots = [replay.shot] if replay else self._shots(pipe)
        rows = 1 if replay else len(shots) * (1 + self.differences)
        check_sheet(self.out, rows, 1 + len(self.strength or (1,)), shots[0].pixels)
        columns = [replay.edits] if replay else [(edit,) for edit in self._edits(editor, pipe, shots, place, features)]
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
        edit = Edit(
            operation=self.operation,
            site=place.site if place is not None else editor.contrast(self.contrast or "").site,
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
    """Strengths in peaks; a column each."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""
    seed: Annotated[int, SEED] = 0
    """Seed of the noise."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("icons.png")
    """Image file of the grid: .png, .webp or .jpg."""

    def __call__(self) -> list[Path]:
        from difflex.steering import StudyEditor

        check_image_path(self.out)
        if not self.features:
            raise BadInput("No feature was named. Name one or more, by numbers or by words.")
        editor = StudyEditor(open_study(self.study, self))
        place, features = named_features(editor.study, self.features, self.dictionary)
        pipe = load_study_model(editor.study, self)
        template = Edit(
            operation="replace" if place.site.kind == "update" else "add",
            site=place.site,
            dictionary=place.label,
            features=features,
            steps=first_and_end(self.edit_steps),
        )
        check_sheet(self.out, len(features), len(self.strength), next(iter(pipe.shots(""))).pixels)
        rows = []
        for feature in features:
            edits = [replace(template, features=(feature,), strength=strength) for strength in self.strength]
            rows.append([pipe.generate("", seed=self.seed, edits=editor.steering_hooks([edit]))[0].image for edit in edits])
        columns = [f"{strength:g} peak" for strength in self.strength]
        labels = [f"{place}, feature {feature}" for feature in features]
        write_image(contact_sheet(rows, row_labels=labels, column_labels=columns), self.out)
        print(f"{self.out.resolve()}: {len(rows)} features at {len(columns)} strengths")
        return [self.out]


@final
@dataclass(frozen=True, kw_only=True)
class ContrastCommand(StudyImagesCommand):
    """Find the direction between two sets of prompts at a site; `difflex steer --contrast NAME` edits along it."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of the model; it may be empty."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the direction."""
    site: Annotated[str, arg(metavar="SITE")]
    """Site of the activations: double.18, single.9:update, double.3:text."""
    positive: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """Prompts that the direction points to."""
    negative: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """Prompts that it points away from; each is paired with the positive one in the same place."""
    pairs: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(instead of the two above)")] = None
    """A text file with a pair on each line: the positive prompt, a tab, the negative one."""
    method: ContrastMethod = "mean"
    """The mean of the differences, or their first principal component."""
    seeds: Seeds = range(1)
    """Seeds for each pair, whose prompts start from the same noise; END is not included."""
    keep_steps: Annotated[KeptSteps, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps whose activations are compared; END is not included."""
    dictionary: Annotated[str | None, arg(metavar="DICTIONARY", help_behavior_hint="(default: none)")] = None
    """Decompose the direction into features of this dictionary."""
    batch: Annotated[int, BATCH] = 16
    """Images at once."""

    def __call__(self) -> list[Path]:
        from difflex.steering import StudyEditor
        from difflex.steering.contrast import decompose, find_contrast, pair_activations

        check_contrast_name(self.name)
        editor = StudyEditor(open_study(self.study, self))
        check_output(editor.study.contrast(self.name))
        pairs = _read_pairs(self.pairs) if self.pairs is not None else self._pairs()
        place = None if self.dictionary is None else editor.study.find_dictionary(self.dictionary)
        pipe = load_study_model(editor.study, self)
        site = pipe.site(self.site)
        if place is not None and place.site != site:
            raise BadInput(f"{place} is a dictionary of {place.site}, but the contrast is at {site}. Name one of {site}.")
        shots = list(pipe.shots("", keep_steps=self.keep_steps))
        sides = pair_activations(lambda shots: pipe.harvest(shots, site, self.batch), shots, pairs, self.seeds)
        contrast = find_contrast(*sides, self.method)
        path = contrast.save(editor.study.contrast(self.name))
        norm = float(contrast.direction.norm())
        print(f"{path}: {contrast.pairs} pairs, norm {norm:.3g}, {norm / contrast.norm:.1%} of a mean activation at {site}")
        if place is not None:
            print(f"features of {place} in it:")
            for part in decompose(contrast.direction, editor.dictionary(place)):
                print(f"  {part.feature:>6}  code {part.code:9.3g}  cosine {part.cosine:6.3f}  explained {part.explained:6.1%}")
        return [path]

    def _pairs(self) -> list[tuple[str, str]]:
        if not self.positive or len(self.positive) != len(self.negative):
            raise BadInput(
                f"A contrast takes pairs of prompts, but there are {len(self.positive)} positive and {len(self.negative)} "
                "negative ones. Give as many --positive as --negative, or --pairs FILE."
            )
        return list(zip(self.positive, self.negative, strict=True))


def check_contrast_name(name: str) -> str:
    """Return `name` if a file can have it."""
    if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
        raise BadInput(f"'{name:.100}' cannot be a file name. Use at most 100 letters, digits, '.', '_' and '-'.")
    return name


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


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"--pairs {path} cannot be read: {error}. Name a text file.") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        positive, tab, negative = line.partition("\t")
        if not line.strip():
            continue
        if not tab or "\t" in negative or "\0" in line:
            raise BadInput(f"Line {number} of {path} is not two prompts with one tab between them.")
        pairs.append((positive.strip(), negative.strip()))
    return pairs


def _difference(image: Image.Image, unedited: Image.Image) -> Image.Image:
    return ImageChops.difference(image, unedited).point([min(255, AMPLIFIED * value) for value in range(256)] * 3)


def _column_label(edits: Sequence[Edit]) -> str:
    return ", ".join(edit.operation if edit.operation in ("ablate", "transplant") else _strength(edit) for edit in edits)


def _strength(edit: Edit) -> str:
    return f"{edit.operation} {edit.strength:g}" + ("" if edit.operation == "scale" else f" {edit.unit}")
