"""Explanation: a seeing model says what a feature is, and a judge says how true that is."""

from difflex.explanation.backends import KnownConceptsBackend, LocalBackend, VLMBackend
from difflex.explanation.client import CachedClient, DryRunClient, NoAnswer, RequestPolicy
from difflex.explanation.comparing import ExplainedMethod, MethodComparison, MethodDifference, compare, methods
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.explaining import ExplainResult, PresenceQuestion, chosen, explain, look, rehearse
from difflex.explanation.protocol import ExplanationProtocol
from difflex.explanation.questions import (
    ExplanationAnswer,
    ImageView,
    Instruction,
    JudgementAnswer,
    OddOneOutAnswer,
    PresenceAnswer,
    VLMAnswer,
)
from difflex.explanation.requests import AnswerCache, RetryPolicy, TokenPrice

__all__ = [
    "AnswerCache",
    "ApiKey",
    "CachedClient",
    "DryRunClient",
    "EndpointBackend",
    "ExplainResult",
    "ExplainedMethod",
    "ExplanationAnswer",
    "ExplanationProtocol",
    "ImageView",
    "Instruction",
    "JudgementAnswer",
    "KnownConceptsBackend",
    "LocalBackend",
    "MethodComparison",
    "MethodDifference",
    "NoAnswer",
    "OddOneOutAnswer",
    "PresenceAnswer",
    "PresenceQuestion",
    "RequestPolicy",
    "RetryPolicy",
    "TokenPrice",
    "VLMAnswer",
    "VLMBackend",
    "chosen",
    "compare",
    "explain",
    "look",
    "methods",
    "rehearse",
]
