"""`difflex evaluate`: evaluate the dictionaries of a study on held-out tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.inputs import load_study_model
from difflex.records import Shot, Site
from difflex.study import Command, Study

__all__ = ["EvaluateCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Command):
    """Evaluate dictionaries on held-out activations, and their effect on the model; what is up to date is kept."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with the results of `difflex harvest`, `difflex train` and `difflex itda`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Evaluate all dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Evaluate these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    tokens: Annotated[int, arg(metavar="N")] = 1_000_000
    """Number of held-out tokens; all if there are fewer."""
    effect_shots: Annotated[int, arg(metavar="N")] = 32
    """Number of held-out shots at which to measure the effect on the model; 0 skips it and loads no model."""
    measure: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: none)")] = ()
    """Image measures in addition to PSNR and SSIM: `lpips`, or `clip:` and the folder or hub name of a CLIP."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the GPU only the part of the model that is running."""
    offline: FlagCreatePairsOff[bool] = False
    """Load models of the hub from the local cache only."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation import EditedModel, EvaluationConfig, evaluate_study, evaluation_table

        config = EvaluationConfig(
            sites=self.site,
            dictionaries=self.dictionary,
            tokens=self.tokens,
            shots=self.effect_shots,
            measures=self.measure,
            offline=self.offline,
        )
        study = Study.open(self.study)
        load = cache(lambda precision: load_study_model(study, precision, self.offload, self.offline))

        def edited_model(site: Site, shots: Sequence[Shot]) -> EditedModel:
            pipe = load(shots[0].precision)
            return EditedModel(partial(pipe.predictions, shots, site), partial(pipe.images, shots, site))

        results = evaluate_study(study, config, edited_model)
        for dictionary, result in results.items():
            if result.up_to_date:
                print(f"{dictionary}: up to date")
        print(evaluation_table(results, self.measure))
        return [study.evaluation(*dictionary) for dictionary in results]
