"""What is wanted of steering with features, held to a rule."""

from typing import NamedTuple

from difflex.report.claims.claim import Claim, decided, listed
from difflex.report.facts import StudyFacts
from difflex.report.figures.removal import BAR, together
from difflex.report.steered import SteeringFacts, SteeringSummary, summary
from difflex.report.telling import number, percent

__all__ = ["removes_concepts", "steers_towards_concepts"]

GROUPS, REMOVED = ("colour", "texture", "background"), ("colour", "background")
TOGETHER = "colours, textures and backgrounds together"
GAIN, SHARE, RANDOM = 0.7, 0.5, 0.1


class SteeringOutcome(NamedTuple):
    """What came of steering towards the concepts of a group, or of several together."""

    name: str
    concepts: int
    rare: int
    features: int
    own: SteeringSummary | None
    random: SteeringSummary | None

    @property
    def holds(self) -> bool:
        """Whether enough concepts have a feature, and steering does what is wanted where a random direction does not."""
        enough = self.concepts > 0 and self.features >= SHARE * self.concepts
        gains = self.own is not None and self.own.gain >= GAIN
        return enough and gains and self.random is not None and self.random.gain < RANDOM


def steers_towards_concepts(facts: StudyFacts) -> Claim:
    """Features of colours, textures and backgrounds put what they detect into images."""
    measured = [(_found(each, TOGETHER, *GROUPS), each) for each in facts.steered if _is_measured(each)]
    measured.sort(key=lambda one: -one[0].features)
    together = [f"{each.place}, {_said(all_groups)}" for all_groups, each in measured]
    found = [(each, [_found(each, group, group) for group in GROUPS]) for _, each in measured]
    told = [f"{each.place}, {_said(group)}" for each, groups in found for group in groups]
    return Claim(
        name="steering",
        statement="Features of colours, textures and backgrounds, added where they are wanted, put them into the image and "
        "leave the rest (not a claim of the paper, which shows single examples).",
        rule="In one dictionary at least, for the colours, for the textures and for the backgrounds alike: half of them or more "
        "have a feature of AP ≥ 0.8 (what too few images show to tell counts as without one), and among these the median over "
        "concepts of the success less the rate without the edit is at least 70 %, at a strength at which at least 90 % of all "
        "else that was right stays so and no image breaks; random directions of equal length get less than 10 %.",
        verdict=decided(found, any(all(group.holds for group in groups) for _, groups in found)),
        evidence=listed(told, "difflex steer-eval STUDY, towards colours, textures and backgrounds", together),
    )


def _is_measured(each: SteeringFacts) -> bool:
    """Whether it was asked of all three groups of the drawn world what features do."""
    known = [each.known[group] for group in GROUPS if group in each.known and not each.is_told]
    return len(known) == len(GROUPS) and all(group.concepts > group.rare for group in known)


def _found(each: SteeringFacts, name: str, *groups: str) -> SteeringOutcome:
    known = [each.known[group] for group in groups]
    return SteeringOutcome(
        name,
        sum(group.concepts for group in known),
        sum(group.rare for group in known),
        sum(len(group.detected) for group in known),
        summary(each.curves("feature", *groups)),
        summary(each.curves("random", *groups)),
    )


def _said(found: SteeringOutcome) -> str:
    features = f"{found.name}: {found.features} of {found.concepts} have a feature"
    if found.rare:
        features += f" ({found.rare} of the {found.concepts} {'is' if found.rare == 1 else 'are'} shown too rarely to tell)"
    if found.own is None or found.random is None:
        return features
    own = found.own
    at = "no strength will do" if own.strength is None else f"keeping {percent(own.kept)}, at strength {number(own.strength)}"
    return f"{features}; {percent(own.gain)} above the rate without ({at}); random directions {percent(found.random.gain)}"


def removes_concepts(facts: StudyFacts) -> Claim:
    """Colours and backgrounds can be taken away by their features."""
    found = []
    for removed in facts.removals:
        by_group = {group: [each for each in removed.concepts if each.group == group] for group in REMOVED}
        if all(by_group.values()):
            found.append(
                (removed, {group: sum(each.rates.reach(BAR) for each in of) for group, of in by_group.items()}, by_group)
            )
    told = [
        f"{together(removed)}, {group}: {reached[group]} of {len(of)} concepts"
        for removed, reached, by_group in found
        for group, of in by_group.items()
    ]
    holds = any(all(reached[group] >= SHARE * len(of) for group, of in by_group.items()) for _, reached, by_group in found)
    return Claim(
        name="removal",
        statement="Colours and backgrounds can be taken away by their features without loss (not a claim of the paper; measured "
        "as arXiv 2501.18052 does).",
        rule="With one dictionary at least, or several together, half or more of the colours and half or more of the backgrounds "
        "are each removed from at least 90 % of unseen images, while at least 90 % of the others of the group and of all else "
        "stays.",
        verdict=decided(found, holds),
        evidence=listed(told, "difflex removal STUDY"),
    )
