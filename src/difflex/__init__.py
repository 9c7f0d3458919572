"""difflex: a lexicon of what a text-to-image diffusion model knows."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from difflex.errors import DifflexError
    from difflex.miniature.drawing import Scenes, draw
    from difflex.pipeline import Pipeline, load
    from difflex.records import Shot, Site

__version__ = "0.1.0"

# Public name -> its module, imported when the name is first asked for: `import difflex` stays quick and does not import torch.
HOMES = {
    "DifflexError": "difflex.errors",
    "Pipeline": "difflex.pipeline",
    "Scenes": "difflex.miniature.drawing",
    "Shot": "difflex.records",
    "Site": "difflex.records",
    "draw": "difflex.miniature.drawing",
    "load": "difflex.pipeline",
}

__all__ = ["DifflexError", "Pipeline", "Scenes", "Shot", "Site", "draw", "load"]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'difflex' has no attribute '{name}'")
    value = getattr(import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
