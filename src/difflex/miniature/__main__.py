"""`python -m difflex.miniature`: train the embedded model, export it, examine it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from difflex.quiet import quiet

with quiet("transformers"):  # which tells at the first import which packages it does without
    from diffusers import FluxPipeline

    from difflex.miniature.architecture import MiniatureConfig
    from difflex.miniature.card import write_card
    from difflex.miniature.examination import Examination, as_markdown, ceiling, examine, shortfalls
    from difflex.miniature.exporting import STEPS, export, images
    from difflex.miniature.flow import FlowRecipe
    from difflex.miniature.judge import load_judge
    from difflex.miniature.training import TrainingFolder, pack, train


def main() -> None:
    """Runs one of the verbs."""
    parser = argparse.ArgumentParser(prog="python -m difflex.miniature", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    _training_verbs(verbs)
    _reading_verbs(verbs)
    asked = parser.parse_args()
    asked.run(asked)


def _training_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("train", help="train what is not trained yet; run again to go on after a stop or a kill")
    verb.add_argument("folder", type=Path, help="where the run keeps its files")
    verb.add_argument("--updates", type=int, default=FlowRecipe().updates, help="updates of 32 scenes in all")
    verb.add_argument("--decay-from", type=float, default=FlowRecipe().decay_from, help="share of them at a level learning rate")
    verb.add_argument("--minutes", type=float, help="stop after this long")
    verb.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(run=_train)
    verb = verbs.add_parser("pack", help="copy a run in a form small enough to travel; train goes on from the copy")
    verb.add_argument("folder", type=Path)
    verb.add_argument("target", type=Path, help="the folder to write")
    verb.set_defaults(run=lambda asked: pack(TrainingFolder(folder=asked.folder), TrainingFolder(folder=asked.target)))


def _reading_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("export", help="write a trained run as a pipeline folder")
    verb.add_argument("folder", type=Path, help="the run")
    verb.add_argument("target", type=Path, help="the pipeline folder to write")
    verb.set_defaults(run=_export)
    verb = verbs.add_parser("card", help="examine an exported model at 4 and 20 steps and write its model card")
    verb.add_argument("folder", type=Path, help="the run")
    verb.add_argument("target", type=Path, help="the pipeline folder")
    verb.set_defaults(run=_card)
    verb = verbs.add_parser("examine", help="generate from fresh captions and print what is right")
    verb.add_argument("model", type=Path, help="a pipeline folder")
    verb.add_argument("--judge", type=Path, help="the judge's weights, if not those in the package")
    verb.add_argument("--captions", type=int, default=500)
    verb.add_argument("--steps", type=int, default=STEPS)
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(run=_examine)


def _train(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    recipe = replace(FlowRecipe(), updates=asked.updates, decay_from=asked.decay_from, seed=asked.seed)
    train(asked.folder, recipe, MiniatureConfig(), asked.minutes)


def _export(asked: argparse.Namespace) -> None:
    export(TrainingFolder(folder=asked.folder), asked.target, MiniatureConfig())
    print(f"Wrote {asked.target}.")


def _card(asked: argparse.Namespace) -> None:
    examinations = {steps: _examination(asked.target, None, 500, steps, 0) for steps in (STEPS, 20)}
    write_card(TrainingFolder(folder=asked.folder), asked.target, examinations, MiniatureConfig())
    print(f"Wrote {asked.target / 'README.md'}.")


def _examine(asked: argparse.Namespace) -> None:
    rows = _examination(asked.model, asked.judge, asked.captions, asked.steps, asked.seed)
    print(as_markdown(rows))
    print(json.dumps({"steps": asked.steps, "captions": asked.captions, "missed": shortfalls(rows)}))


def _examination(model: Path, judge_file: Path | None, captions: int, steps: int, seed: int) -> Examination:
    """The model's rows, and the judge's on true drawings."""
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(judge_file)
    shown = tqdm(desc=f"images at {steps} steps", total=captions + captions // 2, unit="image")

    def generate(asked: list[str]) -> Float[Tensor, "caption 3 height width"]:
        made = images(pipeline, asked, steps, seed)
        shown.update(len(asked))
        return made

    with shown:
        return examine(generate, judge, captions) | {"true drawings": ceiling(judge, captions)}


if __name__ == "__main__":
    main()
