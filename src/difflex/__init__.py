"""difflex: sparse dictionaries of the activations of text-to-image diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING

from difflex._version import __version__ as __version__

if TYPE_CHECKING:
    from difflex.dictionaries import ITDA, Dictionary, Neurons
    from difflex.errors import DifflexError
    from difflex.evaluation import evaluate
    from difflex.explore.activations import grow_itda, train_sae
    from difflex.explore.language import LanguageModel, load_language_model
    from difflex.explore.model import Model, load, open_study
    from difflex.miniature import Scenes, draw
    from difflex.pipeline import Pipeline
    from difflex.records import Activations, Codes, Edit, Shot, Site
    from difflex.steering import steer
    from difflex.store import LiveActivations, Store, record
    from difflex.study import Study, run_study
    from difflex.training import fit

# Public name -> its module, imported when the name is first asked for: `import difflex` stays quick and does not import torch.
HOMES = {
    "Activations": "difflex.records",
    "Codes": "difflex.records",
    "Dictionary": "difflex.dictionaries",
    "DifflexError": "difflex.errors",
    "Edit": "difflex.records",
    "ITDA": "difflex.dictionaries",
    "LanguageModel": "difflex.explore.language",
    "LiveActivations": "difflex.store",
    "Model": "difflex.explore.model",
    "Neurons": "difflex.dictionaries",
    "Pipeline": "difflex.pipeline",
    "Scenes": "difflex.miniature",
    "Shot": "difflex.records",
    "Site": "difflex.records",
    "Store": "difflex.store",
    "Study": "difflex.study",
    "draw": "difflex.miniature",
    "evaluate": "difflex.evaluation",
    "fit": "difflex.training",
    "grow_itda": "difflex.explore.activations",
    "load": "difflex.explore.model",
    "load_language_model": "difflex.explore.language",
    "open_study": "difflex.explore.model",
    "record": "difflex.store",
    "run_study": "difflex.study",
    "steer": "difflex.steering",
    "train_sae": "difflex.explore.activations",
}

__all__ = [
    "ITDA",
    "Activations",
    "Codes",
    "Dictionary",
    "DifflexError",
    "Edit",
    "LanguageModel",
    "LiveActivations",
    "Model",
    "Neurons",
    "Pipeline",
    "Scenes",
    "Shot",
    "Site",
    "Store",
    "Study",
    "draw",
    "evaluate",
    "fit",
    "grow_itda",
    "load",
    "load_language_model",
    "open_study",
    "record",
    "run_study",
    "steer",
    "train_sae",
]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'difflex' has no attribute '{name}'")
    value = getattr(import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
