"""What can look at images and answer: the interface of all backends, and the ways in which one may fail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from difflex.explanation.asked import ImageView, Instruction, TokenUsage, VLMAnswer

__all__ = ["BackendReply", "RefusedAnswer", "RejectedRequest", "TransportFault", "VLMBackend"]


class BackendReply(NamedTuple):
    """What a backend said, and what it took."""

    text: str
    """JSON, if the backend did as told."""
    usage: TokenUsage | None
    """None if nobody said."""


class TransportFault(Exception):
    """A call that came to nothing on its way: no connection, no time, a busy or broken endpoint. It may be sent again."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        """`wait`: the seconds that the endpoint asks to be left alone."""
        super().__init__(reason)
        self.wait = wait


class RefusedAnswer(Exception):
    """A call that was answered by a refusal. It may be asked again."""

    def __init__(self, reason: str, usage: TokenUsage | None = None) -> None:
        super().__init__(reason)
        self.usage = usage


class RejectedRequest(Exception):
    """A call that the endpoint does not take, such as one with an image of a kind that it does not read."""


class VLMBackend(ABC):
    """Something that sees: it looks at images, is told what to do, and answers in a given form."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What its answers are kept under: two backends of one name are held to answer alike."""

    @property
    def is_costly(self) -> bool:
        """Whether answers are worth keeping."""
        return True

    @abstractmethod
    def see(
        self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
    ) -> BackendReply:
        """What it answers; raises a `TransportFault`, `RefusedAnswer` or `RejectedRequest`. `objection` says what was wrong with its last answer."""

    def close(self) -> None:
        """Nothing; what it holds open is closed."""
        return
