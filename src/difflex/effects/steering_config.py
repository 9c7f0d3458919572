"""What `steer-eval` is asked for: concepts, groups, strengths, and what is found on prompts of its own."""

from dataclasses import dataclass
from typing import NamedTuple, final

from difflex.choices import Unit
from difflex.effects.inputs import check_images, check_steps
from difflex.errors import BadInput, UnknownName
from difflex.miniature.world import CONCEPTS
from difflex.values import check_fields

PLANNED, DOSED = 61, 6
"""Images for each prompt that a plan is chosen on, at most: unedited, and at five doses of 12 plans; and for each on which the
dose of optimised edits is chosen."""


@final
@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Which concepts are steered towards, and how."""

    groups: tuple[str, ...] = ("colour", "texture", "background", "shape", "style")
    """Groups of concepts of the drawn world."""
    concepts_per_group: int | None = None
    """Concepts of each group of the drawn world, evenly spread; None for all."""
    min_ap: float = 0.8
    """Least average precision of a feature."""
    trials: int = 24
    """Images of each concept."""
    pairs: int = 20
    """Pairs of captions for each contrast."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    """Of features in `unit`, of contrasts in lengths of their own."""
    unit: Unit = "peak"
    edit_steps: tuple[int, int] | None = None
    """First denoising step to edit and the one after the last; None for all."""
    automatic: bool = False
    """Also steer at all sites and in the text, with sites, operation, steps and dose chosen on prompts of their own."""
    effect_updates: int = 0
    """Also optimise the strengths of each site and step through the model, in so many updates; 0 does not."""
    effect_directions: bool = False
    """With `effect_updates`: optimise the direction at each site as well."""
    tuning: int = 16
    """Prompts of each concept for all of these; they are never judged."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_steps(self.edit_steps)
        for group in self.groups:
            if group not in CONCEPTS:
                raise UnknownName.among("The group", group, CONCEPTS)
        if self.concepts_per_group is not None and self.concepts_per_group < 1:
            raise BadInput(f"{self.concepts_per_group} concepts of each group are none. Ask for 1 or more.")
        if self.trials < 1 or self.pairs < 1 or self.tuning < 1 or self.effect_updates < 0 or not self.strengths:
            raise BadInput(
                f"{self.trials} trials, {self.pairs} pairs, {self.tuning} prompts to tune and {len(self.strengths)} strengths, "
                f"with {self.effect_updates} updates, leave nothing to judge. Ask for 1 or more of each; updates may be 0."
            )
        if self.effect_directions and not self.effect_updates:
            raise BadInput("Directions are optimised in updates. Give the number of effect updates as well.")
        self.check_images(1)

    def check_images(self, concepts: int) -> None:
        """Refuse to generate too many images for a number of concepts."""
        optimised = DOSED + self.effect_updates if self.effect_updates else 0
        planned = self.tuning * (PLANNED * self.automatic + optimised)
        check_images(concepts * (self.trials * (2 + 4 * len(self.strengths)) + 2 * self.pairs + planned))


class TargetConcept(NamedTuple):
    """A concept and the feature to steer with."""

    concept: str
    feature: int
    ap: float | None
    """Average precision; None for a feature that the concept file names."""
