"""`difflex harvest`: activations of a model, stored in a study."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, final

from tyro.conf import arg

from difflex.commands.flags import Bytes, ModelCommand, Pixels, Range
from difflex.commands.inputs import CAPTIONS, PromptSource, read_prompts
from difflex.distributed import Ranks
from difflex.errors import BadInput
from difflex.store import RecordingConfig, record
from difflex.study import Study

__all__ = ["HarvestCommand"]

THE_MODELS_OWN = "(default: the model's own)"


@final
@dataclass(frozen=True, kw_only=True)
class HarvestCommand(ModelCommand):
    """Store a model's activations at one or several sites; given again it goes on; under torchrun processes share the work."""

    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """Where to read: double.18, single.9:update, double.3:text; a star stands for any number."""
    prompts: Annotated[str, arg(metavar="FILE")]
    """A file or folder, a data set on the hub (OWNER/NAME:COLUMN), or `captions`: those of the drawn world, without end."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The folder of the study; begun if it is not there."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all prompts, once)")] = None
    """How many rows to store at each site."""
    prompts_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: prompt, caption or text)")] = None
    """Which column of a .csv, .json, .jsonl or .parquet file holds the prompts."""
    prompts_revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """Which revision of a data set on the hub to read."""
    seeds: Range = range(1)
    """Seeds for each prompt, which is encoded once for all of them; END is left out."""
    shuffle: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: in the order of the file)")] = None
    """Shuffle the prompts."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=THE_MODELS_OWN)] = None
    """Denoising steps."""
    keep_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """Which of the steps to read; END is left out."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint=THE_MODELS_OWN)] = None
    """Size of an image; one number for a square."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint=THE_MODELS_OWN)] = None
    """How strongly the prompt is followed."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images at once."""
    dtype: Literal["bf16", "fp16", "int8"] = "bf16"
    """How numbers are stored; int8 with a scale for each row."""
    max_bytes: Annotated[Bytes | None, arg(help_behavior_hint="(default: the free disk)")] = None
    """What the activations may take on disk, as in 100GB; asked before anything is written."""

    def __call__(self) -> list[Path]:
        prompts = read_prompts(self.prompts, self.shuffle, self.prompts_column, self.prompts_revision)
        if prompts.is_endless and self.tokens is None:
            raise BadInput(f"The {CAPTIONS} do not end: say how many --tokens to store.")
        if not self.site:
            raise BadInput("No site was named: write --site and one or several, as in --site double.1 single.0:update")
        settings = self._settings(prompts)
        pipe = self.load()
        sites = pipe.expand(self.site)
        shots = pipe.shots(prompts.texts, self.seeds, self.steps, self.keep_steps, self.pixels, self.guidance)
        study = Study.open_or_plan(self.out, pipe.name, pipe.revision)
        harvest = partial(pipe.harvest, progress=False)
        stores = record(study.activations, shots, sites, harvest, settings, before_writing=study.write)
        for store in stores:
            state = "complete" if store.complete else "this process's share is done"
            print(f"{store.folder}: {store.count() + store.count('held-out'):,} rows of width {store.width}, {state}")
        return [store.folder for store in stores]

    def _settings(self, prompts: PromptSource) -> RecordingConfig:
        ranks = Ranks.from_torchrun()
        from difflex.devices import use_gpu_of_rank

        use_gpu_of_rank()
        order = "in order" if self.shuffle is None else f"shuffled by {self.shuffle}"
        return RecordingConfig(
            dtype=self.dtype,
            tokens=self.tokens,
            batch=self.batch,
            max_bytes=self.max_bytes,
            source=f"{prompts.source} {order}, seeds {self.seeds.start}:{self.seeds.stop}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=ranks.rank == 0,
        )
