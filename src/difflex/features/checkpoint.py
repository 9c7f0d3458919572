"""A pass on its way: one file, replaced in one go, from which a killed pass goes on as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difflex._version import __version__
from difflex.features.gathering import FeatureCollector
from difflex.features.roll import ShotRegistry
from difflex.files import replacing

__all__ = ["CollectCheckpoint"]

FORMAT = 1


@final
@dataclass(frozen=True, kw_only=True)
class CollectCheckpoint:
    """Where the state of a pass is kept, and what that pass is."""

    path: Path
    asked: Mapping[str, object]
    """Of plain JSON; the state of a pass that was asked in other words is not gone on with."""

    def save(self, gathered: Sequence[FeatureCollector], roll: ShotRegistry) -> None:
        """Nothing; the file holds what is known."""
        tensors = {f"{number}/{name}": each for number, one in enumerate(gathered) for name, each in one.tensors().items()}
        tensors["roll"] = torch.frombuffer(bytearray(roll.told()), dtype=torch.uint8)
        with replacing(self.path) as temporary:
            save_file({name: each.contiguous() for name, each in tensors.items()}, temporary, {"asked": self._told})

    def restore(self, gathered: Sequence[FeatureCollector], roll: ShotRegistry) -> bool:
        """Whether there was a state of this very pass; if so it is restored."""
        tensors = self._read()
        if tensors is None:
            return False
        for number, one in enumerate(gathered):
            mine = f"{number}/"
            one.restore({name.removeprefix(mine): each for name, each in tensors.items() if name.startswith(mine)})
        roll.restore(bytes(tensors["roll"].numpy().tobytes()))
        return True

    def remove(self) -> None:
        """Nothing; the state is gone."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Tensor] | None:
        """The tensors of the file; None where there is none, or one of something else."""
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("asked") != self._told:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (FileNotFoundError, SafetensorError):
            return None

    @property
    def _told(self) -> str:
        return json.dumps({"format": FORMAT, "difflex": __version__, **self.asked}, sort_keys=True)
