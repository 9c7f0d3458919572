"""Findings of others on steering, made experiments: is it so of this model, too?"""

from difflex.findings.record import Finding, Findings, Line

__all__ = ["Finding", "Findings", "Line"]
