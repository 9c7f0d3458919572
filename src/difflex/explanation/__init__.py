"""Explanation: a seeing model says what a feature is, and a judge says how true that is."""

from difflex.explanation.answers import Answers
from difflex.explanation.asked import Answer, Explained, Instruction, Judged, Picked, Seen, View
from difflex.explanation.asker import Asker, Rehearsal, Terms, Unanswered
from difflex.explanation.backend import Backend
from difflex.explanation.comparing import Comparison, Difference, Method, compare, methods
from difflex.explanation.endpoint import Endpoint
from difflex.explanation.explaining import Work, chosen, explain, rehearse
from difflex.explanation.key import Key
from difflex.explanation.known import KnownConcepts
from difflex.explanation.local import LocalModel
from difflex.explanation.looking import Looked, look
from difflex.explanation.pace import Patience
from difflex.explanation.protocol import Protocol
from difflex.explanation.spending import Price

__all__ = [
    "Answer",
    "Answers",
    "Asker",
    "Backend",
    "Comparison",
    "Difference",
    "Endpoint",
    "Explained",
    "Instruction",
    "Judged",
    "Key",
    "KnownConcepts",
    "LocalModel",
    "Looked",
    "Method",
    "Patience",
    "Picked",
    "Price",
    "Protocol",
    "Rehearsal",
    "Seen",
    "Terms",
    "Unanswered",
    "View",
    "Work",
    "chosen",
    "compare",
    "explain",
    "look",
    "methods",
    "rehearse",
]
