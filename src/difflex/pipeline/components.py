"""The components of a pipeline: read from configs, built on the meta device without weights, or with random weights."""

import json
import os
import string
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.errors import BadInput, BrokenFile

Change = Callable[[str, nn.Module], nn.Module]
"""Applied to each component, with its name, as soon as it is built."""
MOST_LAYERS = 1000
"""Of a kind in a component: more come of a damaged config, and take hours to build."""
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]


class ComponentPlan(NamedTuple):
    """A component: its class and config."""

    library: str
    kind: str
    config: Mapping[str, Any] | None
    """None for a tokenizer, which is read from its files."""

    def build(self) -> Any:
        """Build the component on torch's default device and in its default dtype."""
        component = getattr(import_module(self.library), self.kind)
        if self.library == "diffusers":
            return component.from_config(dict(self.config or {}))
        return component(component.config_class(**dict(self.config or {})))

    def without_weights(self) -> nn.Module | None:
        """Build the component on the meta device, where it takes no memory; None for one that never has weights."""
        if not issubclass(getattr(import_module(self.library), self.kind), nn.Module):
            return None
        for name, entry in (self.config or {}).items():
            counts = entry if isinstance(entry, (list, tuple)) else (entry,)
            if "layers" in name and any(isinstance(count, int) and count > MOST_LAYERS for count in counts):
                raise BrokenFile(
                    f"The config of a {self.kind} has the entry '{name}' {str(entry)[:60]}, and difflex builds at most "
                    f"{MOST_LAYERS:,} layers. Copy or download the model again."
                )
        try:
            with torch.device("meta"):
                return self.build()
        except Exception as error:  # each class has its own errors for an entry that it does not know
            raise BrokenFile(
                f"A {self.kind} cannot be built from its config ({type(error).__name__}: {str(error)[:100]}): it is damaged. "
                "Copy or download the model again."
            ) from error


class PipelinePlan(NamedTuple):
    """A pipeline's class and components."""

    pipeline: str
    components: Mapping[str, ComponentPlan]
    settings: Mapping[str, Any]
    """Further arguments of the pipeline's constructor, such as `is_distilled`."""
    absent: tuple[str, ...] = ()
    """Optional components that this model lacks."""

    @property
    def denoiser(self) -> str:
        return "unet" if "unet" in self.components else "transformer"

    def config(self, path: str) -> object:
        """Return a config entry, `COMPONENT.ENTRY`; if the config lacks it, the default of the component's class."""
        name, key = path.split(".")
        component = self.components.get(name)
        if component is None:
            return None
        parameter = signature(getattr(import_module(component.library), component.kind).__init__).parameters.get(key)
        return (component.config or {}).get(key, parameter and parameter.default)


def read_plan(source: str | Path, revision: str | None = None, offline: bool = False) -> PipelinePlan:
    """Read the plan of a folder or of a hub model, of which only the small config files are downloaded."""
    source, options = os.fspath(source), {"revision": revision, "local_files_only": offline or Path(source).is_dir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers passes the hub an argument that it no longer has
        index = cast(dict[str, Any], DiffusionPipeline.load_config(source, **options))
        entries = {name: entry for name, entry in index.items() if isinstance(entry, (list, tuple)) and len(entry) == 2}
        present = {name: entry for name, entry in entries.items() if entry[0] is not None}
        settings = {name: entry for name, entry in index.items() if isinstance(entry, (bool, int, float, str)) and name[0] != "_"}
        components = {name: _read_component(entry[0], entry[1], source, name, options) for name, entry in present.items()}
    return PipelinePlan(str(index["_class_name"]), components, settings, tuple(entries.keys() - present.keys()))


def _read_component(library: str, kind: str, source: str, name: str, options: Mapping[str, Any]) -> ComponentPlan:
    if library not in ("diffusers", "transformers"):
        raise BadInput(
            f"The component {name} of {source} is of the library {library}, which only the model's own code can build."
        )
    component = getattr(import_module(library), kind)
    if library == "diffusers":
        config = dict(component.load_config(source, subfolder=name, **options))
        _check_types(f"{source}/{name}", component, config)
        return ComponentPlan(library, kind, config)
    if not hasattr(component, "config_class"):  # tokenizers and processors
        return ComponentPlan(library, kind, None)
    return ComponentPlan(library, kind, component.config_class.from_pretrained(source, subfolder=name, **options).to_dict())


def _check_types(place: str, component: type, config: Mapping[str, Any]) -> None:
    """Raise an error for an entry of another type than the default of its argument, which fails when the model runs."""
    for name, parameter in signature(component.__init__).parameters.items():
        expected = {*_leaf_types(parameter.default)}
        for found in _leaf_types(config.get(name)):
            if expected and found not in expected:
                raise BrokenFile(
                    f"The config of {place} has an entry '{name}' with a {found.__name__}, where a {expected.pop().__name__} "
                    "belongs: it is damaged. Copy or download it again."
                )


def _leaf_types(value: object) -> Iterator[type]:
    """Yield the types of a value, or of the items of a list; all numbers and truth values are floats here, None is nothing."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaf_types(item)
    elif value is not None and value is not Parameter.empty:
        yield float if isinstance(value, (bool, int, float)) else type(value)


def _flux(guidance_embeds: bool, shift: float) -> PipelinePlan:
    """Return the plan of a variant of FLUX.1; the configs of its components are in `flux1.json`."""
    own: dict[str, dict[str, object]] = {
        "scheduler": {"shift": shift, "use_dynamic_shifting": guidance_embeds},
        "transformer": {"guidance_embeds": guidance_embeds},
    }
    entries = json.loads(files("difflex.pipeline").joinpath("flux1.json").read_text(encoding="utf-8"))
    components = {}
    for name, entry in entries.items():
        config = None if entry["config"] is None else {**entry["config"], **own.get(name, {})}
        components[name] = ComponentPlan(entry["library"], entry["class"], config)
    return PipelinePlan("FluxPipeline", components, {})


PLANS: Mapping[str, PipelinePlan] = MappingProxyType(
    {
        "black-forest-labs/FLUX.1-schnell": _flux(guidance_embeds=False, shift=1.0),
        "black-forest-labs/FLUX.1-dev": _flux(guidance_embeds=True, shift=3.0),
    }
)
"""Hub models whose geometry is known without a file."""


def build_untrained(
    plan: PipelinePlan,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    change: Change = lambda name, component: component,
) -> DiffusionPipeline:
    """Build a pipeline with random weights on `device`; its tokenizers split prompts into letters."""
    components = build_components(plan.components, seed, dtype, device, change)
    for name, component in plan.components.items():
        if component.config is None:
            components[name] = _letter_tokenizer(component)
    return cast(DiffusionPipeline, getattr(diffusers, plan.pipeline)(**dict.fromkeys(plan.absent), **components, **plan.settings))


def build_components(
    plans: Mapping[str, ComponentPlan], seed: int, dtype: torch.dtype, device: torch.device, change: Change
) -> dict[str, Any]:
    """Build the components that have a config, one after the other, with random weights drawn from `seed`."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), _defaults(dtype, device):
        torch.manual_seed(seed)
        built = ((name, plan.build()) for name, plan in plans.items() if plan.config is not None)
        components = {name: change(name, part) if isinstance(part, nn.Module) else part for name, part in built}
    for component in components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return components


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make `dtype` and `device` the defaults: a model of 12 billion parameters must never exist in another precision."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _letter_tokenizer(plan: ComponentPlan) -> Any:
    """Return a tokenizer that splits prompts into letters, with the special ids of CLIP or T5."""
    if plan.kind in ("CLIPTokenizer", "CLIPTokenizerFast"):
        ids = {piece: i for i, piece in enumerate([*LETTERS, *(letter + "</w>" for letter in LETTERS)])}
        special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
        return transformers.CLIPTokenizer(vocab={**ids, **special}, merges=[], model_max_length=77)
    if plan.kind in ("T5Tokenizer", "T5TokenizerFast"):
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
        return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    raise BadInput(f"difflex has no letter tokenizer in place of a {plan.kind}. Use a folder that has the tokenizer's files.")
