"""`StudyModel`: the model of a study with its dictionaries, for the studio. Only this part of the browser imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple, final

import torch
from PIL import Image

from difflex.devices import find_device
from difflex.dictionary_config import fingerprint
from difflex.effects import SteeringResults
from difflex.errors import DifflexError
from difflex.records import Activations, Codes, Edit, HookContext, Shot, Site
from difflex.steering import EditRecord, SteeringHook, StudyEditor
from difflex.steering.contrast import Contrast
from difflex.study import DictionaryRef, Study
from difflex.web.studio import ImageModel, PaintChoices, ReadImage, Report, Suggestion, TokenFeatures

ENCODED_TOKENS = 8192
"""Tokens encoded at once."""
TOKEN_SLOTS = 64
"""Features that are kept of each token, the strongest."""
GPU_BATCH = 8
FEWEST_GAIN = 0.5
"""The least gain in success of a feature that is suggested."""


class PipelineFunctions(NamedTuple):
    """What a pipeline does for the browser."""

    shots: Callable[..., Iterator[Shot]]
    """`Pipeline.shots`."""
    generate: Callable[..., Sequence[tuple[Image.Image, Shot]]]
    """`Pipeline.generate`."""
    harvest: Callable[..., Iterator[tuple[Sequence[Image.Image], Sequence[Activations]]]]
    """`Pipeline.harvest_with_images`."""
    at: Callable[..., AbstractContextManager[None]]
    """`Pipeline.at`."""
    site: Site
    """Any site, at which steps are counted."""


@final
class StudyModel(ImageModel):
    """The pipeline of a study with the study's dictionaries."""

    def __init__(self, study: Study, pipeline: PipelineFunctions) -> None:
        self._study, self._pipeline = study, pipeline
        self._editor, self._fingerprints = StudyEditor(study), dict[DictionaryRef, str]()
        # On a CPU one by one: a batch gives other rounding than the single image of `difflex steer --replay`.
        self.batch = 1 if find_device().type == "cpu" else GPU_BATCH

    def shots(self, prompt: str, seeds: Sequence[int], steps: int | None) -> list[Shot]:
        shots = self._pipeline.shots(prompt, seeds=seeds, steps=steps, keep_steps=[0])
        return [replace(shot, timestep=None) for shot in shots]

    def images(self, shots: Sequence[Shot], edits: Sequence[Edit], report: Report) -> list[Image.Image]:
        hooks = [*self._current_editor(edits).steering_hooks(edits), self._counter(report)]
        images = list[Image.Image]()
        # A run of the pipeline has one prompt after the other with consecutive seeds.
        for _, numbered in groupby(enumerate(shots), key=lambda pair: pair[1].seed - pair[0]):
            group = [shot for _, shot in numbered]
            settings = {"steps": group[0].steps, "pixels": group[0].pixels, "guidance": group[0].guidance}
            prompts = [shot.prompt for shot in group]
            generated = self._pipeline.generate(prompts, seed=group[0].seed, edits=hooks, batch=self.batch, **settings)
            images += [image for image, _ in generated]
        return images

    def read(self, shot: Shot, refs: Sequence[DictionaryRef], report: Report) -> ReadImage:
        sites = list(dict.fromkeys(ref.site for ref in refs))
        settings = {"steps": shot.steps, "pixels": shot.pixels, "guidance": shot.guidance}
        shots = list(self._pipeline.shots(shot.prompt, seeds=[shot.seed], **settings))
        images, fired = list[Image.Image](), list[TokenFeatures]()
        with self._pipeline.at(*self._counter(report)):
            batches = list(self._pipeline.harvest(shots, sites, batch=1))
        for batch_images, activations in batches:
            images += batch_images
            for part in activations:
                report(shot.steps, shot.steps)
                fired += [self._encoded(ref, part, shots) for ref in refs if ref.site == part.site]
        return ReadImage(images[0], fired)

    def record(self, shot: Shot, edits: Sequence[Edit]) -> str:
        editor = self._current_editor(edits)
        editor.check(edits)
        return EditRecord(shot=shot, edits=tuple(edits), checksums=editor.checksums(edits)).as_text()

    def _encoded(self, ref: DictionaryRef, part: Activations, shots: Sequence[Shot]) -> TokenFeatures:
        dictionary = self._current_editor([ref]).dictionary(ref).on(find_device())
        parts = [
            _strongest(dictionary.encode(tokens.to(dictionary.device))) for tokens in part.values[0].float().split(ENCODED_TOKENS)
        ]
        [timestep] = {own.timestep for own in part.shots}
        return TokenFeatures(
            ref=ref,
            step=[shot.timestep for shot in shots].index(timestep),
            timestep=timestep or 0.0,
            grid=part.grid,
            values=torch.cat([codes.values for codes in parts]).cpu().numpy(),
            features=torch.cat([codes.indices for codes in parts]).cpu().numpy(),
        )

    def _counter(self, report: Report) -> SteeringHook:
        """Return a hook that changes nothing and reports the step."""

        def count(_: object, context: HookContext) -> None:
            report(context.step + 1, context.shots[0].steps if context.shots else context.step + 1)

        return SteeringHook(self._pipeline.site, count)  # pyright: ignore[reportArgumentType] (it takes anything)

    def _current_editor(self, users: Sequence[Edit | DictionaryRef]) -> StudyEditor:
        """Return an editor of the dictionaries as they are now: it reads each once, and a growing study replaces them."""
        refs = [
            DictionaryRef(user.site, user.dictionary or "") if isinstance(user, Edit) else user
            for user in users
            if not isinstance(user, Edit) or user.dictionary is not None
        ]
        current = {ref: fingerprint(self._study.dictionary(*self._study.find_dictionary(str(ref)))) for ref in refs}
        if any(self._fingerprints.get(ref, value) != value for ref, value in current.items()):
            self._editor, self._fingerprints = StudyEditor(self._study), {}
        self._fingerprints |= current
        return self._editor


def paint_choices(study: Study) -> PaintChoices:
    """Return what a study offers to paint with."""
    contrasts = dict[str, Site]()
    for name in study.contrasts():
        with suppress(DifflexError, OSError):  # one that is damaged is not offered
            contrasts[name] = Contrast.load(study.contrast(name)).site
    return PaintChoices(_suggestions(study), contrasts)


def _suggestions(study: Study) -> list[Suggestion]:
    """Return the features whose edits were measured to work best, one for each concept."""
    best: dict[str, Suggestion] = {}
    for ref in study.dictionaries():
        path = study.steering(*ref)
        with suppress(DifflexError, OSError):
            results = SteeringResults.load(path) if path.is_file() else None
            for found in _of_results(study, ref, results) if results else ():
                if found.concept not in best or found.gain > best[found.concept].gain:
                    best[found.concept] = found
    return sorted(best.values(), key=lambda found: -found.gain)


def _of_results(study: Study, ref: DictionaryRef, results: SteeringResults) -> Iterator[Suggestion]:
    name = str(ref)
    if results.provenance.fingerprints.get(name) != fingerprint(study.dictionary(*ref)) or results.config.unit != "peak":
        return
    features = results.provenance.features.get(name, {})
    for curve in results.of("feature"):
        point, gain = curve.best(), curve.gain()
        if point is not None and gain >= FEWEST_GAIN and curve.concept in features:
            yield Suggestion(curve.concept, ref, features[curve.concept], point.strength, gain)


def _strongest(codes: Codes) -> Codes:
    """Return the features that fire most strongly at each token, in this order; where none fires, the value is 0."""
    values, order = codes.values.clamp(min=0).sort(dim=1, descending=True, stable=True)
    return Codes(values[:, :TOKEN_SLOTS], codes.indices.gather(1, order)[:, :TOKEN_SLOTS])
