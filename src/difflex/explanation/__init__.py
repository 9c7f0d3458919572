"""Explanation: a seeing model says what a feature is, and a judge says how true that is."""

from difflex.explanation.answers import AnswerCache
from difflex.explanation.asked import (
    ExplanationAnswer,
    ImageView,
    Instruction,
    JudgementAnswer,
    OddOneOutAnswer,
    PresenceAnswer,
    VLMAnswer,
)
from difflex.explanation.asker import CachedClient, DryRunClient, NoAnswer, RequestPolicy
from difflex.explanation.backend import VLMBackend
from difflex.explanation.comparing import ExplainedMethod, MethodComparison, MethodDifference, compare, methods
from difflex.explanation.endpoint import EndpointBackend
from difflex.explanation.explaining import ExplainResult, chosen, explain, rehearse
from difflex.explanation.key import ApiKey
from difflex.explanation.known import KnownConceptsBackend
from difflex.explanation.local import LocalBackend
from difflex.explanation.looking import PresenceQuestion, look
from difflex.explanation.pace import RetryPolicy
from difflex.explanation.protocol import ExplanationProtocol
from difflex.explanation.spending import TokenPrice

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
