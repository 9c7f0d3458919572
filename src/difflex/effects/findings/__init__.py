"""What papers found of steering, as experiments: is it so of this model, too?"""

from difflex.effects.findings.bench import ExperimentBench, FindingsConfig, SteeringDirection
from difflex.effects.findings.captions import concepts_of, pairs_for
from difflex.effects.findings.experiments import EXPERIMENTS, finding, workload
from difflex.effects.findings.record import Finding, FindingLine, Findings

__all__ = [
    "EXPERIMENTS",
    "ExperimentBench",
    "Finding",
    "FindingLine",
    "Findings",
    "FindingsConfig",
    "SteeringDirection",
    "concepts_of",
    "finding",
    "pairs_for",
    "workload",
]
