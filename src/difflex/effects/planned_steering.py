"""Edits that `steer-eval` finds on prompts of their own: plans of sites, steps and dose, and strengths and directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from typing import final

from difflex.effects.automatic import Placement, find_dose, plan_edits, sited_features
from difflex.effects.concept_specs import JudgedWorld
from difflex.effects.effect_aware import EffectConfig, OptimisedEdits, optimise_edits
from difflex.effects.inputs import ModelFunctions
from difflex.effects.judging import JudgedGenerator, JudgedTask, SteeringMethod, SteeringTask
from difflex.effects.steering_config import SteeringConfig, TargetConcept
from difflex.records import Edit, Shot, Site
from difflex.steering import EditFeatures, EditRecord, StudyEditor
from difflex.steering.contrast import Contrast, contrast_features
from difflex.study import DictionaryRef

EFFECT_BATCH = 8
"""Images of an update, at most."""
TEXT_DOSE = 2.0
"""The strength of contrasts in text streams at a dose of 1. They are means over all tokens, and few tokens name the concept."""
MOST_FACTOR = 1.5
"""Of optimised strengths."""


@final
@dataclass(frozen=True)
class SteeringPlanner:
    """Finds edits with features of a dictionary and contrasts of the text, on prompts that are never judged, and writes them."""

    editor: StudyEditor
    place: DictionaryRef
    config: SteeringConfig
    model: ModelFunctions
    world: JudgedWorld

    def methods(self, target: TargetConcept, generator: JudgedGenerator) -> Iterator[tuple[str, SteeringMethod]]:
        """Yield the methods that the config asks for by name."""
        config = self.config
        if not config.automatic and not config.effect_updates:
            return
        task = self.world.task(target.concept, config.trials + config.tuning)
        task = replace(task, trials=task.trials[config.trials :])
        tuning, settings = JudgedTask(task, generator), replace(self.model.shots(range(1))[0], timestep=None)
        image = self._feature_edits(target)
        contrasts = self._text_contrasts(target.concept, [edit.site for edit in image])
        features = _known_features(self.editor, contrasts)
        text = [
            Edit(operation="add", site=contrast.site, contrast=name, unit="code", strength=TEXT_DOSE, steps=config.edit_steps)
            for name, contrast in contrasts.items()
        ]
        if config.automatic:
            plan = plan_edits(tuning, list(self._placements(image, text)), features, settings.steps)
            dose = plan.point.strength
            self._write(target, "automatic", [replace(edit, strength=dose * edit.strength) for edit in plan.edits], settings)
            yield "automatic", SteeringMethod.of_edits(plan.name, plan.edits, features, (dose,))
        if config.effect_updates:
            assert self.world.effect_judge is not None
            batch, turned = min(EFFECT_BATCH, config.tuning), config.effect_directions
            effect = EffectConfig(updates=config.effect_updates, batch=batch, directions=turned)
            run, losses = self.model.differentiable, self.model.differentiable_losses
            judge, edits = self.world.effect_judge(), [*image, *text]
            found = optimise_edits(task, edits, features, settings, run, judge, losses, effect)
            name, description = "effect-aware", f"{len(found.edits)} strengths"
            if config.effect_directions:
                contrasts = self._directions(target, task, found, settings)
                names, features = {each.site: name for name, each in contrasts.items()}, _known_features(self.editor, contrasts)
                along = [replace(e, dictionary=None, features=(), contrast=names[e.site], unit="code") for e in found.edits]
                found = found._replace(edits=tuple(along))
                name, description = "effect-direction", f"{description} along {len(names)} directions"
            found = self._dosed(tuning, found, features)
            self._write(target, name, found.edits, settings)
            yield name, SteeringMethod.of_edits(description, found.edits, features, (1.0,))

    def _feature_edits(self, target: TargetConcept) -> list[Edit]:
        """Return edits that add the feature of the concept at each site, that of the given dictionary first."""
        config = self.config
        sited = sited_features(self.editor, target.concept, self.place, target.feature, config.min_ap)
        shared = Edit(operation="add", site=self.place.site, strength=1.0, unit=config.unit, steps=config.edit_steps)
        return [replace(shared, site=place.site, dictionary=place.label, features=(feature,)) for place, feature, _ in sited]

    def _text_contrasts(self, concept: str, sites: Sequence[Site]) -> dict[str, Contrast]:
        """Return the contrasts of pairs of prompts in the text streams of the blocks of `sites`, and write them to the study."""
        config, pairs = self.config, self.world.pairs(concept, self.config.pairs)
        paths = {site.path for site in sites}
        contrasts = {}
        for site in (site for site in self.model.text_sites() if site.path in paths):
            steps = config.edit_steps and range(*config.edit_steps)
            [contrasts[_contrast_name("text", concept, site)]] = self.model.contrasts(site, pairs, steps=steps)
        for name, contrast in contrasts.items():
            contrast.save(self.editor.study.contrast(name))
        return contrasts

    def _placements(self, image: Sequence[Edit], text: Sequence[Edit]) -> Iterator[Placement]:
        """Yield where plans may edit, the simplest first."""
        can_set, where = self.config.unit not in ("norm", "current-norm"), f"{len(image)} sites"
        yield Placement(str(image[0].site), tuple(image[:1]), can_set)
        if len(image) > 1:
            yield Placement(where, tuple(image), can_set)
        if text:
            # Text of late blocks has less effect and costs more quality.
            for count in sorted({-(-len(text) // 2), len(text)}):
                yield Placement(f"the text of {count} blocks", tuple(text[:count]), False)
            yield Placement(f"{where} and the text of {len(text)} blocks", (*image, *text), False)

    def _dosed(self, tuning: JudgedTask, found: OptimisedEdits, features: Callable[[Edit], EditFeatures]) -> OptimisedEdits:
        """Return optimised edits with all strengths multiplied by the least factor that suffices."""
        method = SteeringMethod.of_edits("", found.edits, features, ())
        factor = find_dose(partial(tuning.point, method), MOST_FACTOR).strength if found.edits else 1.0
        return found._replace(edits=tuple(replace(edit, strength=round(factor * edit.strength, 4)) for edit in found.edits))

    def _directions(
        self, target: TargetConcept, task: SteeringTask, found: OptimisedEdits, settings: Shot
    ) -> dict[str, Contrast]:
        """Return optimised directions as contrasts by name, and write them to the study."""
        contrasts = {
            _contrast_name("effect", target.concept, site): Contrast(
                site=site,
                model=settings.model,
                revision=settings.revision,
                method="effect",
                pairs=len(task.trials),
                timesteps=(),
                positive=tuple(trial.prompt for trial in task.trials),
                negative=(),
                norm=float(direction.norm()),
                direction=direction,
            )
            for site, direction in found.directions.items()
        }
        for name, contrast in contrasts.items():
            contrast.save(self.editor.study.contrast(name))
        return contrasts

    def _write(self, target: TargetConcept, method: str, edits: Sequence[Edit], settings: Shot) -> None:
        """Write edits as a record of the first trial, for `difflex steer --replay` and `--also`."""
        if not edits:
            return
        trial = self.world.task(target.concept, 1).trials[0]
        placed = tuple(replace(edit, region=None if edit.site.stream == "text" else trial.region) for edit in edits)
        shot = replace(settings, prompt=trial.prompt, seed=trial.seed)
        record = EditRecord(shot=shot, edits=placed, checksums=self.editor.checksums(placed))
        folder = self.editor.study.steering(*self.place).with_suffix("")
        record.save(folder / f"{_file_name(target.concept)}-{method}.json")


def _known_features(editor: StudyEditor, contrasts: Mapping[str, Contrast]) -> Callable[[Edit], EditFeatures]:
    """Return the features of edits; those of `contrasts`, which were just written, without reading them."""
    return cache(lambda edit: contrast_features(contrasts[edit.contrast]) if edit.contrast else editor.features(edit))


def _contrast_name(kind: str, concept: str, site: Site) -> str:
    return re.sub(r"[^\w.-]", "-", f"{kind}-{_file_name(concept)}-{site.folder}")


def _file_name(concept: str) -> str:
    """Return a name of ASCII letters for files and contrasts; different for concepts that differ in other characters alone."""
    name = re.sub(r"\W+", "-", concept, flags=re.ASCII)[:40]
    return name if concept.isascii() and len(concept) <= 40 else f"{name}-{sha256(concept.encode()).hexdigest()[:8]}"
