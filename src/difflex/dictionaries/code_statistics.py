"""`CodeStatistics`: the means of the codes of an imported dictionary, as the tool that it is from measured them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.dictionary_config import STATISTICS, fingerprint
from difflex.errors import BrokenFile, NonFinite
from difflex.tensors import read_tensors, write_tensors

FORMAT = 1
ADVICE = "Delete it, and import the dictionary again."


@final
@dataclass(frozen=True, kw_only=True)
class CodeStatistics:
    """The mean and standard deviation of the code of each feature where it fires."""

    mean: Float[Tensor, " feature"]
    """0 for a feature that never fired."""
    std: Float[Tensor, " feature"] | None = None

    def __post_init__(self) -> None:
        for name, values in self._tensors().items():
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise NonFinite(f"The {name} of the codes must be finite and not below 0.")

    def save(self, folder: Path) -> None:
        """Write them beside the dictionary in `folder`, with its fingerprint."""
        write_tensors(folder / STATISTICS, FORMAT, self._tensors(), {"dictionary": fingerprint(folder)})

    @classmethod
    def load(cls, folder: Path) -> CodeStatistics | None:
        """Return those of the dictionary in `folder`; None if it has none, or those of another dictionary."""
        path = folder / STATISTICS
        if not path.is_file():
            return None
        header, tensors = read_tensors(path, FORMAT, ADVICE)
        if "mean" not in tensors or not {*tensors} <= {"mean", "std"}:
            raise BrokenFile(f"{path} holds {', '.join(sorted(tensors))[:200]}, not mean and std. {ADVICE}")
        return cls(**tensors) if header.get("dictionary") == fingerprint(folder) else None

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean} if self.std is None else {"mean": self.mean, "std": self.std}
