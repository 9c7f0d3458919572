"""Which shots are kept out of growth: how their tokens fare is how those of new images will."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from difflex.records import Shot

__all__ = ["HoldOut"]


@final
class HoldOut:
    """Lots that decide which shots are kept out: all of one prompt or image together, the same whenever and wherever."""

    def __init__(self, shot: Callable[[int], Shot] | None) -> None:
        """By the prompts of the shots, or where nobody knows these, by their numbers."""
        self._shot = shot
        self._lots: dict[int, float] = {}

    def kept_out(self, shots: Int[Tensor, " token"], share: float) -> Bool[Tensor, " token"]:
        """Which tokens, given the numbers of their shots, are of the `share` of all prompts that is kept out."""
        numbers, places = shots.unique(return_inverse=True)
        return torch.tensor([self._lot(number) < share for number in numbers.tolist()], dtype=torch.bool)[places]

    def _lot(self, number: int) -> float:
        if number not in self._lots:
            shot = None if self._shot is None else self._shot(number)
            content = str(number) if shot is None else shot.image or shot.prompt
            # Another hash than the one that parts train from held-out: of that, the train split is a selection.
            digest = hashlib.sha256(f"kept out of growth: {content}".encode()).digest()
            self._lots[number] = int.from_bytes(digest[:8], "big") / 2**64
        return self._lots[number]
