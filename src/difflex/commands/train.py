"""`difflex train`: SAEs from stored activations."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from tyro.conf import Positional, arg

from difflex.choices import NormalisationMethod, SAEKind
from difflex.commands.flags import Numbers
from difflex.errors import BadInput
from difflex.study import Command, Study

if TYPE_CHECKING:
    from difflex.dictionaries import SAE

__all__ = ["TrainCommand"]

PRESET = "(default: the preset's)"


@final
@dataclass(frozen=True, kw_only=True)
class TrainCommand(Command):
    """Train sparse autoencoders (SAEs) of every size with every k in one pass over stored activations.

    Given again, the command resumes, bit for bit on a CPU. Under torchrun processes train together; their number may change when
    a training resumes.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with activations from `difflex harvest`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites to train at, one after another: double.18, single.9:update."""
    k: Annotated[Numbers, arg(help_behavior_hint=PRESET)] = ()
    """Features per token; 32 in the default preset."""
    size: Annotated[Numbers, arg(help_behavior_hint=PRESET)] = ()
    """Features of the dictionary; 8,192 in the default preset. Every size is trained with every k."""
    preset: Literal["default", "paper", "paper-auxk", "unbox"] = "default"
    """Ours, or as published: `paper` is arXiv 2505.24360 (FLUX), `paper-auxk` is its code, `unbox` is arXiv 2410.22366 (SDXL)."""
    kind: SAEKind = "topk"
    """The activation function."""
    normalisation: Annotated[NormalisationMethod | None, arg(help_behavior_hint=PRESET)] = None
    """How activations are normalised."""
    learning_rate: Annotated[float | None, arg(metavar="RATE", help_behavior_hint=PRESET)] = None
    """The peak learning rate."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all training tokens, once)")] = None
    """Tokens to train on; if there are fewer, they are repeated in another order."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint=PRESET)] = None
    """Tokens per update, of all processes together; 1,024 in the default preset."""
    seed: Annotated[int, arg(metavar="SEED")] = 0
    """The seed of the initial weights and of the order of the tokens."""
    split: Literal["data", "features"] = "data"
    """What several processes divide: the tokens of a batch, or the features of dictionaries that are too large for one GPU."""
    log: Annotated[tuple[Literal["wandb", "tensorboard"], ...], arg(metavar="NAME...")] = ()
    """Where metrics are logged besides log.jsonl."""

    def __call__(self) -> list[Path]:
        from difflex.training.study import SweepConfig, train_sweep

        if not self.site:
            raise BadInput("Name at least one --site.")
        config = SweepConfig(
            size=self.size,
            k=self.k,
            preset=self.preset,
            kind=self.kind,
            normalisation=self.normalisation,
            learning_rate=self.learning_rate,
            tokens=self.tokens,
            batch=self.batch,
            seed=self.seed,
            split=self.split,
            loggers=self.log,
        )
        return train_sweep(Study.open(self.study), self.site, config, on_trained=_print_sae)


def _print_sae(folder: Path, sae: "SAE") -> None:
    training = sae.origin.training
    metrics = training["metrics"]
    assert isinstance(metrics, dict)
    print(
        f"{folder}: {training['tokens']:,} tokens, FVU {metrics['fvu']:.4f} in normalised space, "
        f"{metrics['l0']:.1f} features per token, {metrics['dead']:.1%} dead."
    )
