"""`python -m difflex.miniature.language`: train the language models of the package, export them, examine them."""

import argparse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch

from difflex.devices import find_device
from difflex.errors import BadInput, DifflexError
from difflex.quiet import hide_progress_bars, quiet

with quiet("transformers"):  # at its first import it lists missing packages
    from transformers import AutoTokenizer, LlamaForCausalLM

    from difflex.miniature.language.examining import STORY_TOKENS, LanguageExamination, examine_language
    from difflex.miniature.language.exporting import as_line, as_table, export_language, write_language_card
    from difflex.miniature.language.training import SIZES, LanguageRecipe, train_language


def main() -> None:
    """Run one of the verbs."""
    parser = argparse.ArgumentParser(prog="python -m difflex.miniature.language", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    train = verbs.add_parser("train", help=_train.__doc__)
    train.add_argument("folder", type=Path, help="the folder of the run")
    train.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="models to train on the same documents")
    train.add_argument("--updates", type=int, default=LanguageRecipe().updates, help="length of the recipe")
    train.add_argument("--batch", type=int, default=LanguageRecipe().batch, help="documents of an update")
    train.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU if there is one")
    train.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(run=_train)
    export = verbs.add_parser("export", help=_export.__doc__)
    export.add_argument("folder", type=Path, help="the folder of the run")
    export.add_argument("target", type=Path, help="where to write a folder for each model")
    export.set_defaults(run=_export)
    for run in (_examine, _card):
        verb = verbs.add_parser(run.__name__.strip("_"), help=run.__doc__)
        verb.add_argument("model", help="a folder of an exported model, or the name of an embedded one")
        verb.add_argument("--documents", type=int, default=300, help="held-out documents for the perplexity")
        verb.add_argument("--each", type=int, default=40, help="questions and stories for each pole of each behaviour")
        verb.set_defaults(run=run)
    flags = parser.parse_args()
    try:
        flags.run(flags)
    except DifflexError as error:
        parser.exit(2, f"difflex.miniature.language: {error}\n")


def _train(flags: argparse.Namespace) -> None:
    """Train in one or more sizes; run again to continue after a kill."""
    if min(flags.updates, flags.batch, flags.threads) < 1:
        raise BadInput("--updates, --batch and --threads are whole numbers from 1 on.")
    torch.set_num_threads(flags.threads)
    recipe = LanguageRecipe(updates=flags.updates, batch=flags.batch, seed=flags.seed)
    train_language(flags.folder, [*dict.fromkeys(flags.sizes)], recipe, find_device(flags.device))


def _export(flags: argparse.Namespace) -> None:
    """Write the trained models as folders of transformers."""
    for place in export_language(flags.folder, flags.target):
        print(f"Wrote {place}.")


def _examine(flags: argparse.Namespace) -> None:
    """Measure perplexity, grammar, answers and stories, and print them."""
    _, examination = _examined(flags)
    print(as_table(examination))
    print(as_line(examination))


def _card(flags: argparse.Namespace) -> None:
    """Examine an exported model and write its model card."""
    model, examination = _examined(flags)
    place = _place(flags.model)
    write_language_card(place, model, examination)
    print(f"Wrote {place / 'README.md'}.")


def _place(name: str) -> Path:
    places = (Path(name), Path(str(resources.files("difflex"))) / "models" / name)
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise BadInput(f"{name} is neither a folder of an exported model nor an embedded one: it has no config.json.")
    return place


def _examined(flags: argparse.Namespace) -> tuple[LlamaForCausalLM, LanguageExamination]:
    if min(flags.documents, flags.each) < 1:
        raise BadInput("--documents and --each are whole numbers from 1 on.")
    place = _place(flags.model)
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)

    @torch.no_grad()
    def write(prompts: Sequence[str]) -> list[str]:
        torch.manual_seed(0)
        texts = dict[int, str]()
        rows = [tokenizer(prompt).input_ids for prompt in prompts]
        for length in sorted({*map(len, rows)}):  # prompts of one length need no padding
            numbers = [number for number, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[number] for number in numbers])
            options = {"max_new_tokens": STORY_TOKENS, "do_sample": True, "top_k": 0, "pad_token_id": model.config.eos_token_id}
            output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options)
            written = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
            texts.update(zip(numbers, written, strict=True))
        return [texts[number] for number in range(len(rows))]

    return model, examine_language(model, write, flags.documents, flags.each)


if __name__ == "__main__":
    main()
