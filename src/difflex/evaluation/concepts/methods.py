"""What is held against known concepts: dictionaries, and what they must beat, all with the same number of active features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput
from difflex.evaluation.concepts.labelled import LabelledActivations
from difflex.records import Codes, Site

__all__ = ["FeatureMethod", "principal_axes", "random_directions"]


@dataclass(frozen=True, kw_only=True)
class FeatureMethod:
    """A way to see activations as few features."""

    site: Site
    label: str
    """`<kind>-<size>-k<k>`, as for dictionaries."""
    size: int
    encode: Callable[[Float[Tensor, "token width"]], Codes]

    @classmethod
    def of(cls, dictionary: Dictionary) -> FeatureMethod:
        """A dictionary as it is; a feature fires where its code is positive."""
        return cls(site=dictionary.site, label=dictionary.label, size=dictionary.size, encode=dictionary.encode)


def principal_axes(labelled: LabelledActivations, k: int) -> FeatureMethod:
    """The principal axes of the training tokens, each as two features: one for its positive side, one for its negative."""
    x = labelled.values[~labelled.held_out].double()
    directions = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0))).eigenvectors.flip(1).T
    return _axes(labelled, "pca", directions.float(), k)


def random_directions(labelled: LabelledActivations, size: int, k: int, seed: int = 0) -> FeatureMethod:
    """`size` features that nobody trained: both sides of `size / 2` random directions."""
    drawn = torch.randn(size // 2, labelled.values.shape[1], generator=torch.Generator().manual_seed(seed))
    return _axes(labelled, "random", F.normalize(drawn, dim=1), k)


def _axes(labelled: LabelledActivations, kind: str, directions: Float[Tensor, "axis width"], k: int) -> FeatureMethod:
    """Both sides of some axes; at each token the k axes speak that lie furthest out, in units of their own deviation."""
    count = len(directions)
    if not 0 < k <= count:
        raise BadInput(f"k {k} does not fit {count} axes: choose k between 1 and {count}.")
    train = labelled.values[~labelled.held_out]
    mean = train.mean(0)
    scaled = directions / ((train - mean) @ directions.T).std(0).clamp_min(1e-30)[:, None]

    def encode(x: Float[Tensor, "token width"]) -> Codes:
        far = (x - mean) @ scaled.T
        axes = far.abs().topk(k, dim=1).indices
        values = far.gather(1, axes)
        return Codes(values.abs(), axes + count * (values < 0))

    return FeatureMethod(site=labelled.site, label=f"{kind}-{2 * count}-k{k}", size=2 * count, encode=encode)
