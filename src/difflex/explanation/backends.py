"""VLM backends: the interface, a local model, and the known concepts of the drawn world as an upper bound."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from difflex.devices import find_device
from difflex.errors import BadInput
from difflex.explanation.questions import (
    ExplanationAnswer,
    FailedCall,
    ImageView,
    Instruction,
    JudgementAnswer,
    OddOneOutAnswer,
    TokenUsage,
    VLMAnswer,
    clean_text,
)
from difflex.miniature import draw
from difflex.miniature.world import CONCEPTS
from difflex.records import Shot

__all__ = ["BackendReply", "KnownConceptsBackend", "LocalBackend", "VLMBackend"]


class BackendReply(NamedTuple):
    """The reply of a backend."""

    text: str
    """JSON, if the backend follows the instruction."""
    usage: TokenUsage | None
    """None if the backend does not report it."""


class TransportFault(FailedCall):
    """No connection, a timeout, or a busy or broken endpoint; the call may be sent again."""

    outcome = "fault"


class UnusableEndpoint(TransportFault):
    """An address at which nothing answers as an endpoint does; unless it has answered before, another try is of no use."""


class RefusedAnswer(FailedCall):
    """A refusal; the question may be asked again."""

    outcome = "refused"


class RejectedRequest(FailedCall):
    """A request that the backend does not accept, such as one with an image of an unsupported type."""

    outcome = "rejected"


class VLMBackend(ABC):
    """A vision-language model: it takes images and an instruction, and replies in a given form."""

    name: str
    """The name under which answers are cached; backends of the same name are assumed to answer alike."""
    is_costly: bool = True
    """Whether answers are worth caching."""

    @abstractmethod
    def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
        """Return the reply, or raise a `FailedCall`; `objection` says what was wrong with the last answer."""

    @property
    def description(self) -> str:
        """The name and the place of what answers, for the user."""
        return self.name

    def check_shots(self, shots: Iterable[Shot]) -> None:
        """Raise an error if the backend cannot answer about images of these shots."""
        return

    def redact(self, text: str) -> str:
        """Return `text` without what must not be shown or kept, such as an API key that the model repeats."""
        return text

    def close(self) -> None:
        """Close connections."""
        return


@final
class LocalBackend(VLMBackend):
    """A model of transformers in memory; it answers one question at a time, while the next one's images are prepared."""

    def __init__(self, model: str, *, device: str | None = None, offline: bool = False, max_tokens: int = 512) -> None:
        """Load `model`, a folder or a hub name; answers have at most `max_tokens`."""
        import transformers

        self.name, self._max_tokens = model, max_tokens
        self._preparing, self._generating = Lock(), Lock()
        target = find_device(device)
        try:
            # The annotations of transformers name base classes, not the ones that it loads.
            self._processor: Any = transformers.AutoProcessor.from_pretrained(model, local_files_only=offline)
            network: Any = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype="auto", local_files_only=offline)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"'{model}' cannot be loaded as a VLM: {error}. Name a folder or hub name of an image-text-to-text model of "
                "transformers."
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(f"'{model}' has no chat template, so it does not follow instructions. Name a model with one.")
        self._model = network.to(target).eval()

    @property
    def description(self) -> str:
        return f"{self.name} on {self._model.device}"

    def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
        """Generate a reply greedily."""
        images = [{"type": "image", "image": Image.open(io.BytesIO(view.png)).convert("RGB")} for view in views]
        text = {"type": "text", "text": f"{instruction.text}\n{objection}".rstrip()}
        with self._preparing:
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": [*images, text]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device, dtype=self._model.dtype)
        with self._generating, torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False).cpu()
        length = inputs["input_ids"].shape[1]
        with self._preparing:  # a tokenizer is not for several threads
            reply = self._processor.decode(tokens[0, length:], skip_special_tokens=True)
        return BackendReply(reply, TokenUsage(length, tokens.shape[1] - length, 0.0))


DRAWN = "drawn:"
"""Prefix of the names of drawn images; their seed follows."""
SCENES = 400
"""Drawn scenes that measure how common each concept is."""
CLEAR_SHARE = 0.5
"""A token shows a concept if the concept covers at least this share of its area. Tokens with a smaller share are not judged."""
Shares = Callable[[str, int, int], Float[Tensor, "concept row column"]]
"""Returns, for an image and a grid of rows and columns, the share of each token's area that each concept covers."""


def _drawn_seed(name: str) -> int:
    match = re.fullmatch(rf"{DRAWN}(\d{{1,18}})", name)
    if match is None:
        raise RejectedRequest(f"'{clean_text(name, 80)}' is not the name of a drawn image")
    return int(match[1])


@final
class KnownConceptsBackend(VLMBackend):
    """An upper bound for VLMs: it answers from masks of concepts instead of looking at images, and costs nothing."""

    name = "known concepts"
    is_costly = False

    def __init__(self, concepts: Sequence[str], shares: Shares, common: Float[Tensor, " concept"]) -> None:
        """`common`: the share of the area of all images that each concept covers."""
        self._concepts, self._common = tuple(concepts), common
        self._shares = lru_cache(4096)(shares)

    @classmethod
    def of_drawn_world(cls) -> KnownConceptsBackend:
        """Return the backend that knows the concepts of drawn images; it draws the masks again from the seed in their names."""
        return cls(
            [name for names in CONCEPTS.values() for name in names],
            lambda name, rows, columns: draw([_drawn_seed(name)]).shares(rows, columns)[0],
            draw(range(SCENES)).shares(8, 8).mean((0, 2, 3)),
        )

    def check_shots(self, shots: Iterable[Shot]) -> None:
        """Raise an error if an image is not a drawn one."""
        for shot in shots:
            if not (shot.image or "").startswith(DRAWN):
                raise BadInput(
                    f"Known concepts can only explain drawn images, and the book has others ('{shot.image or shot.prompt}'). "
                    "Collect from drawn images, difflex collect STUDY --drawn-world, or name a VLM with --vlm."
                )

    def reply(self, views: Sequence[ImageView], instruction: Instruction[VLMAnswer], objection: str = "") -> BackendReply:
        """Return the best concept, its share of the highlights, or the image whose highlights show something else."""
        if instruction.schema is ExplanationAnswer:
            fits = torch.stack([self._fits(view) for view in views])
            names = [self._concepts[best] for best in fits.argmax(1).tolist()]
            answer = ExplanationAnswer(pattern_descriptions=names, common_pattern=self._concepts[int(fits.mean(0).argmax())])
        elif instruction.schema is JudgementAnswer:
            answer = JudgementAnswer(score=self._highlighted_share(views[0], self._concepts_in(instruction.explanation)))
        elif instruction.schema is OddOneOutAnswer:
            answer = OddOneOutAnswer(image=1 + self._odd_one_out(views))
        else:
            raise RejectedRequest(f"known concepts do not answer {instruction.schema.__name__}")
        return BackendReply(answer.model_dump_json(), TokenUsage(0, 0, 0.0))

    def _masks(self, view: ImageView) -> Float[Tensor, "concept row column"]:
        if view.shot.image is None:
            raise RejectedRequest(f"the concepts in the image of '{view.shot.prompt}' are not known")
        return self._shares(view.shot.image, *view.highlight.shape)

    def _fits(self, view: ImageView) -> Float[Tensor, " concept"]:
        """Return how well each concept separates highlighted from other tokens: 0 at chance, 1 for a perfect match.

        The harmonic mean of two shares: how much of the highlights shows the concept, beyond its share of all images; and how
        much of the concept in this image is highlighted. With the first share alone, a concept that covers a whole image, such
        as a style, would fit any highlights.
        """
        masks = self._masks(view)
        overlap = (masks * view.highlight).sum((1, 2))
        precision = overlap / view.highlight.sum().clamp_min(1e-12)
        beyond = ((precision - self._common) / (1 - self._common).clamp_min(1e-6)).clamp_min(0)
        recall = overlap / masks.sum((1, 2)).clamp_min(1e-12)
        return 2 * beyond * recall / (beyond + recall).clamp_min(1e-12)

    def _concepts_in(self, explanation: str) -> list[int]:
        """Return the numbers of the concepts that an explanation names."""
        patterns = [rf"\b{re.escape(name)}s?\b" for name in self._concepts]
        numbers = [i for i, pattern in enumerate(patterns) if re.search(pattern, explanation, re.IGNORECASE)]
        if not numbers:
            raise RejectedRequest("the explanation names no known concept")
        return numbers

    def _highlighted_share(self, view: ImageView, concepts: Sequence[int]) -> float:
        """Return the share of the highlighted tokens, weighted by their strength, that show all `concepts`."""
        mask = self._masks(view)[list(concepts)].amin(0)
        shows = mask >= CLEAR_SHARE
        weight = (view.highlight * (shows | (mask <= 0))).sum()
        return float((view.highlight * shows).sum() / weight) if weight > 0 else float(mask[view.highlight > 0].mean())

    def _odd_one_out(self, views: Sequence[ImageView]) -> int:
        """Return the position of the view whose concepts agree least with those of the others."""
        fits = torch.nn.functional.normalize(torch.stack([self._fits(view) for view in views]), dim=1)
        return int((fits @ fits.T).sum(1).argmin())
