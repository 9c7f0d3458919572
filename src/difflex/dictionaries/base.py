"""The door of every dictionary: what it can do, whatever its kind, and how it stands on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.files import read, write
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.sparse import bag
from difflex.errors import BadInput, BrokenFile, NonFinite, UnknownName
from difflex.files import Json
from difflex.records import Codes, Site

__all__ = ["Dictionary", "DictionaryOrigin", "DictionaryState", "NormalisedDictionary"]


@dataclass(frozen=True, kw_only=True)
class DictionaryOrigin:
    """Where a dictionary comes from."""

    site: Site
    model: str | None = None
    """A name inside the package, a folder, or a hub name."""
    revision: str | None = None
    training: Mapping[str, Json] = field(default_factory=dict)
    """How it was made: configuration, seed, data, tokens seen; plain JSON."""


@dataclass(frozen=True, kw_only=True)
class DictionaryState:
    """A dictionary as it stands on disk: what `restored` of its class needs to make it again."""

    kind: str
    k: int
    origin: DictionaryOrigin
    settings: Mapping[str, Json]
    """What only this kind has, as plain JSON."""
    tensors: Mapping[str, Tensor]


class Dictionary(ABC):
    """Features of the activations at one site; x is [token, width] in model space, codes name few of `size` features.

    A kind is a final subclass `class ITDA(NormalisedDictionary, kinds=("itda",))`; `load` finds it by the kind in the file.
    """

    _classes: ClassVar[dict[str, type[Dictionary]]] = {}

    kind: str
    """`topk`, `batchtopk`, `jumprelu`, `matryoshka`, `itda` or `neurons`."""
    k: int
    """Features per token: exact, an average (`batchtopk`), or a target (`jumprelu`), as the kind has it."""
    origin: DictionaryOrigin

    def __init_subclass__(cls, kinds: tuple[str, ...] = ()) -> None:
        """Register `cls` as the class that restores dictionaries of these `kinds`."""
        super().__init_subclass__()
        Dictionary._classes.update(dict.fromkeys(kinds, cls))

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of features."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The width of the activations."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        """Which features fire at each row of `x`, strongest first; values are float32."""

    @abstractmethod
    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        """What `codes` add in model space, linear in their values: `decode` without its constant part."""

    @property
    @abstractmethod
    def constant(self) -> Float[Tensor, " width"]:
        """What `decode` gives where no feature fires."""

    @abstractmethod
    def decoder_of(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        """What one unit of code of each of `features` adds in model space."""

    @abstractmethod
    def saved(self) -> DictionaryState:
        """This dictionary as it would stand on disk; tensors are not copied."""

    @classmethod
    @abstractmethod
    def restored(cls, saved: DictionaryState) -> Dictionary:
        """The dictionary that `saved` describes, on the device of its tensors."""

    def decode(self, codes: Codes) -> Float[Tensor, "token width"]:
        """The reconstruction of the activations behind `codes`, in model space."""
        return self.delta(codes) + self.constant

    @property
    def decoder(self) -> Float[Tensor, "size width"]:
        """What one unit of code of every feature adds in model space; built anew at each call."""
        return self.decoder_of(torch.arange(self.size, device=self.constant.device))

    @property
    def directions(self) -> Float[Tensor, "size width"]:
        """The rows of `decoder` at length one (a zero row stays zero)."""
        return F.normalize(self.decoder, dim=1)

    @property
    def site(self) -> Site:
        """Where the activations are read."""
        return self.origin.site

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`."""
        return f"{self.kind}-{self.size}-k{self.k}"

    @property
    def name(self) -> str:
        """`SITE/LABEL`, as commands take it."""
        return f"{self.site}/{self.label}"

    def to(self, device: torch.device | str) -> Dictionary:
        """The same dictionary on `device`."""
        saved = self.saved()
        return self.restored(replace(saved, tensors={name: tensor.to(device) for name, tensor in saved.tensors.items()}))

    def save(self, folder: Path | str) -> Path:
        """`folder`, now with `config.json` and `dictionary.safetensors`, each replaced in one go."""
        saved = self.saved()
        config: dict[str, Json] = {
            "kind": saved.kind,
            "site": str(self.site),
            "model": self.origin.model,
            "revision": self.origin.revision,
            "width": self.width,
            "size": self.size,
            "k": saved.k,
            "settings": dict(saved.settings),
            "training": dict(self.origin.training),
        }
        return write(Path(folder), config, saved.tensors)

    @staticmethod
    def load(folder: Path | str, device: torch.device | str = "cpu") -> Dictionary:
        """The dictionary saved in `folder`, of whatever kind it is."""
        config, tensors = read(Path(folder), str(device))
        if config.kind not in Dictionary._classes:
            raise UnknownName.among(
                "The dictionary kind", config.kind, Dictionary._classes, f"It stands in {folder}/config.json."
            )
        origin = DictionaryOrigin(site=config.site, model=config.model, revision=config.revision, training=config.training)
        saved = DictionaryState(kind=config.kind, k=config.k, origin=origin, settings=config.settings, tensors=tensors)
        try:
            made = Dictionary._classes[config.kind].restored(saved)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise BrokenFile(f"{folder} cannot be read as a dictionary ({error}): train or copy it again.") from error
        if (made.width, made.size) != (config.width, config.size):
            raise BrokenFile(
                f"{folder}/config.json says width {config.width} and size {config.size}, its tensors have {made.width} and "
                f"{made.size}: train or copy it again."
            )
        return made

    def _checked(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """`x` as float32 on this dictionary's device; an error where it is not a finite batch of our width."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise BadInput(f"{self.name} takes activations [token, {self.width}]; it was given {list(x.shape)}.")
        x = x.to(self.constant.device, torch.float32)
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise NonFinite(f"{self.name} was given activations that hold NaN or infinity. Harvest them again.")
        return x


class NormalisedDictionary(Dictionary):
    """A dictionary that decodes in a normalised space z: `z = values @ atoms[indices] + bias`, then back to model space."""

    normalisation: Normalisation
    atoms: Float[Tensor, "size width"]
    """What one unit of code adds in z: unit rows, unless `fold` has turned them into model space."""
    bias: Float[Tensor, " width"]
    """In z."""

    @property
    def size(self) -> int:
        return self.atoms.shape[0]

    @property
    def width(self) -> int:
        return self.atoms.shape[1]

    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        return self.normalisation.spread(bag(codes, self.atoms))

    @property
    def constant(self) -> Float[Tensor, " width"]:
        return self.normalisation.restore(self.bias[None])[0]

    def decoder_of(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        return self.normalisation.spread(self.atoms[features])
