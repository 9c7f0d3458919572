"""The units of a strength: how large the codes of features and the activations of a site are, by a sample of its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput, BrokenFile
from difflex.files import write_file
from difflex.records import ActivationBatch

__all__ = ["FeatureScales", "scales_of"]

FORMAT = 1
TOKENS, SAMPLE = 65_536, 2048
"""Tokens that are encoded, and how many of them are kept to weigh strengths with."""
MOST = 2.0
"""The largest default strength, in peaks."""


@final
@dataclass(frozen=True, kw_only=True)
class FeatureScales:
    """How large things are at a site."""

    peaks: Float[Tensor, " feature"]
    """The largest code of each feature; 0 where it never fired."""
    means: Float[Tensor, " feature"]
    """Its mean code where it fires."""
    norm: float
    """Mean length of an activation."""
    ceiling: float
    """The 99th percentile of their lengths."""
    sample: Float[Tensor, "token width"]
    """Some of the activations."""

    SHARE: ClassVar[float] = 0.95

    def default_strengths(self, decoder: Float[Tensor, "feature width"], features: Int[Tensor, " feature"]) -> Tensor:
        """For each of `features`, in peaks: the largest strength, at most 2, that keeps 95 % of edited tokens under the ceiling.

        The length of x + p v grows with p once it has passed its least; bisection finds where it meets the ceiling.
        """
        steps = decoder.float().cpu() * self.peaks[features, None]
        along, lengths, squares = self.sample @ steps.T, steps.square().sum(1), self.sample.square().sum(1, keepdim=True)
        low, high = torch.zeros(len(features)), torch.full((len(features),), MOST)
        whole = self._fits(squares, along, lengths, high)
        for _ in range(16):
            middle = (low + high) / 2
            fits = self._fits(squares, along, lengths, middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(lengths > 0, torch.where(whole, MOST, low), 0.0)

    def _fits(self, squares: Tensor, along: Tensor, lengths: Tensor, strength: Tensor) -> Tensor:
        edited = squares + 2 * strength * along + strength.square() * lengths
        return (edited <= self.ceiling**2).float().mean(0) >= self.SHARE

    def save(self, path: Path, checksum: str) -> None:
        """Nothing; the scales of the dictionary of that checksum are in `path`, replaced in one go."""
        tensors = {"peaks": self.peaks, "means": self.means, "sample": self.sample}
        about = {"format": str(FORMAT), "checksum": checksum, "sizes": json.dumps([self.norm, self.ceiling])}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, about))

    @classmethod
    def kept(cls, path: Path, checksum: str) -> FeatureScales | None:
        """Those in `path`, if they are of the dictionary of that checksum."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != str(FORMAT):
                    raise BrokenFile(f"{path} is not of format {FORMAT}, which this difflex reads. Delete it; it is made again.")
                if about["checksum"] != checksum:
                    return None
                norm, ceiling = json.loads(about["sizes"])
                tensors = {name: file.get_tensor(name) for name in ("peaks", "means", "sample")}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise BrokenFile(f"{path} cannot be read ({error}): it is damaged. Delete it; it is made again.") from error
        return cls(norm=norm, ceiling=ceiling, **tensors)


def scales_of(dictionary: Dictionary, batches: Iterable[ActivationBatch], tokens: int = TOKENS) -> FeatureScales:
    """The scales by the first `tokens` of `batches`, training tokens in any order."""
    peaks, sums, fired = (torch.zeros(dictionary.size) for _ in range(3))
    norms, sample, seen = [], [], 0
    for rows in batches:
        x = rows.values.float()[: tokens - seen]
        values, indices = (part.cpu().flatten() for part in dictionary.encode(x))
        fires = values > 0
        values, indices = values[fires], indices[fires].long()
        peaks.scatter_reduce_(0, indices, values, "amax")
        sums.index_add_(0, indices, values)
        fired += torch.bincount(indices, minlength=dictionary.size)
        norms.append(x.norm(dim=1).cpu())
        sample.append(x[: max(0, SAMPLE - seen)].cpu())
        seen += len(x)
        if seen >= tokens:
            break
    if not seen:
        raise BadInput(f"{dictionary.name} has no tokens to tell its units by. Harvest {dictionary.site} first.")
    lengths = torch.cat(norms)
    # `quantile` takes no more than 16 M numbers.
    ceiling = float(lengths.kthvalue(max(1, round(0.99 * len(lengths)))).values)
    means = sums / fired.clamp(min=1)
    return FeatureScales(peaks=peaks, means=means, norm=float(lengths.double().mean()), ceiling=ceiling, sample=torch.cat(sample))
