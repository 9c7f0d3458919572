"""`LanguageModel`: a language model that stores activations, and whose text is edited by features and contrasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, final

from difflex.errors import BadInput
from difflex.explore.activations import SiteActivations
from difflex.explore.edits import Edits, read_edits
from difflex.explore.inputs import CAPTIONS, name_prompts, read_prompts
from difflex.explore.workspace import Workspace, temporary_folder
from difflex.pipeline import Pipeline
from difflex.pipeline.language import GeneratedText, LanguagePipeline, load_language, refusal
from difflex.records import Activations, Edit, Site
from difflex.steering import SteeringHook, steering_hooks
from difflex.steering.contrast import Contrast, contrast_features, find_contrasts
from difflex.store import RecordingConfig, record
from difflex.study import Study, StudySettings

__all__ = ["LanguageModel", "load_language_model"]

TEXT_LENGTH = 64
"""Tokens of a window of stored activations."""
Parameters = ParamSpec("Parameters")


@final
class LanguageModel(LanguagePipeline):
    """A causal language model that stores activations, and whose text is edited by features and contrasts."""

    def __init__(self, pipe: LanguagePipeline) -> None:
        """Use the model of `pipe`."""
        super().__init__(pipe.engine, pipe.name, pipe.revision, pipe.precision)

    def activations(
        self,
        texts: str | Path | Sequence[str],
        site: Site | str,
        *,
        tokens: int | None = None,
        text_length: int = TEXT_LENGTH,
        batch: int = 16,
        out: Path | str | None = None,
        progress: bool = True,
    ) -> SiteActivations:
        """Store the activations of a site for texts; `train_sae` and `grow_itda` train on them as on those of an image model.

        `texts` is a list, a file (a text on each line, .csv, .json, .jsonl, .parquet) or a data set on the hub
        (OWNER/NAME:COLUMN). They follow one another and are cut into windows of `text_length` tokens. `tokens` is the number of
        rows to store, by default all. The activations are in a study: in the folder `out`, where a harvest that was stopped
        continues, or in a temporary one.
        """
        folder = temporary_folder() if out is None else Path(out)
        config = RecordingConfig(tokens=tokens, batch=batch, progress=progress)
        study = self.record_texts(name_prompts(texts, folder), [site], folder, text_length, config)
        return SiteActivations(Workspace(study, self._refuse, is_temporary=out is None), self.site(site))

    def record_texts(
        self,
        texts: str,
        sites: Iterable[Site | str],
        folder: Path,
        text_length: int = TEXT_LENGTH,
        config: RecordingConfig | None = None,
        column: str | None = None,
        revision: str | None = None,
    ) -> Study:
        """Store the activations of sites for the texts of a file, folder or data set, in the study in `folder`."""
        study = Study.open_or_plan(folder, self.name, self.revision)
        config, source = config or RecordingConfig(), read_prompts(texts, None, column, revision)
        if source.is_endless and config.tokens is None:
            raise BadInput(f"The {CAPTIONS} are endless: say how many tokens to store, as in tokens=200_000.")
        name = str(Path(texts).resolve()) if Path(texts).exists() else texts
        settings = StudySettings(precision=self.precision, text_length=text_length, prompts=name)
        config = replace(config, source=f"{source.source} in windows of {text_length}")
        shots, begin = self.windows(source.texts, text_length), partial(study.keep_settings, settings)
        record(study.activations, shots, self.expand(sites), partial(self.harvest, progress=False), config, before_writing=begin)
        return study

    def generate(
        self,
        prompts: str | Sequence[str],
        tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 16,
        edits: Edits = (),
    ) -> list[GeneratedText]:
        """Continue each prompt by at most `tokens` tokens, the most likely ones, or samples at a `temperature` above 0.

        Prompt i gets the seed `seed + i`: a sample depends on its own seed, not on the other prompts of its batch. `edits` are
        features, times a strength, sums and lists of them, hooks of `along`, and functions of the activations of sites as in
        `at`.
        """
        hooks, _ = read_edits(edits, self.name, self.revision)
        return super().generate(prompts, tokens, temperature, seed, batch, hooks)

    def contrast(self, pairs: Iterable[tuple[str, str]], site: Site | str, last: int | None = 1, batch: int = 16) -> Contrast:
        """Return the direction at a site from the second texts of `pairs` to the first: the mean difference of activations.

        The activations are those of the `last` tokens of each text (of several, their mean), or of all tokens with None.
        """
        return self.contrasts(list(pairs), [site], [None], last, batch)[self.site(site)][0]

    def contrasts(
        self,
        pairs: Sequence[tuple[str, str]],
        sites: Iterable[Site | str] | Site | str,
        counts: Iterable[int | None] = (None,),
        last: int | None = 1,
        batch: int = 16,
    ) -> dict[Site, list[Contrast]]:
        """Return contrasts as `contrast` does, at several sites in one pass, on the first so many pairs for each of `counts`."""
        places, counts = self.expand(sites), list(counts)
        positive, negative = (self._last([pair[side] for pair in pairs], places, last, batch) for side in (0, 1))
        return {site: find_contrasts(positive[site], negative[site], counts) for site in places}

    def along(self, contrast: Contrast, strength: float = 1.0, steps: tuple[int, int] | None = None) -> list[SteeringHook]:
        """Return edits for `generate` that add a contrast at a strength; by default at all tokens, those of the prompt too.

        `steps` limits them to a range of tokens that are written: (1, 64) leaves the prompt as it is.
        """
        edit = Edit(operation="add", site=contrast.site, contrast="contrast", strength=strength, unit="code", steps=steps)
        return steering_hooks([edit], lambda _: contrast_features(contrast))

    def _last(self, texts: Sequence[str], sites: Sequence[Site], last: int | None, batch: int) -> dict[Site, list[Activations]]:
        """Return the activations of the last tokens of each text, in order; seeds are their numbers, since texts may repeat."""
        numbered = (replace(shot, seed=number) for number, shot in enumerate(self.shots(texts)))
        found: dict[Site, list[Activations]] = {site: [] for site in sites}
        for x in self.harvest(numbered, sites, batch, progress=False):
            for values, shot in zip(x.values, x.shots, strict=True):
                part = values if last is None else values[-last:]
                found[x.site].append(replace(x, values=part[None].clone(), shots=(shot,)))
        return {site: sorted(parts, key=lambda x: x.shots[0].seed) for site, parts in found.items()}

    def _refuse(self) -> Pipeline:
        raise BadInput(refusal(self.name, "This step"))


def _loading(load: Callable[Parameters, LanguagePipeline]) -> Callable[Parameters, LanguageModel]:
    @wraps(load)
    def load_language_model(*arguments: Parameters.args, **options: Parameters.kwargs) -> LanguageModel:
        return LanguageModel(load(*arguments, **options))

    load_language_model.__module__ = __name__
    load_language_model.__name__ = load_language_model.__qualname__ = "load_language_model"
    return load_language_model


load_language_model = _loading(load_language)
