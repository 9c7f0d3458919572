"""`difflex harvest`: store the activations of a model in a study."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import arg

from difflex.choices import StoredDtype
from difflex.commands.flags import AMOUNT, BATCH, RANGE, SEED, STEPS, TOKENS, Bytes, KeptSteps, ModelCommand, Pixels
from difflex.errors import BadInput
from difflex.images import check_output
from difflex.study import Study, StudySettings

if TYPE_CHECKING:
    from difflex.store import RecordingConfig, Store

__all__ = ["HarvestCommand"]

THE_MODELS_OWN = "(default: the model's own)"


@final
@dataclass(frozen=True, kw_only=True)
class HarvestCommand(ModelCommand):
    """Store the activations of a model at one or many sites. Run again to continue; torchrun shares the work."""

    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """The sites: double.18, single.9:update, double.3:text; a star stands for any number."""
    prompts: Annotated[str, arg(metavar="FILE")]
    """A file or folder, a data set on the hub (OWNER/NAME:COLUMN), or `captions`, the endless captions of the drawn world."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The folder of the study; a new one is begun."""
    tokens: Annotated[int | None, TOKENS, arg(help_behavior_hint="(default: all prompts, once)")] = None
    """How many rows to store at each site."""
    prompts_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: prompt, caption or text)")] = None
    """The column of a .csv, .json, .jsonl or .parquet file with the prompts."""
    prompts_revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """The revision of a data set on the hub."""
    seeds: Annotated[
        range | None, RANGE, arg(aliases=["--seed"], help_behavior_hint="(default: prompt number i has the seed i)")
    ] = None
    """Seeds for each prompt."""
    shuffle: Annotated[int | None, SEED, arg(help_behavior_hint="(default: in the order of the file)")] = None
    """Shuffle the prompts with this seed."""
    steps: Annotated[int | None, STEPS, arg(help_behavior_hint=THE_MODELS_OWN)] = None
    """Denoising steps."""
    keep_steps: Annotated[KeptSteps, arg(help_behavior_hint="(default: all)")] = None
    """The steps to harvest."""
    pixels: Annotated[Pixels, arg(help_behavior_hint=THE_MODELS_OWN)] = None
    """The size of an image; one number for a square."""
    guidance: Annotated[float | None, AMOUNT, arg(metavar="SCALE", help_behavior_hint=THE_MODELS_OWN)] = None
    """The guidance scale."""
    batch: Annotated[int, BATCH] = 16
    """Images at a time."""
    dtype: StoredDtype = "bf16"
    """The number format on disk; int8 takes half the space."""
    max_bytes: Annotated[Bytes, arg(help_behavior_hint="(default: the free disk space)")] = None
    """The largest size of the activations on disk, as in 100GB; checked before anything is written."""

    def __call__(self) -> list[Path]:
        from difflex.devices import use_gpu_of_rank
        from difflex.distributed import Ranks
        from difflex.explore.inputs import CAPTIONS, harvest_settings, read_prompts, study_shots
        from difflex.pipeline.language import is_language_model
        from difflex.store import RecordingConfig, record

        check_output(self.out / "study.json")
        prompts = read_prompts(self.prompts, self.shuffle, self.prompts_column, self.prompts_revision)
        if prompts.is_endless and self.tokens is None:
            raise BadInput(f"The {CAPTIONS} are endless: say how many --tokens to store.")
        if not self.site:
            raise BadInput("No site was named: write --site with one or more sites, as in --site double.1 single.0:update")
        use_gpu_of_rank()
        ranks = Ranks.from_torchrun()
        config = RecordingConfig(
            dtype=self.dtype,
            tokens=self.tokens,
            batch=self.batch,
            max_bytes=self.max_bytes,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=ranks.rank == 0,
        )
        config.check_folder(Study(folder=self.out, model="").activations, self.site)  # before minutes of loading
        if is_language_model(self.model, self.revision, self.offline):
            return self._harvest_texts(config)
        pipe = self.load(self.out)
        study, settings = Study.open_or_plan(self.out, pipe.name, pipe.revision), harvest_settings(pipe, self._wishes())
        sites, begun = pipe.expand(self.site), study.stores()
        shots, source = study_shots(pipe, settings, prompts, [begun[site] for site in sites if site in begun])
        self._print_added(source)
        harvest, config = partial(pipe.harvest, progress=False), replace(config, source=source)
        begin = partial(study.keep_settings, settings)
        return _print_stores(record(study.activations, shots, sites, harvest, config, before_writing=begin))

    def _harvest_texts(self, config: "RecordingConfig") -> list[Path]:
        """Store the activations of a language model, whose prompts are texts."""
        import difflex
        from difflex.store import Store

        given = {"steps": self.steps, "keep_steps": self.keep_steps, "pixels": self.pixels, "guidance": self.guidance}
        if image_only := [name for name, value in given.items() if value is not None]:
            flag = f"--{image_only[0].replace('_', '-')}"
            raise BadInput(f"{flag} is for image models, and '{self.model}' is a language model. Leave it out.")
        if self.shuffle is not None or self.offload or self.precision == "auto":
            raise BadInput("--shuffle, --offload and --precision auto are for image models. Leave them out for a language model.")
        model = difflex.load_language_model(
            self.model, self.precision, revision=self.revision, untrained=self.untrained, offline=self.offline
        )
        length = {} if self.text_length is None else {"text_length": self.text_length}
        sites = model.expand(self.site)
        study = model.record_texts(
            self.prompts, sites, self.out, config=config, column=self.prompts_column, revision=self.prompts_revision, **length
        )
        return _print_stores([Store.open(study.stores()[site]) for site in sites])

    def _print_added(self, source: str) -> None:
        """Print which seeds are added to those in the `source` of a harvest that was begun."""
        begun = source.rpartition(" ")[2]
        if self.seeds is not None and begun != f"{self.seeds.start}:{self.seeds.stop}":
            first = begun.partition(":")[2]
            print(f"The seeds {first}:{self.seeds.stop} are added to {begun}: all prompts with one of them, then with the next.")

    def _wishes(self) -> StudySettings:
        """Return what the flags say about the settings of the study."""
        kept = self.keep_steps
        return StudySettings(
            pixels=self.pixels,
            steps=self.steps,
            guidance=self.guidance,
            prompts=self.prompts,
            prompts_column=self.prompts_column,
            prompts_revision=self.prompts_revision,
            shuffle=self.shuffle,
            seeds=None if self.seeds is None else (self.seeds.start, self.seeds.stop),
            keep_steps=None if kept is None else (kept.start, kept.stop, *((kept.step,) if kept.step > 1 else ())),
        )


def _print_stores(stores: "Sequence[Store]") -> list[Path]:
    """Print what is stored, and return the folders."""
    for store in stores:
        state = "complete" if store.complete else "the share of this process is done"
        print(f"{store.folder}: {store.count() + store.count('held-out'):,} rows of width {store.width}, {state}")
    return [store.folder for store in stores]
