"""Presets: trainings as published, and ours."""

from __future__ import annotations

from typing import Literal

from difflex.training.config import AdamConfig, AuxKLoss, InitConfig, TrainingConfig

__all__ = ["default", "paper", "unbox"]


def default(*, width: int, size: int, k: int, updates: int | None = None) -> TrainingConfig:
    """Ours: TopK on standardised activations, Adam without first moment, AuxK.

    Without a first moment, features that do not fire cost nothing, and rare features learn faster. The learning rate turns a
    row by about 0.02 at first, whatever its width, and falls to nothing over the whole run: what the first, large steps have
    silenced comes back in the small ones. On mini-flux a rate that stays silences most features, and so does a strong AuxK; in
    4,800 updates steps half as large again explain 1 % more and silence a seventh. Rows have a way to go, so that a run of
    fewer than 2,000 `updates` takes larger steps, up to four times as large.
    """
    stride = 1.0 if updates is None else min(4.0, max(1.0, 2000 / max(1, updates)))
    return TrainingConfig(
        size=size,
        k=k,
        normalisation="standardise",
        optimiser=AdamConfig(lr=0.02 * stride / width**0.5, decay=1.0, beta1=0.0, beta2=0.99),
        revival=AuxKLoss(k=64, after=max(10_000, 2 * size)),
    )


def paper(*, size: int = 65_536, k: int = 64, auxk: Literal["none", "reconstruction"] = "none") -> TrainingConfig:
    """The FLUX.1 autoencoders of arXiv 2505.24360: batches of 1,024 tokens, 30.7 M tokens, whitened and clipped at 10.

    Where its text and its code differ, the text is the default: no AuxK. `auxk="reconstruction"` is what the code does: dead
    features explain the reconstruction, through which the gradient flows. As in the code, TopK has no ReLU and no encoder bias.
    Deliberate departures: statistics come from at least 10 x width vectors and are frozen (there: principal axes of one batch
    that is smaller than the width, mean and scale drifting to the end), the k largest are exact (there: approximate), a feature
    is alive where it fires at all (there: above 1), and the running average starts at the weights (there: at zero).
    """
    revival = AuxKLoss(target="reconstruction", k=64, coefficient=1 / 32, after=16 * size) if auxk == "reconstruction" else None
    return TrainingConfig(
        size=size,
        k=k,
        relu=False,
        encoder_bias=False,
        normalisation="whiten",
        clip=10.0,
        start=InitConfig(directions="orthogonal", gain=3**-0.5, bias="mean"),
        optimiser=AdamConfig(lr=2e-4, warmup=50, decay=0.0, beta1=0.0, beta2=0.99, eps=1e-10, clip=10.0, ema=0.995),
        revival=revival,
    )


def unbox(*, size: int = 5_120, k: int = 10) -> TrainingConfig:
    """The SDXL Turbo autoencoders of arXiv 2410.22366: batches of 4,096 block updates, ReLU after TopK, AuxK on the residual.

    There the data are not normalised and the loss is divided by their variance, which Adam ignores but for its epsilon; here the
    data are divided by one factor, so that epsilon means the same. Departure: decoder rows have length one after each update
    (there: before it).
    """
    return TrainingConfig(
        size=size,
        k=k,
        normalisation="scale",
        start=InitConfig(gain=3**-0.5, bias="median"),
        optimiser=AdamConfig(lr=1e-4, warmup=1, decay=0.0, eps=6.25e-10),
        revival=AuxKLoss(k=256, coefficient=1 / 32, after=10_000_000),
    )
