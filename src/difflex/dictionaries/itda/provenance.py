"""Where atoms come from: every one is a token of a shot, and can be shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from difflex.errors import BrokenFile
from difflex.records import Shot

__all__ = ["AtomPatch", "AtomProvenance"]


class AtomPatch(NamedTuple):
    """The place in the data that an atom is."""

    number: int
    """Of its shot, in the source that the dictionary was grown from."""
    token: int
    """The position within the shot."""
    shot: Shot | None
    """The shot itself, where the source knew it."""


@dataclass(frozen=True, kw_only=True)
class AtomProvenance:
    """The shot and token of every atom."""

    shots: Int[Tensor, " size"]
    """Numbers of shots in the source; -1 where nobody knows."""
    tokens: Int[Tensor, " size"]
    known: Mapping[int, Shot] = field(default_factory=dict)
    """The shots behind the numbers."""

    def of(self, feature: int) -> AtomPatch | None:
        """The patch that `feature` is; None where nobody knows."""
        number = int(self.shots[feature])
        return None if number < 0 else AtomPatch(number, int(self.tokens[feature]), self.known.get(number))

    @classmethod
    def unknown(cls, size: int) -> AtomProvenance:
        """That of `size` atoms whose file does not say where they come from."""
        nowhere = torch.full((size,), -1)
        return cls(shots=nowhere, tokens=nowhere.clone())

    def take(self, features: Int[Tensor, " feature"]) -> AtomProvenance:
        """The provenance of these features alone."""
        shots = self.shots[features]
        kept = set(shots.tolist())
        return type(self)(
            shots=shots,
            tokens=self.tokens[features],
            known={number: shot for number, shot in self.known.items() if number in kept},
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to be saved; shots go as lines of JSON, in bytes."""
        lines = "\n".join(json.dumps([number, asdict(shot)]) for number, shot in sorted(self.known.items()))
        packed = torch.frombuffer(bytearray(lines.encode() or b"\n"), dtype=torch.uint8)
        return {"provenance.shots": self.shots, "provenance.tokens": self.tokens, "provenance.known": packed}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> AtomProvenance:
        """What `tensors` was written from."""
        try:
            lines = bytes(tensors["provenance.known"].cpu().tolist()).decode().split("\n")
            entries = [json.loads(line) for line in lines if line]
            known = {number: Shot(**{**entry, "pixels": tuple(entry["pixels"])}) for number, entry in entries}
            return cls(shots=tensors["provenance.shots"].cpu(), tokens=tensors["provenance.tokens"].cpu(), known=known)
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFile(f"A dictionary's file does not say which patches its atoms are ({error}): copy it again.") from error
