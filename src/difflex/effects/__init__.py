"""What edits do: judges, steering evaluation, concept removal and findings."""

from difflex.effects.judging import (
    ImageStrip,
    JudgedGenerator,
    JudgeVerdict,
    SteeringResults,
    SteeringTask,
    SteeringTrial,
    StrengthCurve,
    StrengthPoint,
    judge,
    side_by_side,
)
from difflex.effects.removal import (
    FeatureCut,
    GenerationCodes,
    RemovalImages,
    RemovalRates,
    RemovalResults,
    RemovalTrial,
    RemovedConcept,
    best_of,
    choose,
    importance,
    rates,
)
from difflex.effects.sought import ConceptSpec, ImageAnswer, ImageQuestion, SimilarityJudge, by_answers

__all__ = ["ConceptSpec"]
