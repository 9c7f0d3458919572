"""Explanations of features in words: a VLM explains, a judge scores how well each explanation predicts where a feature fires."""

from difflex.explanation.client import CachedClient, PresenceQuestion, ask_presence, open_client
from difflex.explanation.protocol import ExplanationProtocol
from difflex.explanation.questions import PresenceAnswer
from difflex.explanation.requests import RequestPolicy
from difflex.explanation.studies import ExplainConfig, dry_run_studies, explain_studies

__all__ = [
    "CachedClient",
    "ExplainConfig",
    "ExplanationProtocol",
    "PresenceAnswer",
    "PresenceQuestion",
    "RequestPolicy",
    "ask_presence",
    "dry_run_studies",
    "explain_studies",
    "open_client",
]
