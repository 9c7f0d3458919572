"""Train the miniature language models on documents of the grammar, with a checkpoint from which a killed run continues."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from difflex.errors import NonFinite, StaleWork, UnknownName
from difflex.files import folder_lock, parsing, write_file
from difflex.miniature.language.grammar import document
from difflex.miniature.language.vocabulary import END, START, token_ids
from difflex.tensors import read_tensors, write_tensors

FORMAT = 1
RESTART = "Move it away to train from the start."
POSITIONS = 512
MUON, ADAM = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")
"""The state of each optimiser."""
CHUNK = 16
"""Documents of a pass."""
CHECKPOINT_SECONDS, LOG_SECONDS = 60.0, 10.0
SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mini-llama": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        "mini-llama-small": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    }
)
"""Shapes of the models by name."""


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """How the models are trained."""

    updates: int = 6000
    batch: int = 32
    """Documents of an update."""
    rate: float = 4e-3
    """The largest learning rate; it rises over the first hundredth of the updates and falls along a cosine to 2 %."""
    decay: float = 0.05
    """The weight decay of Muon."""
    seed: int = 0

    def rate_at(self, update: int) -> float:
        """Return the learning rate of an update."""
        warm = max(1, self.updates // 100)
        if update < warm:
            return self.rate * (update + 1) / warm
        return self.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * (update - warm) / max(1, self.updates - warm))) / 2)


def build_model(name: str, seed: int = 0) -> LlamaForCausalLM:
    """Return the model called `name` with random weights."""
    if name not in SIZES:
        raise UnknownName.among("The size", name, SIZES)
    config = LlamaConfig(
        vocab_size=len(token_ids()),
        max_position_embeddings=POSITIONS,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.1,
        **SIZES[name],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(texts: Sequence[str]) -> tuple[Int[Tensor, "text token"], Int[Tensor, "text token"]]:
    """Return documents as tokens with start and end, and the tokens to predict: -100 after the end."""
    rows = [token_ids(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), END)
    targets = torch.full((len(rows), longest), -100)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return ids, targets


def document_losses(model: LlamaForCausalLM, texts: Sequence[str]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies of the tokens of documents, in nats, and the number of these tokens."""
    ids, targets = (x.to(model.device) for x in encode(texts))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets >= 0).sum())


@final
class LanguageLearner:
    """One model in training."""

    def __init__(self, name: str, recipe: LanguageRecipe, device: torch.device) -> None:
        self.name, self.model = name, build_model(name, recipe.seed).to(device)  # pyright: ignore[reportArgumentType]
        named = dict(self.model.named_parameters())
        blocks = [weight for path, weight in named.items() if weight.ndim == 2 and ".layers." in path]
        others = [weight for weight in named.values() if all(weight is not block for block in blocks)]
        self._muon = torch.optim.Muon(blocks, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
        self._adam = torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)

    def update(self, texts: Sequence[str], rate: float) -> float:
        """Make one update and return its loss."""
        optimisers: tuple[torch.optim.Optimizer, ...] = (self._muon, self._adam)
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        ordered, total, count = sorted(texts, key=len), 0.0, 0
        for first in range(0, len(ordered), CHUNK):  # documents of similar lengths need little padding
            loss, tokens = document_losses(self.model, ordered[first : first + CHUNK])
            loss.backward()
            total, count = total + loss.item(), count + tokens
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(count)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return total / count

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments by name."""
        tensors = {}
        for path, weight in self.model.named_parameters():
            tensors[f"{self.name}/weight/{path}"] = weight.detach()
            for optimiser, moments in ((self._muon, MUON), (self._adam, ADAM)):
                if weight in optimiser.state:
                    tensors |= {f"{self.name}/{moment}/{path}": optimiser.state[weight][moment] for moment in moments}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a state after so many updates."""
        for path, weight in self.model.named_parameters():
            weight.data.copy_(tensors[f"{self.name}/weight/{path}"])
            for optimiser, moments in ((self._muon, MUON), (self._adam, ADAM)):
                names = {moment: f"{self.name}/{moment}/{path}" for moment in moments}
                if all(name in tensors for name in names.values()):
                    optimiser.state[weight] = {moment: tensors[name].to(weight) for moment, name in names.items()}
                    if optimiser is self._adam:
                        optimiser.state[weight]["step"] = torch.tensor(float(updates))


@final
class LanguageTraining:
    """The training of several sizes on the same documents, in a folder."""

    def __init__(self, folder: Path, sizes: Sequence[str], recipe: LanguageRecipe, device: torch.device) -> None:
        self.folder, self.recipe, self.device = folder, recipe, device
        self.state, self.log = folder / "language.safetensors", folder / "language-log.jsonl"
        self.learners = [LanguageLearner(name, recipe, device) for name in sizes]
        self.updates, self.seconds = 0, 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same to continue."""
        return {"sizes": [learner.name for learner in self.learners], "recipe": asdict(self.recipe)}

    def restore(self) -> None:
        """Load the saved state, if any."""
        if not self.state.exists():
            return
        header, tensors = read_tensors(self.state, FORMAT, RESTART)
        with parsing(self.state, "a training state", RESTART):
            if changed := {key: header[key] for key, now in self.settings.items() if header[key] != now}:
                raise StaleWork(
                    f"{self.state} was trained with other settings: {changed}. Repeat them, or use another folder.", self.state
                )
            self.updates, self.seconds = header["updates"], header["seconds"]
            for learner in self.learners:
                learner.restore(tensors, self.updates)

    def save(self) -> None:
        """Write the state atomically."""
        tensors = {name: x for learner in self.learners for name, x in learner.state().items()}
        entries = {"updates": self.updates, "seconds": self.seconds}
        write_tensors(self.state, FORMAT, tensors, {**self.settings, **entries})

    def texts(self, update: int) -> list[str]:
        """Return the documents of an update: each belongs to one update alone."""
        first = (self.recipe.seed * 100_000_000) + update * self.recipe.batch
        return [document(first + i) for i in range(self.recipe.batch)]

    def steps(self) -> Iterator[dict[str, float]]:
        """Make the updates that are missing; yield the losses of each."""
        while self.updates < self.recipe.updates:
            began = time.monotonic()
            texts, rate = self.texts(self.updates), self.recipe.rate_at(self.updates)
            losses = {learner.name: learner.update(texts, rate) for learner in self.learners}
            if not all(map(math.isfinite, losses.values())):
                raise NonFinite(f"A loss is not finite after {self.updates:,} updates: {losses}. Train with another seed.")
            self.updates, self.seconds = self.updates + 1, self.seconds + time.monotonic() - began
            yield losses


def train_language(folder: Path, sizes: Sequence[str], recipe: LanguageRecipe, device: torch.device) -> LanguageTraining:
    """Train `sizes` in `folder`, or go on with it, and return the finished training."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        training = LanguageTraining(folder, sizes, recipe, device)
        training.restore()
        _cut_log(training)
        saved = logged = time.monotonic()
        recent: list[dict[str, float]] = []
        with tqdm(total=recipe.updates, initial=training.updates, desc="language", unit="update", mininterval=1.0) as bar:
            for losses in training.steps():
                recent.append(losses)
                bar.update()
                bar.set_postfix(losses, refresh=False)
                now, is_finished = time.monotonic(), training.updates == recipe.updates
                if now - logged > LOG_SECONDS or is_finished:
                    _write_log(training, recent)
                    logged = now
                if now - saved > CHECKPOINT_SECONDS or is_finished:
                    training.save()
                    saved = now
        return training


def _write_log(training: LanguageTraining, recent: list[dict[str, float]]) -> None:
    """Add a line with the mean losses, and forget them."""
    means = {name: sum(each[name] for each in recent) / len(recent) for name in recent[0]}
    with training.log.open("a") as file:
        file.write(json.dumps({"update": training.updates, "seconds": round(training.seconds, 1), "loss": means}) + "\n")
    recent.clear()


def _cut_log(training: LanguageTraining) -> None:
    """Drop the entries after the saved state, which are made again."""
    if training.log.exists():
        lines = [line for line in training.log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["update"] <= training.updates]
        write_file(training.log, "".join(f"{line}\n" for line in kept).encode())
