"""What the verbs that load a model share: which one, and how it is held."""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

import difflex
from difflex.study import Command, Study

__all__ = ["UNTRAINED", "ModelCommand", "load_studied", "see_own_card"]

UNTRAINED = "untrained-"
"""What the revision of random weights begins with."""


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """A verb that loads a model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A model inside the package, a folder, or a hub name."""
    precision: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4"] | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a card)")
    ] = None
    """What its weights are held in; nf4 is four bits."""
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """Which revision of a model on the hub."""
    untrained: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: the trained weights)")] = None
    """A denoiser of random weights of this seed; of a model on the hub, which is then not fetched, all parts."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take models of the hub from the local cache alone."""

    def load(self) -> "difflex.Pipeline":
        """The model, loaded as the flags say."""
        return difflex.load(
            self.model,
            precision=self.precision,
            revision=self.revision,
            untrained=self.untrained,
            offload=self.offload,
            offline=self.offline,
        )


def load_studied(study: Study, precision: str | None, offload: bool, offline: bool) -> "difflex.Pipeline":
    """The model of a study, as it was when the study was begun."""
    revision = study.revision or ""
    untrained = int(revision.removeprefix(UNTRAINED)) if revision.startswith(UNTRAINED) else None
    return difflex.load(
        study.model,
        precision=precision,
        revision=study.revision if untrained is None else None,
        untrained=untrained,
        offload=offload,
        offline=offline,
    )


def see_own_card(environment: MutableMapping[str, str] = os.environ) -> None:
    """Nothing; a process of torchrun sees one of the visible cards, its own. To be said before torch looks for one."""
    rank, visible = environment.get("LOCAL_RANK"), environment.get("CUDA_VISIBLE_DEVICES")
    if rank is not None and visible != "":
        cards = visible.split(",") if visible else [rank]
        environment["CUDA_VISIBLE_DEVICES"] = cards[int(rank) % len(cards)]
