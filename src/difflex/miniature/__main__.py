"""`python -m difflex.miniature`: train the model of the package, export it, examine it."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from difflex.errors import DifflexError
from difflex.quiet import quiet

with quiet("transformers"):  # at its first import it lists missing packages
    from diffusers import FluxPipeline

    from difflex.miniature.architecture import MiniatureConfig
    from difflex.miniature.exporting import STEPS, export, generate_images, write_card
    from difflex.miniature.flow import FlowRecipe
    from difflex.miniature.judge import load_judge
    from difflex.miniature.scoring import Examination, as_markdown, examine, examine_drawings, shortfalls
    from difflex.miniature.training import TrainingFolder, pack, train


def main() -> None:
    """Run one of the verbs."""
    parser = argparse.ArgumentParser(prog="python -m difflex.miniature", description=__doc__)
    verbs = parser.add_subparsers(required=True)

    def add(run: Callable[[argparse.Namespace], None], **folders: str) -> argparse.ArgumentParser:
        """Add the verb that `run` is called after, with the docstring of `run` as its help."""
        verb = verbs.add_parser(run.__name__.strip("_"), help=run.__doc__)
        for name, description in folders.items():
            verb.add_argument(name, type=Path, help=description)
        verb.set_defaults(run=run)
        return verb

    verb = add(_train, folder="the folder of the run")
    verb.add_argument("--updates", type=int, default=FlowRecipe().updates, help="updates of 32 scenes")
    share = "share of updates after which the learning rate falls"
    verb.add_argument("--decay-from", type=float, default=FlowRecipe().decay_from, help=share)
    verb.add_argument("--minutes", type=float, help="stop after this time")
    verb.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    verb.add_argument("--seed", type=int, default=0)
    add(_pack, folder="the folder of the run", target="the folder to write")
    add(_export, folder="the folder of the run", target="the pipeline folder to write")
    add(_card, folder="the folder of the run", target="the pipeline folder")
    verb = add(_examine, model="a pipeline folder")
    verb.add_argument("--judge", type=Path, help="weights of the judge, by default those of the package")
    verb.add_argument("--captions", type=int, default=500)
    verb.add_argument("--steps", type=int, default=STEPS)
    verb.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    try:
        flags.run(flags)
    except DifflexError as error:
        parser.exit(2, f"difflex.miniature: {error}\n")


def _train(flags: argparse.Namespace) -> None:
    """Train the stages that are not finished; run again to continue after a kill."""
    torch.set_num_threads(flags.threads)
    recipe = replace(FlowRecipe(), updates=flags.updates, decay_from=flags.decay_from, seed=flags.seed)
    train(flags.folder, recipe, MiniatureConfig(), flags.minutes)


def _pack(flags: argparse.Namespace) -> None:
    """Copy a run in a small form, from which train continues."""
    pack(TrainingFolder(flags.folder), TrainingFolder(flags.target))


def _export(flags: argparse.Namespace) -> None:
    """Write a trained run as a pipeline folder."""
    export(TrainingFolder(flags.folder), flags.target, MiniatureConfig())
    print(f"Wrote {flags.target}.")


def _card(flags: argparse.Namespace) -> None:
    """Examine an exported model at 4 and 20 steps and write its model card."""
    examinations = {steps: _examine_model(flags.target, None, 500, steps, 0) for steps in (STEPS, 20)}
    write_card(TrainingFolder(flags.folder), flags.target, examinations, MiniatureConfig())
    print(f"Wrote {flags.target / 'README.md'}.")


def _examine(flags: argparse.Namespace) -> None:
    """Generate images of new captions and print the shares that are correct."""
    rows = _examine_model(flags.model, flags.judge, flags.captions, flags.steps, flags.seed)
    print(as_markdown(rows))
    print(json.dumps({"steps": flags.steps, "captions": flags.captions, "missed": shortfalls(rows)}))


def _examine_model(model: Path, judge_file: Path | None, captions: int, steps: int, seed: int) -> Examination:
    """Examine a model, and the judge on true drawings."""
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(judge_file)

    with tqdm(desc=f"images at {steps} steps", total=captions + captions // 2, unit="image") as bar:

        def generate(prompts: list[str]) -> Float[Tensor, "caption 3 height width"]:
            images = generate_images(pipeline, prompts, steps, seed)
            bar.update(len(prompts))
            return images

        return examine(generate, judge, captions) | {"true drawings": examine_drawings(judge, captions)}


if __name__ == "__main__":
    main()
