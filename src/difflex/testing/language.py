"""Tiny causal language models of several classes of transformers, with random weights; they read letters."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from difflex.quiet import hide_progress_bars

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?()-\n'"
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 2 + len(LETTERS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
)
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 1}
LANGUAGE: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("Llama", SIZES),
        "qwen": ("Qwen3", SIZES),
        "mistral": ("Mistral", {**SIZES, "sliding_window": 64}),
        "gemma": ("Gemma2", {**SIZES, "sliding_window": 64}),
        "gpt2": ("GPT2", {"vocab_size": SIZES["vocab_size"], **GPT2}),
    }
)
"""Class and config by name."""


def tiny_language_folder(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a random language model of a class, one of `LANGUAGE`, in `folder`; the seed determines the weights."""
    name, config = LANGUAGE[kind]
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(), hide_progress_bars():
        torch.manual_seed(seed)
        model = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**config))
        for parameter in model.parameters():  # as initialised, layers hardly change their input
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
    _write_letter_tokenizer(folder, begins=name != "GPT2")
    return folder


def _write_letter_tokenizer(folder: Path, begins: bool) -> None:
    """Write a tokenizer of letters; one that `begins` puts `<s>` in front of every text, as that of Llama does."""
    first = "<s>" if begins else "</s>"
    special = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    parts = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **special} for i, piece in enumerate(("<s>", "</s>"))],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: i for i, piece in enumerate(("<s>", "</s>", *LETTERS))},
            "unk_token": "?",
        },
    }
    if begins:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        ids = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        parts["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    tokens = {"bos_token": first, "eos_token": "</s>", "unk_token": "?"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
