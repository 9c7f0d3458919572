"""SSIM: how much of the structure of an image another one has (Wang, Bovik, Sheikh & Simoncelli 2004)."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput

__all__ = ["ssim"]

SIDE, DEVIATION = 11, 1.5
"""Of the Gaussian window, in pixels."""
LUMINANCE, CONTRAST = 0.01**2, 0.03**2
"""What keeps a quotient of small numbers from meaning much; for pixels between 0 and 1."""


def ssim(
    one: Float[Tensor, "image channel row column"], other: Float[Tensor, "image channel row column"]
) -> Float64[Tensor, " image"]:
    """The structural similarity of each pair of images with pixels between 0 and 1: 1 where they are the same.

    As published: over windows that lie within the image; the mean over these and over channels.
    """
    if min(one.shape[2:]) < SIDE:
        raise BadInput(f"Images of {one.shape[2]} x {one.shape[3]} pixels hold no window of {SIDE}: draw larger ones.")
    x, y = one.double(), other.double()
    x_mean, y_mean = _blurred(x), _blurred(y)
    # Rounding may leave a variance that is a hair under 0 where a window is flat.
    x_variance = (_blurred(x * x) - x_mean * x_mean).clamp_min(0)
    y_variance = (_blurred(y * y) - y_mean * y_mean).clamp_min(0)
    covariance = _blurred(x * y) - x_mean * y_mean
    luminance = (2 * x_mean * y_mean + LUMINANCE) / (x_mean.square() + y_mean.square() + LUMINANCE)
    structure = (2 * covariance + CONTRAST) / (x_variance + y_variance + CONTRAST)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(
    x: Float64[Tensor, "image channel row column"],
) -> Float64[Tensor, "image channel window_row window_column"]:
    """Weighted means of all windows: along the rows, then along the columns."""
    offsets = torch.arange(SIDE, dtype=x.dtype, device=x.device) - SIDE // 2
    bell = torch.softmax(-offsets.square() / (2 * DEVIATION**2), dim=0)
    flat = x.flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).squeeze(1).unflatten(0, x.shape[:2])
