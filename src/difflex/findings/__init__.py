"""What papers found of steering, as experiments: is it so of this model, too?"""

from difflex.findings.bench import Bench, Scope, Way
from difflex.findings.captions import concepts_of, pairs_for
from difflex.findings.experiments import EXPERIMENTS, finding, workload
from difflex.findings.record import Finding, Findings, Line

__all__ = [
    "EXPERIMENTS",
    "Bench",
    "Finding",
    "Findings",
    "Line",
    "Scope",
    "Way",
    "concepts_of",
    "finding",
    "pairs_for",
    "workload",
]
