"""The interface of every dictionary, its files, and the simplest dictionary: the neurons of an MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.files import ADVICE, WeightsDtype, read_files, write_files
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.sparse import sparse_matmul
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.files import Json
from difflex.hub import dictionary_snapshot
from difflex.records import Codes, Site, parse_site


@dataclass(frozen=True, kw_only=True)
class DictionaryOrigin:
    """The origin of a dictionary."""

    site: Site
    model: str | None = None
    """A model of the package, a folder, or a name on the hub."""
    revision: str | None = None
    training: Mapping[str, Json] = field(default_factory=dict)
    """How it was made (configuration, seed, data, tokens), as plain JSON."""

    def __post_init__(self) -> None:
        parse_site(self)


@dataclass(frozen=True, kw_only=True)
class DictionaryState:
    """The saved parts of a dictionary; `from_state` of its class restores it."""

    kind: str
    k: int
    origin: DictionaryOrigin
    settings: Mapping[str, Json]
    """The settings that only this kind has, as plain JSON."""
    tensors: Mapping[str, Tensor]

    @property
    def normalisation(self) -> Mapping[str, Json]:
        """The settings of the normalisation; empty if there are none."""
        settings = self.settings.get("normalisation")
        return settings if isinstance(settings, dict) else {}


class Dictionary(ABC):
    """A dictionary of features of the activations at one site.

    Activations x are [token, width] in model space; codes name few of the `size` features per token. A kind is a final subclass
    such as `class ITDA(NormalisedDictionary, kinds=("itda",))`; `load` finds it by the kind in the file.
    """

    _classes: ClassVar[dict[str, type[Dictionary]]] = {}

    kind: str
    """`topk`, `batchtopk`, `jumprelu`, `matryoshka`, `itda` or `neurons`."""
    k: int
    """Features per token: the exact number, the average (`batchtopk`, `matryoshka`) or the target (`jumprelu`)."""
    origin: DictionaryOrigin

    def __init_subclass__(cls, kinds: tuple[str, ...] = ()) -> None:
        """Register `cls` as the class of dictionaries of these `kinds`."""
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
        """Return the codes of `x`, strongest feature first; values are float32."""

    @abstractmethod
    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        """Return the contribution of `codes` in model space: `decode` without its constant part, linear in the values."""

    @property
    @abstractmethod
    def constant(self) -> Float[Tensor, " width"]:
        """The reconstruction if no feature fires."""

    @abstractmethod
    def decoder_rows(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        """Return the decoder rows of `features`: the contributions of a code of 1 in model space."""

    @abstractmethod
    def state(self) -> DictionaryState:
        """Return the state that `save` writes; tensors are not copied."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: DictionaryState) -> Dictionary:
        """Return the dictionary of this `state`, on the device of its tensors."""

    def decode(self, codes: Codes) -> Float[Tensor, "token width"]:
        """Reconstruct the activations of `codes`, in model space."""
        return self.delta(codes) + self.constant

    @property
    def decoder(self) -> Float[Tensor, "size width"]:
        """The decoder rows of all features; computed at each access."""
        return self.decoder_rows(torch.arange(self.size, device=self.device))

    @property
    def directions(self) -> Float[Tensor, "size width"]:
        """The rows of `decoder` at norm one; zero rows stay zero."""
        return F.normalize(self.decoder, dim=1)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.constant.device

    @property
    def site(self) -> Site:
        """Where the activations are read."""
        return self.origin.site

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`, followed by settings of the training that are not the default."""
        return f"{self.kind}-{self.size}-k{self.k}"

    @property
    def name(self) -> str:
        """`SITE/LABEL`, the name in commands."""
        return f"{self.site}/{self.label}"

    def on(self, device: torch.device | str) -> Dictionary:
        """Return the same dictionary on `device`; it is copied there once, and kept for the next time."""
        device = torch.empty(0, device=device).device  # with its number: `cuda` is `cuda:0`
        if device == self.device:
            return self
        copies: dict[torch.device, Dictionary] = vars(self).setdefault("_copies", {})
        if device not in copies:
            copies[device] = self.to(device)
        return copies[device]

    def to(self, device: torch.device | str) -> Dictionary:
        """Return the same dictionary on `device`."""
        state = self.state()
        return self.from_state(replace(state, tensors={name: tensor.to(device) for name, tensor in state.tensors.items()}))

    def save(self, folder: Path | str, weights: WeightsDtype = "fp32") -> Path:
        """Write `config.json` and `dictionary.safetensors` to `folder`, each atomically, and return `folder`.

        `weights` is how the encoder and the decoder of an SAE are stored: in bf16 they take half the disk.
        """
        state = self.state()
        config: dict[str, Json] = {
            "kind": state.kind,
            "site": str(self.site),
            "model": self.origin.model,
            "revision": self.origin.revision,
            "width": self.width,
            "size": self.size,
            "k": state.k,
            "settings": dict(state.settings),
            "training": dict(self.origin.training),
        }
        return write_files(Path(folder), config, state.tensors, weights)

    @staticmethod
    def load(folder: Path | str, device: torch.device | str = "cpu") -> Dictionary:
        """Load the dictionary in `folder`, of any kind."""
        config, tensors = read_files(Path(folder), str(device))
        if config.kind not in Dictionary._classes:
            raise UnknownName.among(f"In {folder}/config.json the dictionary kind", config.kind, Dictionary._classes)
        origin = DictionaryOrigin(site=config.site, model=config.model, revision=config.revision, training=config.training)
        state = DictionaryState(kind=config.kind, k=config.k, origin=origin, settings=config.settings, tensors=tensors)
        try:
            dictionary = Dictionary._classes[config.kind].from_state(state)
        except DifflexError as error:
            raise BrokenFile(f"{folder} cannot be used as a dictionary: {error} {ADVICE}") from error
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError, OverflowError) as error:
            raise BrokenFile(f"{folder} cannot be read as a dictionary ({error!r}). {ADVICE}") from error
        if (dictionary.width, dictionary.size) != (config.width, config.size):
            raise BrokenFile(
                f"{folder}/config.json says width {config.width} and size {config.size}, but the tensors have "
                f"{dictionary.width} and {dictionary.size}. {ADVICE}"
            )
        return dictionary

    @staticmethod
    def from_pretrained(
        name: str,
        site: Site | str | None = None,
        label: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        device: torch.device | str = "cpu",
    ) -> Dictionary:
        """Load a dictionary of the repository OWNER/NAME of the hub, where `difflex push` put it.

        `site` and `label` may be left out where only one dictionary fits. `revision` is a branch, a tag or a commit; the commit
        that was loaded is in `origin.training["hub"]`. `offline` takes the files from the local cache.
        """
        found = dictionary_snapshot(name, site, label, revision, offline)
        dictionary = Dictionary.load(found.folder, device)
        training = {**dictionary.origin.training, "hub": {"repository": found.repository, "commit": found.commit}}
        dictionary.origin = replace(dictionary.origin, training=training)
        return dictionary

    def _validated(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Return `x` as float32 on this dictionary's device; raise unless it is a finite batch of its width."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise BadInput(f"{self.name} takes activations [token, {self.width}], but got {list(x.shape)}.")
        x = x.to(self.device, torch.float32)
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise NonFinite(f"The activations for {self.name} hold NaN or infinity. Harvest them again.")
        return x


class NormalisedDictionary(Dictionary):
    """A dictionary that decodes to a normalised space z, `z = values @ atoms[indices] + bias`, then to model space."""

    normalisation: Normalisation
    atoms: Float[Tensor, "size width"]
    """The contribution of a code of 1 in z: rows of norm one, unless `SAE.fold` has moved them to model space."""
    bias: Float[Tensor, " width"]
    """In z."""

    @property
    def size(self) -> int:
        return self.atoms.shape[0]

    @property
    def width(self) -> int:
        return self.atoms.shape[1]

    @property
    def device(self) -> torch.device:
        return self.atoms.device

    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        return self.normalisation.restore_delta(sparse_matmul(codes, self.atoms))

    @property
    def constant(self) -> Float[Tensor, " width"]:
        return self.normalisation.restore(self.bias[None])[0]

    def decoder_rows(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        return self.normalisation.restore_delta(self.atoms[features])


@final
class Neurons(Dictionary, kinds=("neurons",)):
    """The neurons of an MLP as features, the baseline of every dictionary.

    Every axis of a `:neurons` site is a feature; a code keeps the k largest by absolute value, with their signs.
    """

    kind = "neurons"

    def __init__(self, *, width: int, k: int, origin: DictionaryOrigin, device: torch.device | str = "cpu") -> None:
        """Make the dictionary of `width` neurons."""
        if origin.site.kind != "neurons":
            raise BadInput(
                f"{origin.site} has no neurons. Name the site of an MLP's activations, such as {origin.site.path}:neurons."
            )
        if not 0 < k <= width:
            raise BadInput(f"k {k} does not fit {width} neurons: choose k between 1 and {width}.")
        self.k, self.origin = k, origin
        self._constant = torch.zeros(width, device=device)

    @property
    def size(self) -> int:
        return len(self._constant)

    @property
    def width(self) -> int:
        return len(self._constant)

    @property
    def constant(self) -> Float[Tensor, " width"]:
        return self._constant

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        x = self._validated(x)
        indices = x.abs().topk(self.k, dim=1).indices
        return Codes(x.gather(1, indices), indices)

    def delta(self, codes: Codes) -> Float[Tensor, "token width"]:
        zeros = codes.values.new_zeros(len(codes.values), self.width)
        return zeros.scatter_add_(1, codes.indices, codes.values)

    def decoder_rows(self, features: Int[Tensor, " feature"]) -> Float[Tensor, "feature width"]:
        zeros = self._constant.new_zeros(len(features), self.width)
        return zeros.scatter_(1, features[:, None], 1.0)

    def state(self) -> DictionaryState:
        return DictionaryState(kind=self.kind, k=self.k, origin=self.origin, settings={}, tensors={"constant": self._constant})

    @classmethod
    def from_state(cls, state: DictionaryState) -> Neurons:
        constant = state.tensors["constant"]
        return cls(width=len(constant), k=state.k, origin=state.origin, device=constant.device)
