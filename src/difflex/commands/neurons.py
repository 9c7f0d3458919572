"""`difflex neurons`: the neurons of an MLP as a baseline dictionary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.commands.flags import Numbers
from difflex.errors import BadInput
from difflex.study import Command, Study

__all__ = ["NeuronsCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class NeuronsCommand(Command):
    """Add the MLP neurons of blocks to a study as dictionaries: the baseline for trained ones."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with activations from `difflex harvest`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites of neurons: double.18:neurons, single.9:neurons."""
    k: Numbers = (32,)
    """Neurons per token: those with the largest absolute values."""

    def __call__(self) -> list[Path]:
        from difflex.training.study import add_neurons

        if not self.site:
            raise BadInput("Name at least one --site, as in double.1:neurons.")
        dictionaries = add_neurons(Study.open(self.study), self.site, self.k)
        for folder, neurons in dictionaries.items():
            print(f"{folder}: {neurons.size:,} neurons, {neurons.k} per token")
        return list(dictionaries)
