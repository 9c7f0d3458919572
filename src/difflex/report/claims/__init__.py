"""Claims of arXiv 2505.24360, and what is wanted of steering, each held to a rule that is written beside it."""

from difflex.report.claims.claim import Claim
from difflex.report.claims.section import claims, judged

__all__ = ["Claim", "claims", "judged"]
