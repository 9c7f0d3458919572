"""The trained miniature language models as folders of transformers, with a card that holds their figures."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from difflex.files import parsing, read_json, write_file, write_json
from difflex.miniature.language.examining import LanguageExamination
from difflex.miniature.language.training import FORMAT, POSITIONS, RESTART, build_model
from difflex.miniature.language.vocabulary import END, START, write_tokenizer
from difflex.quiet import hide_progress_bars
from difflex.tensors import read_tensors

RECORD = "training.json"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A causal language model of the Llama class, small enough to be part of a Python package: {millions:.2f} M parameters, {layers}
layers of width {width}, a vocabulary of {words} words and marks. It was trained from scratch on text of the drawn world in which
every sentence shows a known behaviour (`difflex.miniature.language.grammar`), so that methods that change behaviour are judged by
a parser.

## Training
- `python -m difflex.miniature.language train`: {updates:,} updates of {batch} documents, none twice; {minutes:.0f} minutes of
  computing time for {siblings} on {machine}.
- Next-token cross-entropy in float32. Muon for the matrices of the layers, AdamW for the rest, learning rate {rate:g}.
  The weights are stored in bfloat16.

## Results
{results}

## Limits
- It knows the words of its grammar only; every other word is `<unk>`.
- The default length of a document is at most a third of the {positions} positions.
"""


def export_language(folder: Path, target: Path) -> list[Path]:
    """Write each model that was trained in `folder` to a folder in `target`, and return these."""
    header, tensors = read_tensors(folder / "language.safetensors", FORMAT, RESTART)
    places = []
    with parsing(folder / "language.safetensors", "a training state", RESTART):
        for name in header["sizes"]:
            weights = {
                path.removeprefix(f"{name}/weight/"): x for path, x in tensors.items() if path.startswith(f"{name}/weight/")
            }
            places.append(_write(target / name, name, weights, header))
    return places


def _write(place: Path, name: str, weights: dict[str, Tensor], header: dict[str, Any]) -> Path:
    model = build_model(name)
    model.load_state_dict(weights)
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    model.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=END)
    place.mkdir(parents=True, exist_ok=True)
    with hide_progress_bars():
        model.save_pretrained(place)
    write_tokenizer(place, POSITIONS)
    record = {name: header[name] for name in ("sizes", "recipe", "updates", "seconds")}
    write_json(place / RECORD, 1, {**record, "machine": f"{platform.machine()} with torch {torch.__version__}"})
    return place


def write_language_card(place: Path, model: LlamaForCausalLM, examination: LanguageExamination) -> None:
    """Write the card of an exported model, with the figures of its examination."""
    advice = "`python -m difflex.miniature.language export` writes it."
    with parsing(place / RECORD, "the record of a training", advice):
        record = read_json(place / RECORD, 1, advice)
        recipe = record["recipe"]
        card = CARD.format(
            name=place.name,
            millions=sum(weight.numel() for weight in model.parameters()) / 1e6,
            layers=model.config.num_hidden_layers,
            width=model.config.hidden_size,
            words=model.config.vocab_size,
            updates=record["updates"],
            batch=recipe["batch"],
            minutes=record["seconds"] / 60,
            siblings=" and ".join(record["sizes"]),
            machine=record["machine"],
            rate=recipe["rate"],
            results=as_table(examination),
            positions=POSITIONS,
        )
    write_file(place / "README.md", card.encode())


def as_table(examination: LanguageExamination) -> str:
    """Return the figures of an examination as a table in Markdown."""
    rows = [
        "| behaviour | questions answered as introduced | sentences as introduced |",
        "|---|---|---|",
        *(
            f"| {name} | {share:.0%} | {examination.prompted_by_behaviour[name]:.0%} |"
            for name, share in examination.answers_by_behaviour.items()
        ),
        f"| all | {examination.answers:.1%} | {examination.prompted:.1%} |",
    ]
    head = (
        f"Perplexity of a token of {examination.documents} held-out documents: {examination.perplexity:.3f}. Stories whose "
        f"sentences are all of the grammar: {examination.grammatical:.1%} of {examination.stories}. With an introduction "
        f"(`you are formal.`), of {examination.questions} questions, and of the sentences of as many stories that show its "
        "behaviour:"
    )
    return "\n".join([head, "", *rows])


def as_line(examination: LanguageExamination) -> str:
    """Return the figures of an examination as a line of JSON."""
    return json.dumps(asdict(examination))
