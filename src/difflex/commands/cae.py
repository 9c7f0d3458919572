"""`difflex cae`: contrastive activation addition in language models, and the findings of arXiv 2505.03189."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Precision
from difflex.commands.flags import BATCH, Numbers, Strengths, number
from difflex.errors import BadInput
from difflex.images import check_output
from difflex.study import Command, Study

if TYPE_CHECKING:
    from difflex.effects.activation_addition import Addition, AdditionResults, BehaviourSet, TextFunctions
    from difflex.explore.language import LanguageModel
    from difflex.steering import SteeringHook

__all__ = ["CaeCommand"]

DRAWN = "drawn"
"""The questions of the drawn world, where a file is expected."""
COUNT = number(1, 100_000)
Result = TypeVar("Result")
TOKENS = 40
"""Of a free text."""


@final
@dataclass(frozen=True, kw_only=True)
class CaeCommand(Command):
    """Add contrasts to the activations of a language model, and test five findings about it. Run again to continue."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of the model; a new one is begun."""
    model: Annotated[str, arg(metavar="MODEL")]
    """A language model: a folder, or a name on the hub."""
    other_model: Annotated[tuple[str, ...], arg(metavar="MODEL...", help_behavior_hint="(default: none)")] = ()
    """Models of other sizes, for the finding on size."""
    questions_of: Annotated[tuple[str, ...], arg(metavar="FILE...")] = (DRAWN,)
    """Questions, a behaviour in each file: model-written-evals, or pairs of texts; OWNER/NAME:FILE is on the hub. `drawn` stands
    for the behaviours of the drawn world."""
    neutral: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: text of the drawn world)")] = None
    """A file with neutral texts, a text on each line, whose perplexity is measured."""
    pairs: Annotated[Numbers, arg(metavar="N...")] = (1, 2, 5, 10, 20, 40, 80, 120, 200)
    """Numbers of pairs of a contrast, rising."""
    strength: Strengths = (1.0, 2.0, 4.0, 8.0)
    """Strengths, rising; 1 adds the mean difference."""
    questions: Annotated[int, COUNT] = 40
    """Questions that the layer and the strength are chosen on, and as many others that effects are measured on."""
    texts: Annotated[int, COUNT] = 24
    """Free texts of each kind and sign."""
    precision: Annotated[Precision | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a GPU)")] = None
    """How the models' weights are held; nf4 is four bits."""
    batch: Annotated[int, BATCH] = 64
    """Texts at once."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def __call__(self) -> list[Path]:
        import difflex
        from difflex.effects.activation_addition import AdditionConfig, AdditionResults, measure_addition
        from difflex.effects.addition_findings import find_findings
        from difflex.effects.drawn_behaviours import drawn_neutral
        from difflex.tables import text_table

        config = AdditionConfig(
            counts=tuple(self.pairs), strengths=tuple(self.strength), questions=self.questions, texts=self.texts
        )
        behaviours = self._behaviours(config.counts[-1] + 2 * config.questions)
        neutral = drawn_neutral(config.neutral) if self.neutral is None else _read_lines(self.neutral)
        check_output(self.study / "study.json")
        results, paths, study = list[AdditionResults](), list[Path](), None
        for name in dict.fromkeys((self.model, *self.other_model)):
            model = difflex.load_language_model(name, precision=self.precision, offline=self.offline)
            study = study or Study.begin(self.study, model.name, model.revision)
            path = study.addition(_file_name(name))
            results.append(measure_addition(text_functions(model, self.batch), behaviours, neutral, config, path))
            paths.append(path)
        findings = find_findings(results[0], results[1:])
        assert study is not None
        paths.append(findings.save(study.addition("findings")))
        for result in results:
            print(f"{result.model}: shifts by adding a contrast (from -1 to 1)")
            print(text_table(_rows(result), range(2, 9)))
        for finding in findings.findings:
            print(f"{finding.claim}\n  {finding.verdict}: {finding.reason}")
        return paths

    def _behaviours(self, questions: int) -> list[BehaviourSet]:
        from difflex.commands.behaviour_files import read_behaviour
        from difflex.effects.drawn_behaviours import drawn_behaviours

        found: list[BehaviourSet] = []
        for name in self.questions_of:
            is_drawn = name == DRAWN and not Path(name).exists()
            found += drawn_behaviours(questions) if is_drawn else [read_behaviour(name, self.offline)]
        if len({each.name for each in found}) < len(found):
            raise BadInput(f"Two of the files {', '.join(self.questions_of)} have the same name. Rename one.")
        return found


def text_functions(model: LanguageModel, batch: int) -> TextFunctions:
    """Return what the experiments need of a language model."""
    from difflex.effects.activation_addition import TextFunctions

    def write(prompts: Sequence[str], seed: int, edit: Addition | None) -> list[str]:
        written = model.generate(prompts, TOKENS, 1.0, seed, batch, _hooks(model, edit))
        return [each.text for each in written]

    return TextFunctions(
        name=model.name,
        parameters=sum(weight.numel() for weight in model.transformers.parameters()),
        contrasts=lambda pairs, counts: model.contrasts(pairs, "layer.*", counts, batch=batch),
        scores=lambda prompts, answers, edit: _edited(model, edit, partial(model.answer_scores, prompts, answers, batch)),
        write=write,
        losses=lambda texts, edit: _edited(model, edit, partial(model.losses, texts, batch)),
        words=model.words(),
    )


def _hooks(model: LanguageModel, edit: Addition | None) -> list[SteeringHook]:
    return [] if edit is None else model.along(*edit)


def _edited(model: LanguageModel, edit: Addition | None, compute: Callable[[], Result]) -> Result:
    """Return what `compute` returns under an edit."""
    with model.edited(_hooks(model, edit)):
        return compute()


def _rows(results: AdditionResults) -> list[tuple[str, ...]]:
    strengths = results.config.strengths
    head = ("behaviour", "layer", "strength", "answers", *results.behaviours[0].free)
    return [head] + [
        (
            each.name,
            each.site,
            f"{each.strength:g}",
            f"{each.by_strength[strengths.index(each.strength)]:.2f}",
            *(f"{shift:.2f}" for shift in each.free.values()),
        )
        for each in results.behaviours
    ]


def _file_name(model: str) -> str:
    return Path(model).name if Path(model).exists() else model.replace("/", "--")


def _read_lines(path: Path) -> list[str]:
    from difflex.files import disk_errors

    with disk_errors(path, "read"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"There is no text in {path}.")
    return lines
