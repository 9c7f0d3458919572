"""The measures of one feature after another: of its top images, of images of its explanation, of it alone, and of edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.effects import ModelFunctions
from difflex.effects.inputs import to_tensor
from difflex.features import ImageAlbum
from difflex.features.entries import COVER_THRESHOLD
from difflex.measures.image_aspects import Images, SimilarityMatrix, region_change
from difflex.measures.inputs import FeatureExplanation, MeasuredFeature, MeasureInputs, covered, open_images
from difflex.measures.records import FeatureValue, MeasureConfig, MeasureName
from difflex.miniature import Judge, load_judge
from difflex.miniature.world import PIXELS
from difflex.records import Edit, HookContext, Rectangle
from difflex.steering import EditFeatures, SteeringHook, StudyEditor, steering_hooks
from difflex.study import DictionaryRef

REGION = Rectangle(0.25, 0.25, 0.75, 0.75)
"""Where images are edited: the middle, for all features alike."""
SHOWS = 0.5
"""The share of the pixels that could show a concept from which on an image shows it."""
Values = Mapping[MeasureName, FeatureValue]


class MeasureStage(NamedTuple):
    """Measures that are made of the same images."""

    measures: tuple[MeasureName, ...]
    measure: Callable[[FeatureMeter, MeasuredFeature], Values]


@final
@dataclass(frozen=True, kw_only=True)
class FeatureMeter:
    """Measures features of one dictionary."""

    editor: StudyEditor
    place: DictionaryRef
    config: MeasureConfig
    inputs: MeasureInputs
    model: Callable[[], ModelFunctions]
    similarity: SimilarityMatrix

    @cached_property
    def _judge(self) -> Judge:
        return load_judge()

    @cached_property
    def _album(self) -> ImageAlbum:
        return ImageAlbum(self.editor.study.images)

    @cached_property
    def _unedited(self) -> Images:
        return self._generate(self.inputs.prompts, [])

    def _generate(self, prompts: Sequence[str], hooks: Sequence[SteeringHook]) -> Images:
        return to_tensor(self.model().generate(prompts, self.config.seed, None, hooks))

    def top_images(self, item: MeasuredFeature) -> Values:
        """Measure how alike the top images of a feature are, and how many pairs of them share its concept."""
        own = open_images(self._album, [image.file for image in item.top])
        others = open_images(self._album, item.random_images)
        values: dict[MeasureName, FeatureValue] = {
            "specificity": FeatureValue(
                item.feature, _mean_pair(self.similarity(own, own)), _mean_pair(self.similarity(others, others))
            )
        }
        if self.inputs.are_judged and item.explanation is not None and self.inputs.grid is not None:
            shown = [
                [
                    self._shows(image, item.explanation, covered(top.map, self.inputs.grid, PIXELS))
                    for image, top in zip(images, item.top, strict=True)
                ]
                for images in (own, others)
            ]
            values["known-specificity"] = FeatureValue(item.feature, *map(_sharing_pairs, shown))
        return values

    def explained_images(self, item: MeasuredFeature) -> Values:
        """Measure in how many images of its own explanation a feature fires, and in how many of another one."""
        own, other = item.explanation, item.partner_explanation
        if own is None or other is None or not own.prompts or not other.prompts or own.text == other.text:
            return {}
        prompts = (*own.prompts, *other.prompts)
        largest = self._largest_codes(item.feature, prompts)
        fires = (largest >= COVER_THRESHOLD * self.inputs.peaks[item.feature]).double()
        return {"sensitivity": FeatureValue(item.feature, *(float(side.mean()) for side in fires.split(len(own.prompts))))}

    def _largest_codes(self, feature: int, prompts: Sequence[str]) -> Float[Tensor, " image"]:
        """Return the largest code of a feature at any token and step of the images of prompts."""
        site, label = self.place
        codes = self.editor.features(Edit(operation="scale", site=site, dictionary=label, features=(feature,))).codes
        largest = torch.zeros(len(prompts))

        def record(x: Float[Tensor, "batch token width"], context: HookContext) -> None:
            assert context.shots is not None
            if context.half == "unconditional":
                return
            for row, shot in zip(x, context.shots, strict=True):
                number = shot.seed - self.config.seed
                largest[number] = max(float(largest[number]), float(codes(row.float()).max()))

        self._generate(prompts, [SteeringHook(site, record)])
        return largest

    def alone(self, item: MeasuredFeature) -> Values:
        """Measure how much the images of a feature alone resemble its top images, and how many show its concept."""
        site, label = self.place
        is_update = site.kind == "update"
        edit = Edit(
            operation="replace" if is_update else "add",
            site=site,
            dictionary=label,
            features=(item.feature,),
            unit=self.config.unit or ("mean" if is_update else "peak"),
            strength=self.config.strength,
        )
        images = self._generate([""] * self.config.images, self.editor.steering_hooks([edit]))
        sides = [open_images(self._album, [image.file for image in top]) for top in (item.top, item.partner_top)]
        own, other = (float(self.similarity(images, side).mean()) for side in sides)
        values: dict[MeasureName, FeatureValue] = {"causality": FeatureValue(item.feature, own, other)}
        explanations = item.explanation, item.partner_explanation
        if self.inputs.are_judged and None not in explanations and images.shape[2:] == (PIXELS, PIXELS):
            everywhere = torch.ones(PIXELS, PIXELS, dtype=torch.bool)
            shares = [
                sum(self._shows(image, explanation, everywhere) for image in images) / len(images) for explanation in explanations
            ]
            values["known-causality"] = FeatureValue(item.feature, *shares)
        return values

    def edits(self, item: MeasuredFeature) -> Values:
        """Measure what adding a feature to a region changes, and what a random direction of the same length changes."""
        site, label = self.place
        edit = Edit(
            operation="add",
            site=site,
            dictionary=label,
            features=(item.feature,),
            unit="norm",
            strength=self.config.edit_strength,
            region=REGION,
        )
        features = self.editor.features(edit)
        own, other = (
            region_change(self._generate(self.inputs.prompts, _hooks(edit, each)), self._unedited, REGION)
            for each in (features, self._random_direction(features, item.feature))
        )
        return {
            "texture": FeatureValue(item.feature, own.texture, other.texture),
            "colour": FeatureValue(item.feature, own.colour, other.colour),
            "locality": FeatureValue(item.feature, own.locality, other.locality),
        }

    def _random_direction(self, features: EditFeatures, number: int) -> EditFeatures:
        """Return a feature with a direction drawn from a normal distribution with the covariance of the site's activations.

        An isotropic one would leave the distribution of activations, and break images.
        """
        sample = self.editor.scales(self.place).sample
        generator = torch.Generator().manual_seed(self.config.seed + number)
        direction = torch.randn(1, len(sample), generator=generator) @ (sample - sample.mean(0))
        length = features.decoder.norm() / direction.norm().clamp(min=1e-30)
        return features._replace(description=f"random direction {number}", decoder=direction.to(features.decoder) * length)

    def _shows(self, image: Tensor, explanation: FeatureExplanation | None, region: Tensor) -> bool:
        assert explanation is not None
        return bool(self._judge.share(image[None], explanation.text, region) > SHOWS)

    def obstacle(self, measure: MeasureName) -> str | None:
        """Return why no feature of the dictionary can be measured so, as a sentence; None if some can."""
        site = self.place.site
        if measure.startswith("known") and not self.inputs.are_judged:
            return "No concepts of drawn images are known. Run difflex concepts, on a model of the drawn world."
        if (measure == "known-specificity" and self.inputs.grid is None) or (measure in EDITS and site.stream == "text"):
            return f"The tokens of {site} have no place in the image."
        if measure == "sensitivity" and not any(item.explanation and item.explanation.prompts for item in self.inputs.features):
            return "None of the features is explained. Run difflex explain, or difflex concepts on a model of the drawn world."
        return None


def _hooks(edit: Edit, features: EditFeatures) -> list[SteeringHook]:
    return steering_hooks([edit], lambda _: features)


def _mean_pair(similarities: Float[Tensor, "image image"]) -> float:
    """Return the mean similarity of two different images."""
    count = len(similarities)
    return float((similarities.sum() - similarities.diagonal().sum()) / (count * (count - 1)))


def _sharing_pairs(shown: Sequence[bool]) -> float:
    """Return the share of pairs of images that both show something."""
    count = len(shown)
    return sum(shown) * (sum(shown) - 1) / (count * (count - 1))


EDITS: tuple[MeasureName, ...] = ("texture", "colour", "locality")
STAGES = {
    "top images": MeasureStage(("specificity", "known-specificity"), FeatureMeter.top_images),
    "explained images": MeasureStage(("sensitivity",), FeatureMeter.explained_images),
    "features alone": MeasureStage(("causality", "known-causality"), FeatureMeter.alone),
    "edits": MeasureStage(EDITS, FeatureMeter.edits),
}
"""The measures by what they are made of."""
