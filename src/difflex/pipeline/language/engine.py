"""Runs of a language model: texts as padded batches, one forward pass for reading, one for each token that is written."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from difflex.errors import BadInput, BrokenFile
from difflex.pipeline.calls import CallTracker, DenoiserCall
from difflex.pipeline.families import BlockPattern, Family
from difflex.pipeline.sites import SiteFunction, SiteMap, check_result
from difflex.records import HookContext, Shot, Site

ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
"""How classes of transformers call the activation function of an MLP."""
CHARACTERS = 16
"""Of a token, at most, in the first try to find where a window ends."""


class TextRun(NamedTuple):
    """What difflex knows about a run that it starts itself."""

    shots: tuple[Shot, ...]
    length: int
    """Tokens of the longest prompt."""


class TokenBatch(NamedTuple):
    """Texts as tokens, padded on the left to the longest of them."""

    ids: Int[Tensor, "text token"]
    mask: Int[Tensor, "text token"]
    """1 for tokens, 0 for padding."""


@final
class LanguageTracker(CallTracker):
    """The calls of a language model; the step of a call is the number of tokens that were written before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.run: TextRun | None = None
        """The run that is being computed, if difflex started it."""
        self.padding: tuple[int, ...] = ()
        """Of each text in the current call: how many of the first tokens are padding."""

    def _read_call(self, module: nn.Module, arguments: Mapping[str, object]) -> DenoiserCall:
        ids = arguments.get("input_ids")
        ids = arguments.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            raise BadInput("The language model was called without input_ids. Give it tokens.")
        mask = arguments.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        zeros = [0] * len(ids)
        if mask is not None and mask.shape[1] == ids.shape[1]:
            zeros = (mask.cumsum(1) == 0).sum(1).tolist()
        self.padding = tuple(min(count, ids.shape[1] - 1) for count in zeros)
        run = self.run
        total = ids.shape[1] if mask is None else mask.shape[1]
        return DenoiserCall(
            step=total - run.length if run else 0,
            timestep=0.0,
            steps=run.shots[0].steps if run else 1,
            halves=(None,),
            shots=run.shots if run else None,
            text_tokens=0,
            grid=None,
        )


def without_padding(tracker: LanguageTracker, site: Site, function: SiteFunction) -> SiteFunction:
    """Return a function for a padded batch that calls `function` with the texts of each length, without their padding."""

    def apply(x: Float[Tensor, "batch token width"], context: HookContext) -> Float[Tensor, "batch token width"] | None:
        padding = tracker.padding
        if not any(padding):
            return function(x, context)
        changed: Tensor | None = None
        for count in dict.fromkeys(padding):
            rows = [row for row, own in enumerate(padding) if own == count]
            shots = None if context.shots is None else tuple(context.shots[row] for row in rows)
            part = x[rows, count:]
            new = function(part.clone(), replace(context, shots=shots))
            check_result(site, new, part)
            if new is not None:
                changed = x.clone() if changed is None else changed
                changed[rows, count:] = new.to(x)
        return changed

    return apply


@final
class LanguageEngine:
    """A language model of transformers with its tokenizer, call tracker and sites."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tracker = LanguageTracker(model)
        self.sites = SiteMap(model, Family(name="language", denoiser="", blocks=find_layers(model)))
        self.sharded, self.offloaded = False, False
        self.max_batch: int | None = None
        """The largest batch to try, once a larger one did not fit into memory."""
        self.text_length: int | None = None
        self.first_tokens = _count_first_tokens(tokenizer)
        """Tokens that the tokenizer puts in front of every text, such as `<s>`."""
        arguments = inspect.signature(type(model).forward).parameters
        self._takes_positions, self._takes_limit = "position_ids" in arguments, "logits_to_keep" in arguments

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Return the first `length` tokens of a text, with those that the tokenizer puts in front of it.

        A text that begins with `<s>`, such as that of a chat template, gets no second one.
        """
        first = cast("str | None", self.tokenizer.bos_token)
        ids = self.tokens(text, special=not (first and text.startswith(first)))
        if len(ids) <= self.first_tokens:
            raise BadInput(f"The text {text[:60]!r} has no tokens. Give text that is not empty.")
        if length is not None:
            return ids[:length]
        self.check_length(text, len(ids))
        return ids

    def check_length(self, text: str, tokens: int) -> None:
        """Refuse more tokens than the model reads."""
        if self.context is not None and tokens > self.context:
            raise BadInput(
                f"The text {text[:60]!r} has {tokens} tokens, with those to write, but the model reads at most {self.context}. "
                "Give shorter texts, or text_length for the tokens of each that are read."
            )

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text, by default without those that the tokenizer adds."""
        return list(cast("list[int]", self.tokenizer(text, add_special_tokens=special)["input_ids"]))

    def windows(self, texts: Iterable[str], length: int) -> Iterator[str]:
        """Yield texts whose first `length` tokens together are those of `texts`, which follow one another with a separator.

        A rest that is shorter is left out. A window begins where the last one ended, so that long texts give several.
        """
        own, rest = length - self.first_tokens, ""
        if own < 1:
            raise BadInput(f"Windows of {length} tokens are not possible. Use at least {self.first_tokens + 1}.")
        if not self.tokenizer.is_fast:
            raise BadInput(
                f"{type(self.tokenizer).__name__} does not say where its tokens are in a text. Give texts of equal length to "
                "`shots`, or use a model with a fast tokenizer."
            )
        separator = cast("str | None", self.tokenizer.eos_token) or "\n\n"
        for text in texts:
            rest += (separator if rest else "") + text
            while (ends := self._window(rest, own)) is not None:
                yield rest[: ends[0]]
                rest = rest[ends[1] :]

    def _window(self, text: str, own: int) -> tuple[int, int] | None:
        """Return the characters of a window of `own` tokens of `text`, and where the next one begins; None if it is too short."""
        size = own * CHARACTERS
        while True:
            encoded = self.tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=True)
            places = cast("list[tuple[int, int]]", encoded["offset_mapping"])
            if len(places) > own or size >= len(text):
                break
            size *= 2
        for last in range(own - 1, len(places) - 1):  # the last token may go on
            end = places[last][1]
            if end and len(self.tokens(text[:end], special=False)) >= own:
                return end, max(1, places[own - 1][1])
        return None

    def batch(self, texts: Sequence[Sequence[int]]) -> TokenBatch:
        """Return texts as a batch on the device of the model."""
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            mask[row, longest - len(text) :] = 1
        return TokenBatch(ids.to(self.device), mask.to(self.device))

    @contextmanager
    def running(self, shots: Sequence[Shot], length: int) -> Iterator[None]:
        """Let hooks know the shots of the calls within the block."""
        self.tracker.check_idle()
        with self.tracker.claimed():
            outer, self.tracker.run = self.tracker.run, TextRun(tuple(shots), length)
            try:
                yield
            finally:
                self.tracker.run = outer

    def call(self, ids: Tensor, mask: Tensor, cache: object = None, keep: int = 0, use_cache: bool = False) -> Any:
        """Call the model for the last tokens of a batch; `keep` limits the logits to the last positions."""
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache, "past_key_values": cache}
        if self._takes_positions:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self._takes_limit:
            arguments["logits_to_keep"] = keep
        return self.model(**arguments, return_dict=True)

    def read(self, shots: Sequence[Shot], texts: Sequence[Sequence[int]], keep: int = 0) -> Float[Tensor, "text token word"]:
        """Return the logits after each token, or after the last `keep` of them, in one pass."""
        batch = self.batch(texts)
        with torch.no_grad(), self.running(shots, batch.ids.shape[1]):
            return self.call(batch.ids, batch.mask, keep=keep).logits

    def write(self, shots: Sequence[Shot]) -> list[list[int]]:
        """Return the tokens that the model writes after the prompts of `shots`, which share `steps` and `temperature`.

        Each shot has random numbers of its own, by its seed. A text ends before the model's end token.
        """
        batch = self.batch([self.encode(shot.prompt, shot.text_length) for shot in shots])
        ids, mask, cache = batch.ids, batch.mask, None
        generators = [torch.Generator().manual_seed(shot.seed) for shot in shots]
        ends, temperature = self._ends(), shots[0].temperature or 0.0
        written: list[list[int]] = [[] for _ in shots]
        finished = [False] * len(shots)
        with torch.no_grad(), self.running(shots, ids.shape[1]):
            for _ in range(shots[0].steps):
                outputs = self.call(ids, mask, cache, keep=1, use_cache=True)
                uniform = torch.tensor([float(torch.rand((), generator=each)) for each in generators])
                chosen = _choose(outputs.logits[:, -1], temperature, uniform)
                for row, token in enumerate(chosen.tolist()):
                    finished[row] |= token in ends
                    if not finished[row]:
                        written[row].append(token)
                if all(finished):
                    break
                ids, cache = chosen[:, None], outputs.past_key_values
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return written

    def _ends(self) -> set[int]:
        """Return the tokens that end a text."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*configured] if isinstance(configured, (list, tuple)) else [configured]
        return {end for end in (*ends, self.tokenizer.eos_token_id) if isinstance(end, int)}


def _choose(logits: Float[Tensor, "text word"], temperature: float, uniform: Float[Tensor, " text"]) -> Int[Tensor, " text"]:
    """Return the most likely token of each text, or with a temperature one by a uniform random number."""
    if not temperature:
        return logits.argmax(-1)
    sums = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    places = torch.searchsorted(sums, uniform.to(sums)[:, None] * sums[:, -1:], right=True)
    return places[:, 0].clamp(max=logits.shape[-1] - 1)


def _count_first_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many special tokens the tokenizer puts in front of a text."""
    own = cast("list[int]", tokenizer("a", add_special_tokens=False)["input_ids"])
    ids = cast("list[int]", tokenizer("a")["input_ids"])
    return next((start for start in range(len(ids)) if ids[start : start + len(own)] == own), 0)


def find_layers(model: PreTrainedModel) -> tuple[BlockPattern, ...]:
    """Return the row of the layers of any language model of transformers: its outermost list of as many modules as layers."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not lists:
        raise BrokenFile(f"A {type(model).__name__} has no list of {layers} layers, so difflex does not know its sites.")
    path = min(lists, key=lambda path: (path.count("."), path))
    first = cast(nn.ModuleList, model.get_submodule(path))[0]
    leaves = [name for name, module in first.named_modules() if not list(module.parameters())]
    names = [name for name in leaves if name.rpartition(".")[2] in ACTIVATION_NAMES]
    neurons = {"text": names[0]} if len(names) == 1 else {}
    return (BlockPattern(name="layer.*", path=f"{path}.*", outputs={"text": 0}, neurons=cast(Any, neurons)),)
