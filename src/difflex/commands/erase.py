"""`difflex erase`: images before and after a concept is erased by the features that detect it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, final

from PIL import Image
from tyro.conf import Positional, arg

from difflex.commands.flags import FeatureName, Seeds, StepRange, StudyImagesCommand, real
from difflex.commands.inputs import first_and_end, load_study_model, named_features, open_study
from difflex.commands.steer import generate_edited
from difflex.features.detected import DetectedConcepts
from difflex.images import check_image_path, check_sheet, contact_sheet, write_image
from difflex.records import Edit, Shot
from difflex.study import DictionaryRef, Study

if TYPE_CHECKING:
    from difflex.pipeline import Pipeline
    from difflex.steering import StudyEditor

FACTORS = (-2.0, -1.0, 0.0)
"""What codes are multiplied by, from the strongest on, unless a flag or the results of `difflex removal` say it."""
MATCHED, MOST = 0.5, 4
"""Average precision from which another feature that detects the concept is edited, too, and how many there are at most."""


class Erasure(NamedTuple):
    """Edits that multiply the codes of the features of a concept."""

    edits: tuple[Edit, ...]
    description: str
    """The features, and why these."""
    strength: float | None
    """What `difflex removal` chose to multiply them by; None where it did not run."""


@final
@dataclass(frozen=True, kw_only=True)
class EraseCommand(StudyImagesCommand):
    """Erase a concept from images by the features that detect it; each row shows the image before and after.

    The codes of these features are multiplied by a strength: 0 removes them, a negative number writes the opposite.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with the results of `difflex concepts`, or with books."""
    concept: Annotated[Positional[FeatureName], arg(metavar="CONCEPT")]
    """The concept, as for `difflex search`: red; or the number of a feature."""
    dictionary: Annotated[str | None, arg(metavar="SITE/LABEL", help_behavior_hint="(default: the best for the concept)")] = None
    """The dictionary of the features; the site alone if it has one dictionary."""
    prompt: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ("",)
    """Prompts; a row each."""
    strength: Annotated[
        float | None,
        real(-100.0, 1.0),
        arg(help_behavior_hint="(default: as `difflex removal` found, or the strongest that keeps the images intact)"),
    ] = None
    """What the codes are multiplied by: 0 removes them."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""
    seeds: Seeds = range(1)
    """Seeds of the noise; END is not included."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("erased.png")
    """Image file of the grid: .png, .webp or .jpg."""

    def __call__(self) -> list[Path]:
        from difflex.steering import StudyEditor

        check_image_path(self.out)
        editor = StudyEditor(open_study(self.study, self))
        erasure = _removed(editor.study, self.concept, self.dictionary) if self.edit_steps is None else None
        erasure = erasure or self._matched(editor.study)
        editor.check(erasure.edits)
        pipe = load_study_model(editor.study, self)
        shots = [replace(shot, timestep=None) for shot in pipe.shots(self.prompt, seeds=self.seeds, keep_steps=[0])]
        check_sheet(self.out, len(shots), 2, shots[0].pixels)
        before = generate_edited(pipe, editor, shots, ())
        strength = erasure.strength if self.strength is None else self.strength
        tried = FACTORS if strength is None else (strength,)
        strength, after = _strongest_intact(pipe, editor, shots, erasure.edits, before, tried)
        print(f"{self.concept}: {erasure.description}; codes times {strength:g}")
        unchanged = [shot for shot, old, new in zip(shots, before, after, strict=True) if old.tobytes() == new.tobytes()]
        for shot in unchanged:
            print(f"'{shot.prompt}', seed {shot.seed}: these features fire nowhere, so there is nothing to erase.")
        labels = [f"{shot.prompt or '(empty prompt)'}, seed {shot.seed}" for shot in shots]
        rows = [list(pair) for pair in zip(before, after, strict=True)]
        sheet = contact_sheet(rows, row_labels=labels, column_labels=["before", f"without {self.concept}"])
        write_image(sheet, self.out)
        print(f"{self.out.resolve()}: {len(shots)} image{'s' * (len(shots) > 1)} before and after")
        return [self.out]

    def _matched(self, study: Study) -> Erasure:
        """Return the edits by the features that detect the concept, the best first."""
        place, (feature,) = named_features(study, (self.concept,), self.dictionary)
        features = (feature,) if self.concept.isdecimal() else (feature, *_others(study, place, feature, self.concept))[:MOST]
        edit = Edit(
            operation="scale",
            site=place.site,
            dictionary=place.label,
            features=features,
            steps=first_and_end(self.edit_steps),
        )
        names = f"feature{'s' * (len(features) > 1)} {', '.join(map(str, features))} of {place}"
        return Erasure((edit,), names, None)


def _others(study: Study, place: DictionaryRef, feature: int, concept: str) -> Iterator[int]:
    """Yield the other features that detect the concept clearly and nothing better, the best first."""
    detected = DetectedConcepts.read(study, place)
    if detected is None or detected.by_concept.get(concept.lower(), (None,))[0] != feature:
        return
    matched = [
        (-best.ap, other)
        for other, best in detected.by_feature.items()
        if other != feature and best.concept == concept.lower() and best.ap >= MATCHED
    ]
    yield from (other for _, other in sorted(matched))


def _removed(study: Study, concept: str, dictionary: str | None) -> Erasure | None:
    """Return the edits that `difflex removal` chose for a concept, of the results with the best rates; None without any."""
    if not study.removals():
        return None
    from difflex.effects import Provenance
    from difflex.effects.removal import RemovalResults

    wanted = None if dictionary is None else str(study.find_dictionary(dictionary))
    candidates = []
    for path in study.removals():
        results = RemovalResults.load(path)
        places = [study.find_dictionary(name) for name in results.dictionaries]
        is_current = results.provenance.fingerprints == Provenance.of(study, {place: {} for place in places}).fingerprints
        if is_current and (wanted is None or results.dictionaries == (wanted,)):
            candidates += [removed for removed in results.concepts if removed.concept == concept.lower()]
    if not candidates:
        return None
    best = max(candidates, key=lambda removed: removed.rates.least)
    edits = [
        Edit(operation="scale", site=place.site, dictionary=place.label, features=features, steps=(step, step + 1))
        for name, steps in best.features.items()
        for place in [study.find_dictionary(name)]
        for step, features in enumerate(steps)
        if features
    ]
    return Erasure(tuple(edits), f"the features that difflex removal chose, of {', '.join(best.features)}", best.strength)


def _strongest_intact(
    pipe: "Pipeline",
    editor: "StudyEditor",
    shots: Sequence[Shot],
    edits: Sequence[Edit],
    before: Sequence[Image.Image],
    factors: Sequence[float],
) -> tuple[float, list[Image.Image]]:
    """Return the first of `factors` at which all images stay intact, or else the last one, with the images."""
    from difflex.steering.strengths import BROKEN, LOSS_LEVELS

    after, losses = list[Image.Image](), None
    for factor in factors:
        after = generate_edited(pipe, editor, shots, [replace(edit, strength=factor) for edit in edits])
        if factor == factors[-1]:
            break
        losses = pipe.losses(before, LOSS_LEVELS).mean(1) if losses is None else losses
        if float((pipe.losses(after, LOSS_LEVELS).mean(1) / losses).max()) < BROKEN:
            return factor, after
    return factors[-1], after
