"""Known concepts as a backend: it names and judges by the truth about what is where in drawn images, and looks at none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.explanation.asked import (
    ExplanationAnswer,
    ImageView,
    Instruction,
    JudgementAnswer,
    OddOneOutAnswer,
    TokenUsage,
    VLMAnswer,
)
from difflex.explanation.backend import BackendReply, RejectedRequest, VLMBackend

__all__ = ["KnownConceptsBackend"]

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
