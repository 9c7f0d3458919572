"""VLM backends: the interface, a local model, and known concepts as a ceiling for both."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
    ImageView,
    Instruction,
    JudgementAnswer,
    OddOneOutAnswer,
    TokenUsage,
    VLMAnswer,
)


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


@final
class LocalBackend(VLMBackend):
    """A model in memory; it answers one question after another."""

    def __init__(self, model: str, *, device: str | None = None, offline: bool = False, longest: int = 512) -> None:
        """`model`: a folder or a hub name; `longest`: tokens that an answer may have."""
        import transformers

        self._name, self._longest, self._lock = model, longest, Lock()
        target = find_device(device)
        try:
            # The annotations of transformers name its bare classes, not what these make of a folder.
            self._processor: Any = transformers.AutoProcessor.from_pretrained(model, local_files_only=offline)
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype="auto", local_files_only=offline)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"'{model}' cannot be opened as a model that sees and speaks: {error}. Name a folder or hub name of an "
                "image-text-to-text model of transformers."
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(f"'{model}' has no chat template: it was not made to be told what to do. Name one that was.")
        self._model = loaded.to(target).eval()

    @property
    def name(self) -> str:
        """Its folder or hub name."""
        return self._name

    def see(
        self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
    ) -> BackendReply:
        """What the model answers, the likeliest word each time."""
        images = [{"type": "image", "image": Image.open(io.BytesIO(view.png)).convert("RGB")} for view in views]
        told = f"{instruction.text}\n{objection}".rstrip()
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": told}]}]
        with self._lock, torch.inference_mode():
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device, dtype=self._model.dtype)
            words = self._model.generate(**inputs, max_new_tokens=self._longest, do_sample=False)
        asked = inputs["input_ids"].shape[1]
        text = self._processor.decode(words[0, asked:], skip_special_tokens=True)
        return BackendReply(text, TokenUsage(asked, words.shape[1] - asked, 0.0))


SHOWN = 0.5
"""From this share of its area on a token shows a concept; at 0 it does not; tokens between the two are left out."""
Shares = Callable[[str, int, int], Float[Tensor, "concept row column"]]
"""From the name of an image, rows and columns: the share of each token's area that each concept covers."""


@final
class KnownConceptsBackend(VLMBackend):
    """The ceiling for models that see: it needs shots of images whose concepts are known by mask, and costs nothing."""

    def __init__(self, concepts: Sequence[str], shares: Shares, common: Float[Tensor, " concept"]) -> None:
        """`common`: the share of all images' area that each concept covers."""
        self._concepts, self._common = tuple(concepts), common
        self._shares = lru_cache(4096)(shares)

    @property
    def name(self) -> str:
        """Always the same."""
        return "known concepts"

    @property
    def is_costly(self) -> bool:
        """No."""
        return False

    def see(
        self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
    ) -> BackendReply:
        """The best concept, its share of the highlights, or the image whose highlights show something else."""
        if schema is ExplanationAnswer:
            fits = torch.stack([self._fits(view) for view in views])
            each, common = fits.argmax(1).tolist(), int(fits.mean(0).argmax())
            names = [self._concepts[best] for best in each]
            answer = ExplanationAnswer(pattern_descriptions=names, common_pattern=self._concepts[common])
        elif schema is JudgementAnswer:
            answer = JudgementAnswer(score=self._share(views[0], self._named(instruction.explanation)))
        elif schema is OddOneOutAnswer:
            answer = OddOneOutAnswer(image=1 + self._stranger(views))
        else:
            raise RejectedRequest(f"known concepts do not answer {schema.__name__}")
        return BackendReply(answer.model_dump_json(), TokenUsage(0, 0, 0.0))

    def _truth(self, view: ImageView) -> Float[Tensor, "concept row column"]:
        if view.shot.image is None:
            raise RejectedRequest(f"nobody knows what is where in the image of '{view.shot.prompt}'")
        return self._shares(view.shot.image, *view.highlight.shape)

    def _fits(self, view: ImageView) -> Float[Tensor, " concept"]:
        """How well each concept tells what is highlighted from what is not: 0 for no better than chance, 1 for wholly.

        The harmonic mean of two shares: of the highlights how much shows it, beyond its share in all images; and of what shows
        it in this one, how much is highlighted. By the first alone what covers a whole image, as a style does, fits whatever is
        highlighted there.
        """
        truth = self._truth(view)
        shown = (truth * view.highlight).sum((1, 2))
        highlighted = shown / view.highlight.sum().clamp_min(1e-12)
        beyond = ((highlighted - self._common) / (1 - self._common).clamp_min(1e-6)).clamp_min(0)
        covered = shown / truth.sum((1, 2)).clamp_min(1e-12)
        return 2 * beyond * covered / (beyond + covered).clamp_min(1e-12)

    def _named(self, explanation: str) -> list[int]:
        """The concepts that an explanation names."""
        named = [i for i, name in enumerate(self._concepts) if re.search(rf"\b{re.escape(name)}s?\b", explanation, re.IGNORECASE)]
        if not named:
            raise RejectedRequest("the explanation names no known concept")
        return named

    def _share(self, view: ImageView, named: Sequence[int]) -> float:
        """The share of the highlighted tokens, by how strongly they are, that show all `named` concepts."""
        truth = self._truth(view)[list(named)].amin(0)
        shown, known = truth >= SHOWN, (truth >= SHOWN) | (truth <= 0)
        weight = (view.highlight * known).sum()
        return float((view.highlight * shown).sum() / weight) if weight > 0 else float(truth[view.highlight > 0].mean())

    def _stranger(self, views: Sequence[ImageView]) -> int:
        """The place of the view whose concepts agree least with those of the others."""
        fits = torch.nn.functional.normalize(torch.stack([self._fits(view) for view in views]), dim=1)
        return int((fits @ fits.T).sum(1).argmin())
