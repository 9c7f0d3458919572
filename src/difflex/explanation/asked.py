"""What is asked and what may be answered: images with something highlighted, an instruction, and the form of the answer."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, NamedTuple, TypeVar

from jaxtyping import Float
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from difflex.explanation.words import cleaned
from difflex.records import Shot

__all__ = [
    "ExplanationAnswer",
    "ImageView",
    "Instruction",
    "JudgementAnswer",
    "MalformedAnswer",
    "OddOneOutAnswer",
    "PresenceAnswer",
    "TokenUsage",
    "VLMAnswer",
    "content_key",
    "form",
    "read",
]

DESCRIPTION, PATTERN = 300, 500
"""Characters of an answer that are kept."""
SHOWN_OF_ERROR = 300


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """An image as a backend sees it: with what is highlighted in it, and where it is from."""

    draw: Callable[[], Image.Image]
    """The image with its highlights; drawn only if somebody looks."""
    shot: Shot
    highlight: Float[Tensor, "row column"]
    """How strongly each token is highlighted: 1 at the feature's peak, 0 where nobody would see it."""

    @cached_property
    def png(self) -> bytes:
        """The image as a PNG file."""
        file = io.BytesIO()
        self.draw().save(file, "PNG", compress_level=1)  # three times as quick as the default, and hardly larger
        return file.getvalue()


class Instruction(NamedTuple):
    """What a seeing model is told to do."""

    text: str
    explanation: str = ""
    """The explanation that is judged, which `text` holds too; empty where none is."""


def _line(limit: int) -> AfterValidator:
    def line(text: str) -> str:
        kept = cleaned(text, limit)
        if not any(letter.isalnum() for letter in kept):
            raise ValueError("no words in it")
        return kept

    return AfterValidator(line)


def _share(score: float) -> float:
    if not 0 <= score <= 1:
        raise ValueError("not between 0 and 1")
    return score


def _counted(number: int) -> int:
    if number < 1:
        raise ValueError("images are counted from 1")
    return number


class VLMAnswer(BaseModel, ABC):
    """What a seeing model may answer; its text is cleaned when it is read."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    @abstractmethod
    def imagined(cls) -> VLMAnswer:
        """An answer that nobody gave, for rehearsals."""


class ExplanationAnswer(VLMAnswer):
    """What is highlighted in each image, and what that has in common."""

    pattern_descriptions: Annotated[list[Annotated[str, _line(DESCRIPTION)]], Field(description="one entry for each image")]
    common_pattern: Annotated[str, _line(PATTERN), Field(description="what all highlighted areas have in common")]

    @classmethod
    def imagined(cls) -> ExplanationAnswer:
        """As long as those of models are."""
        return cls(
            pattern_descriptions=["an area that stands out"], common_pattern="some pattern that is told in a line of words"
        )


class JudgementAnswer(VLMAnswer):
    """How well an image's highlights fit an explanation."""

    score: Annotated[float, AfterValidator(_share), Field(description="between 0 (not at all) and 1 (exactly)")]

    @classmethod
    def imagined(cls) -> JudgementAnswer:
        """Undecided."""
        return cls(score=0.5)


class OddOneOutAnswer(VLMAnswer):
    """Which of several images does not belong."""

    image: Annotated[int, AfterValidator(_counted), Field(description="its number, counted from 1")]

    @classmethod
    def imagined(cls) -> OddOneOutAnswer:
        """The first."""
        return cls(image=1)


class PresenceAnswer(VLMAnswer):
    """Which of two statements about an image are true."""

    shows: Annotated[bool, Field(description="whether the first statement is true")]
    rest: Annotated[bool, Field(description="whether the second statement is true")]

    @classmethod
    def imagined(cls) -> PresenceAnswer:
        """Nothing is seen."""
        return cls(shows=False, rest=False)


A = TypeVar("A", bound=VLMAnswer)


class TokenUsage(NamedTuple):
    """What a call took."""

    tokens_in: int
    tokens_out: int
    cost: float | None = None
    """As the endpoint says; None where it does not."""


class MalformedAnswer(Exception):
    """An answer that is not of the form that was asked for; its text says why."""


def read(text: str, schema: type[A]) -> A:
    """The answer in `text`, which may stand in a block of code or among other words."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        raise MalformedAnswer(f"no JSON object in '{cleaned(text, 80)}'")
    try:
        return schema.model_validate_json(text[start : end + 1])
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'JSON'}: {each['msg']}" for each in error.errors())
        raise MalformedAnswer(cleaned(told, SHOWN_OF_ERROR)) from None


@cache
def form(schema: type[VLMAnswer]) -> dict[str, object]:
    """The JSON schema of an answer, as strict as all endpoints can be: every key is required, no other is allowed."""
    entries = schema.model_json_schema()
    properties = {
        name: {key: value for key, value in each.items() if key != "title"} for name, each in entries["properties"].items()
    }
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def content_key(model: str, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer]) -> str:
    """The hash of everything that an answer depends on: who is asked, what is shown, told, and of what form the answer is."""
    images = [hashlib.sha256(view.png).hexdigest() for view in views]
    told = {"model": model, "images": images, "instruction": instruction.text, "form": form(schema)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
