"""The named choices that flags and configs share; light, so that the help of a command imports nothing else."""

from typing import Literal

__all__ = [
    "ContrastMethod",
    "HighlightStyle",
    "NormalisationMethod",
    "Operation",
    "Precision",
    "ProtocolName",
    "PursuitName",
    "SAEKind",
    "StoredDtype",
    "Unit",
]

Precision = Literal["bf16", "fp16", "fp32", "nf4"]
"""How a model's weights are held; nf4 is four bits."""
StoredDtype = Literal["bf16", "fp16", "int8"]
"""How activations are stored."""
NormalisationMethod = Literal["whiten", "standardise", "scale", "none"]
"""How activations are normalised before a dictionary sees them."""
SAEKind = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]
PursuitName = Literal["orthogonal", "gradient", "signed-gradient", "matching", "positive-matching"]
"""How ITDA finds codes: `gradient` as in arXiv 2505.24360, with non-negative weights; `matching` as in arXiv 2505.17769."""
Operation = Literal["add", "set", "scale", "ablate", "transplant", "replace", "reconstruct", "zero"]
"""What an edit does with the codes of its features, or with the whole activation."""
Unit = Literal["peak", "mean", "norm", "current-norm", "code"]
"""What an edit of strength 1 adds: a feature's largest code, its mean code where it fires, the mean norm of the site's
activations, or of those that are edited, or a code of 1."""
ContrastMethod = Literal["mean", "principal"]
"""How a contrast direction is found: the difference of means, or the first principal direction of the differences."""
ProtocolName = Literal["heldout", "paper"]
"""How explanations are judged: on images that the explainer never saw, or as published in arXiv 2505.24360."""
HighlightStyle = Literal["blue", "outline", "plain"]
"""How an image shows where a feature fires."""
