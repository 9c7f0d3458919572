"""The features that an edit changes, and their scales: the size of a strength of 1 in each unit, measured on sampled tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difflex.dictionaries import Dictionary, DictionaryOrigin
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, StaleWork, UnknownName
from difflex.records import ActivationBatch, HookContext, Site, is_same_model, model_name
from difflex.tensors import read_tensors, write_tensors
from difflex.values import check_fields

FORMAT = 2
ADVICE = "Delete it; it is made again."
TOKENS, SAMPLE = 65_536, 2048
"""Tokens that are encoded, and how many of them are stored to compute default strengths with."""
MAX_STRENGTH = 1.0
"""The largest strength that is taken without looking at images, in peaks."""

Codes = Callable[[Float[Tensor, "token width"]], Float[Tensor, "token feature"]]


class EditFeatures(NamedTuple):
    """The features that an edit changes."""

    description: str
    """Names them in messages."""
    codes: Codes
    """Computes their codes at each token."""
    decoder: Float[Tensor, "feature width"]
    """What a code of 1 of each adds to an activation."""
    units: Mapping[str, Float[Tensor, " feature"]]
    """The code that a strength of 1 stands for, by unit; of `current-norm` for activations with a mean norm of 1."""
    origin: DictionaryOrigin | None = None
    """The model and site that they are made for; None if that is unknown."""
    reconstruct: Callable[[Float[Tensor, "token width"]], Float[Tensor, "token width"]] | None = None
    """The reconstruction by a whole dictionary, in place of features."""

    def check_use(self, site: Site, x: Float[Tensor, "batch token width"], context: HookContext, at: Site | None = None) -> None:
        """Refuse activations of another model, or of another width; they are those of `site`, or of another one `at`."""
        if context.shots and self.origin is not None:
            check_origin(self.description, self.origin, site, context.shots[0].model, context.shots[0].revision)
        if x.shape[-1] != self.decoder.shape[1]:
            advice = "Load the model that it was made for." if at in (None, site) else "Edit sites of the same width."
            raise BadInput(
                f"{self.description} is made for activations of width {self.decoder.shape[1]}, but those of {at or site} are "
                f"{x.shape[-1]} wide. {advice}"
            )


def dictionary_features(dictionary: Dictionary, features: Iterable[int], scales: FeatureScales | None) -> EditFeatures:
    """Return `features` of a dictionary; without `scales` the units of a strength are `code` and `current-norm`."""
    chosen = torch.tensor(list(features), dtype=torch.long)
    if not len(chosen):
        raise BadInput(f"No feature of {dictionary.name} was named. Name one or more, from 0 to {dictionary.size - 1}.")
    outside = [feature for feature in chosen.tolist() if not 0 <= feature < dictionary.size]
    if outside:
        raise UnknownName(f"{dictionary.name} has no feature {outside[0]}; its features are numbered 0 to {dictionary.size - 1}.")

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        values, indices = dictionary.on(x.device).encode(x)
        is_chosen = indices[..., None] == chosen.to(indices.device)
        return (values[..., None] * is_chosen).sum(1)

    decoder = dictionary.decoder_rows(chosen.to(dictionary.device)).float()
    length = 1 / decoder.cpu().norm(dim=1).clamp(min=1e-30)
    units = {"code": torch.ones(len(chosen)), "current-norm": length}
    if scales is not None:
        units |= {"peak": scales.peaks[chosen], "mean": scales.means[chosen], "norm": scales.norm * length}
        for dead in chosen[scales.peaks[chosen] == 0].tolist():
            warnings.warn(f"Feature {dead} of {dictionary.name} is dead: it fires at none of the sampled tokens.", stacklevel=2)
    return EditFeatures(f"{dictionary.name} {', '.join(map(str, chosen.tolist()))}", codes, decoder, units, dictionary.origin)


def reconstruction(dictionary: Dictionary) -> EditFeatures:
    """Return the reconstruction by `dictionary`, for an edit that writes it in place of the activation."""

    def reconstruct(x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        copy = dictionary.on(x.device)
        return copy.decode(copy.encode(x))

    def codes(x: Float[Tensor, "token width"]) -> Float[Tensor, "token feature"]:
        return x.new_zeros(len(x), 0)

    none = dictionary.constant.new_zeros(0, dictionary.width)
    return EditFeatures(f"the reconstruction by {dictionary.name}", codes, none, {}, dictionary.origin, reconstruct)


def random_features(features: EditFeatures, seed: int = 0) -> EditFeatures:
    """Return `features` with random decoder directions of the same lengths, as a baseline."""
    random = torch.randn(features.decoder.shape, generator=torch.Generator().manual_seed(seed)).to(features.decoder)
    lengths = features.decoder.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return features._replace(description=f"seed {seed}", decoder=random * lengths)


def check_origin(name: str, origin: DictionaryOrigin, site: Site, model: str, revision: str | None) -> None:
    """Refuse the dictionary or contrast called `name` if it was made for another site or model."""
    if origin.site != site:
        raise StaleWork(f"{name} was made for {origin.site}, but the edit is at {site}. Edit {origin.site}.")
    if origin.model is not None and not (is_same_model(origin.model, model) and origin.revision == revision):
        made_for, used = model_name(origin.model, origin.revision), model_name(model, revision)
        raise StaleWork(f"{name} was made for {made_for}, but the model is {used}. Use {made_for}.")


@final
@dataclass(frozen=True, kw_only=True)
class FeatureScales:
    """The sizes of the codes of a dictionary's features, and of the activations of its site."""

    peaks: Float[Tensor, " feature"]
    """The largest code of each feature; 0 for a feature that never fired."""
    means: Float[Tensor, " feature"]
    """Its mean code where it fires."""
    norm: float
    """Mean norm of an activation."""
    ceiling: float
    """The 99th percentile of the norms."""
    sample: Float[Tensor, "token width"]
    """Some of the activations."""

    SHARE: ClassVar[float] = 0.95

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(bool(torch.isfinite(values).all()) for values in (self.peaks, self.means, self.sample)):
            raise NonFinite("The scales of the features hold NaN or infinity: so do the dictionary or the activations.")

    def default_strengths(self, decoder: Float[Tensor, "feature width"], features: Int[Tensor, " feature"]) -> Tensor:
        """Return the default strengths of `features`, in peaks: at most 1, with 95 % of tokens under the ceiling.

        The norm of x + p v rises with p beyond its minimum; bisection finds where it reaches the ceiling.
        """
        steps = decoder.float() * self.peaks[features, None].to(decoder.device)
        sample = self.sample.to(decoder.device)
        along, lengths, squares = sample @ steps.T, steps.square().sum(1), sample.square().sum(1, keepdim=True)
        low, high = torch.zeros_like(lengths), torch.full_like(lengths, MAX_STRENGTH)
        whole = self._fits(squares, along, lengths, high)
        for _ in range(16):
            middle = (low + high) / 2
            fits = self._fits(squares, along, lengths, middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(lengths > 0, torch.where(whole, MAX_STRENGTH, low), 0.0)

    def _fits(self, squares: Tensor, along: Tensor, lengths: Tensor, strength: Tensor) -> Tensor:
        edited = squares + 2 * strength * along + strength.square() * lengths
        return (edited <= self.ceiling**2).float().mean(0) >= self.SHARE

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the scales to `path` with the fingerprint of their dictionary."""
        tensors = {"peaks": self.peaks, "means": self.means, "sample": self.sample}
        write_tensors(path, FORMAT, tensors, {"dictionary": fingerprint, "norm": self.norm, "ceiling": self.ceiling})

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> FeatureScales | None:
        """Return the scales in `path`; None without the file, or if its dictionary is not the one of `fingerprint`."""
        if not path.exists():
            return None
        header, tensors = read_tensors(path, FORMAT, ADVICE)
        try:
            return cls(norm=header["norm"], ceiling=header["ceiling"], **tensors) if header["dictionary"] == fingerprint else None
        except (DifflexError, TypeError, KeyError) as error:
            raise BrokenFile(f"{path} cannot be read as scales: {error} {ADVICE}") from error


def measure_scales(dictionary: Dictionary, batches: Iterable[ActivationBatch], tokens: int = TOKENS) -> FeatureScales:
    """Return the scales of a dictionary on the first `tokens` of `batches`, which yield training tokens in any order."""
    peaks, sums, fired = (torch.zeros(dictionary.size) for _ in range(3))
    norms, sample, count = [], [], 0
    for rows in batches:
        x = rows.values.float()[: tokens - count]
        values, indices = (part.cpu().flatten() for part in dictionary.encode(x))
        fires = values > 0
        values, indices = values[fires], indices[fires].long()
        peaks.scatter_reduce_(0, indices, values, "amax")
        sums.index_add_(0, indices, values)
        fired += torch.bincount(indices, minlength=dictionary.size)
        norms.append(x.norm(dim=1).cpu())
        sample.append(x[: max(0, SAMPLE - count)].cpu())
        count += len(x)
        if count >= tokens:
            break
    if not count:
        raise BadInput(f"{dictionary.name} has no tokens to measure its units on. Harvest {dictionary.site} first.")
    lengths = torch.cat(norms)
    # `quantile` takes no more than 16 M numbers.
    ceiling = float(lengths.kthvalue(max(1, round(0.99 * len(lengths)))).values)
    means = sums / fired.clamp(min=1)
    return FeatureScales(peaks=peaks, means=means, norm=float(lengths.double().mean()), ceiling=ceiling, sample=torch.cat(sample))
