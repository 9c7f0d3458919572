"""Edits that `steer-eval` finds on prompts of their own: plans of sites, steps and dose, and strengths and directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from typing import final

from difflex.effects.automatic import plan_edits, sited_features
from difflex.effects.concept_specs import JudgedWorld
from difflex.effects.effect_aware import EffectConfig, OptimisedEdits, optimise_edits
from difflex.effects.inputs import ModelFunctions
from difflex.effects.judging import JudgedGenerator, JudgedTask, SteeringMethod, SteeringTask
from difflex.effects.steering_config import SteeringConfig, TargetConcept
from difflex.records import Edit, Shot, Site
from difflex.steering import EditRecord, StudyEditor
from difflex.steering.contrast import Contrast, contrast_features
from difflex.study import DictionaryRef

EFFECT_BATCH = 8
"""Images of an update, at most."""


@final
@dataclass(frozen=True)
class SteeringPlanner:
    """Finds edits with features of a dictionary, on prompts that are never judged, and writes them."""

    editor: StudyEditor
    place: DictionaryRef
    config: SteeringConfig
    model: ModelFunctions
    world: JudgedWorld

    def methods(self, target: TargetConcept, generator: JudgedGenerator) -> Iterator[tuple[str, SteeringMethod]]:
        """Yield the methods that the config asks for by name."""
        config, features = self.config, cache(self.editor.features)
        if not config.automatic and not config.effect_updates:
            return
        task = self.world.task(target.concept, config.trials + config.tuning)
        task = replace(task, trials=task.trials[config.trials :])
        sited = sited_features(self.editor, target.concept, self.place, target.feature, config.min_ap)
        settings = replace(self.model.shots(range(1))[0], timestep=None)
        edits = [
            Edit(
                operation="add",
                site=place.site,
                dictionary=place.label,
                features=(feature,),
                unit=config.unit,
                steps=config.edit_steps,
            )
            for place, feature, _ in sited
        ]
        if config.automatic:
            plan = plan_edits(JudgedTask(task, generator), sited, features, settings.steps, edits[0])
            dose = plan.point.strength
            self._write(target, "automatic", [replace(edit, strength=dose * edit.strength) for edit in plan.edits], settings)
            yield "automatic", SteeringMethod.of_edits(plan.name, plan.edits, features, (dose,))
        if config.effect_updates:
            assert self.world.effect_judge is not None
            effect = EffectConfig(updates=config.effect_updates, batch=min(EFFECT_BATCH, config.tuning))
            judge, run = self.world.effect_judge(), self.model.differentiable
            optimise = partial(optimise_edits, task, edits, features, settings, run, judge)
            found = optimise(effect)
            self._write(target, "effect-aware", found.edits, settings)
            name = f"{len(found.edits)} strengths of {len(sited)} sites"
            yield "effect-aware", SteeringMethod.of_edits(name, found.edits, features, (1.0,))
            if config.effect_directions:
                found = optimise(replace(effect, directions=True))
                yield "effect direction", self._along_directions(target, task, found, settings)

    def _along_directions(
        self, target: TargetConcept, task: SteeringTask, found: OptimisedEdits, settings: Shot
    ) -> SteeringMethod:
        """Return the method of optimised directions, and write these as contrasts of the study."""
        contrasts = {
            _contrast_name(target.concept, site): Contrast(
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
        names = {contrast.site: name for name, contrast in contrasts.items()}
        edits = [replace(edit, dictionary=None, features=(), contrast=names[edit.site], unit="code") for edit in found.edits]
        self._write(target, "effect-direction", edits, settings)
        description = f"{len(edits)} strengths along {len(names)} directions"
        return SteeringMethod.of_edits(description, edits, lambda edit: contrast_features(contrasts[edit.contrast or ""]), (1.0,))

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


def _contrast_name(concept: str, site: Site) -> str:
    return re.sub(r"[^\w.-]", "-", f"effect-{_file_name(concept)}-{site.folder}")


def _file_name(concept: str) -> str:
    """Return a name of ASCII letters for files and contrasts; different for concepts that differ in other characters alone."""
    name = re.sub(r"\W+", "-", concept, flags=re.ASCII)[:40]
    return name if concept.isascii() and len(concept) <= 40 else f"{name}-{sha256(concept.encode()).hexdigest()[:8]}"
