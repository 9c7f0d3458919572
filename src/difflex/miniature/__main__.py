"""`python -m difflex.miniature`: train the model of the package, export it, examine it."""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from difflex.devices import find_device
from difflex.errors import BadInput, DifflexError
from difflex.quiet import quiet

with quiet("transformers"):  # at its first import it lists missing packages
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from difflex.miniature.exporting import MANY_STEPS, STEPS, TrainingRecord, export, generate_images, write_card
    from difflex.miniature.flow import SIZES
    from difflex.miniature.judge import load_judge
    from difflex.miniature.scoring import Examination, as_markdown, examine, examine_drawings, shortfalls
    from difflex.miniature.training import TrainingFolder, train


MINUTES = 7.0
"""The length of a training on a GPU."""


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
    verb.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["mini-flux", "mini-flux-small"], help="models to train on the same scenes"
    )
    length = verb.add_mutually_exclusive_group()
    length.add_argument(
        "--updates", type=_number(int, 1), help="length of the recipe; by default on a CPU 10,888, of mini-sdxl 13,200"
    )
    length.add_argument(
        "--minutes", type=_number(float, 0.01), help=f"length of the recipe by the clock; default on a GPU: {MINUTES:g}"
    )
    verb.add_argument("--batch", type=_number(int, 1), help="scenes of an update; by default 512, of mini-sdxl 32")
    verb.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU if there is one")
    verb.add_argument("--threads", type=_number(int, 1), default=torch.get_num_threads(), help="CPU threads")
    verb.add_argument(
        "--workers", type=_number(int, 0), help="processes that write captions; by default one per core for a GPU, none for a CPU"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--from-scratch", action="store_true", help="train the judge and the autoencoder as well")
    add(_export, folder="the folder of the run", target="where to write a pipeline folder for each model")
    add(_card, model="a pipeline folder with training.json")
    verb = add(_examine)
    verb.add_argument("model", nargs="?", default="mini-flux", help="a pipeline folder, or the name of an embedded model")
    verb.add_argument("--judge", type=Path, help="weights of the judge, by default those of the package")
    verb.add_argument("--captions", type=_number(int, 3), default=500)
    verb.add_argument("--steps", type=_number(int, 1), default=STEPS)
    verb.add_argument("--guidance", type=_number(float, 0), default=1.0, help="above 1 it takes a second call in each step")
    verb.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    try:
        flags.run(flags)
    except DifflexError as error:
        parser.exit(2, f"difflex.miniature: {error}\n")


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """Return a parser of numbers from `least` on."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole' if kind is int else 'a'} number from {least:g} on")
        return number

    return parse


def _train(flags: argparse.Namespace) -> None:
    """Train in one or more sizes; run again to continue after a kill."""
    torch.set_num_threads(flags.threads)
    device = find_device(flags.device)
    on_gpu = device.type == "cuda"
    recipe = SIZES[flags.sizes[0]].recipe
    recipe = replace(recipe, batch=flags.batch or recipe.batch, seed=flags.seed)
    if flags.updates:
        recipe = replace(recipe, length=flags.updates)
    elif flags.minutes or on_gpu:
        recipe = replace(recipe, length=flags.minutes or MINUTES, unit="minutes")
    workers = flags.workers if flags.workers is not None else on_gpu * max(1, min(13, (os.cpu_count() or 1) - 2))
    train(flags.folder, [*dict.fromkeys(flags.sizes)], recipe, device, workers, flags.from_scratch)


def _export(flags: argparse.Namespace) -> None:
    """Write the trained models as pipeline folders."""
    for folder in export(TrainingFolder(flags.folder), flags.target):
        print(f"Wrote {folder}.")


def _card(flags: argparse.Namespace) -> None:
    """Examine an exported model at 4 and 20 steps, a U-Net at 1 as well, with guidance if it needs some; write its card."""
    record, examinations = TrainingRecord.load(flags.model), {}
    begins_at_noise = (flags.model / "unet").exists()
    for scale in (1.0,) if record.guided_updates else (1.0, record.recipe["guidance"]):
        for steps in (STEPS, MANY_STEPS, 1) if begins_at_noise else (STEPS, MANY_STEPS):
            title = f"{steps} step{'s' * (steps > 1)}" + (f", guidance {scale:g}" if scale > 1 else "")
            examinations[title] = _examine_model(flags.model, None, 500, steps, 0, scale)
    write_card(flags.model, examinations)
    print(f"Wrote {flags.model / 'README.md'}.")


def _examine(flags: argparse.Namespace) -> None:
    """Generate images of new captions and print the shares that are correct."""
    places = (Path(flags.model), Path(str(resources.files("difflex"))) / "models" / flags.model)
    model = next((place for place in places if (place / "model_index.json").is_file()), None)
    if not model:
        raise BadInput(f"{flags.model} is neither a pipeline folder nor an embedded model: it has no model_index.json.")
    rows = _examine_model(model, flags.judge, flags.captions, flags.steps, flags.seed, flags.guidance)
    print(as_markdown(rows))
    print(json.dumps({"steps": flags.steps, "captions": flags.captions, "missed": shortfalls(rows)}))


def _examine_model(model: Path, judge_file: Path | None, captions: int, steps: int, seed: int, guidance: float) -> Examination:
    """Examine a model, and the judge on true drawings."""
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(judge_file)

    with tqdm(desc=f"images at {steps} steps", total=captions + captions // 2, unit="image") as bar:

        def generate(prompts: list[str]) -> Float[Tensor, "caption 3 height width"]:
            images = generate_images(pipeline, prompts, steps, seed, guidance)
            bar.update(len(prompts))
            return images

        return examine(generate, judge, captions) | {"true drawings": examine_drawings(judge, captions)}


if __name__ == "__main__":
    main()
