"""`LanguagePipeline`: a causal language model by the same sites and hooks as the image models."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from difflex.choices import Precision
from difflex.errors import BadInput, NonFinite
from difflex.pipeline.calls import StopForward
from difflex.pipeline.engine import map_batches
from difflex.pipeline.harvesting import FiniteCheck, one_behind, progress_bar
from difflex.pipeline.language.engine import LanguageEngine, without_padding
from difflex.pipeline.profile import SiteRow
from difflex.pipeline.prompts import check_prompt
from difflex.pipeline.sites import SiteFunction, SiteModule, hook_site
from difflex.pipeline.sources import check_seed
from difflex.records import Activations, HookContext, Kind, Shot, Site
from difflex.values import fits, shown

MOST_TOKENS = 2**20
IMAGE_ONLY = ("denoiser", "diffusers", "harvest_images", "harvest_with_images", "images", "compare", "predictions")
"""What only a `Pipeline` has."""


class GeneratedText(NamedTuple):
    """A text, and the shot that writes it again."""

    text: str
    """Without the prompt."""
    tokens: tuple[int, ...]
    shot: Shot


class LanguagePipeline:
    """A causal language model of transformers with its sites, `layer.0` to the last one."""

    def __init__(self, engine: LanguageEngine, name: str, revision: str | None, precision: Precision) -> None:
        self.name = name
        self.revision = revision
        self.precision: Precision = precision
        self.engine = engine

    def __getattr__(self, name: str) -> NoReturn:
        if name in IMAGE_ONLY:
            raise BadInput(refusal(self.__dict__.get("name", "The model"), f"`{name}`"))
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @property
    def transformers(self) -> PreTrainedModel:
        """The model, for all that transformers can do with it; `at` works for its calls too."""
        return self.engine.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.engine.tokenizer

    def site(self, name: Site | str) -> Site:
        """Return the site called `name` in its canonical notation; the error for an unknown one shows the nearest."""
        return self.engine.sites.locate(name).site

    def expand(self, sites: Iterable[Site | str] | Site | str) -> list[Site]:
        """Return the sites that names and patterns such as `layer.*:update` stand for, in canonical notation."""
        return [module.site for module in self.engine.sites.expand([sites] if isinstance(sites, (Site, str)) else sites)]

    def kinds(self, site: Site) -> tuple[Kind, ...]:
        """Return the kinds of site that the layer of `site` has."""
        return self.engine.sites.kinds(site.path, site.stream)

    def sites(self, pattern: str = "*") -> list[SiteRow]:
        """Return a row for each layer whose name matches `pattern`, with the most tokens that the model reads (0: no limit)."""
        sites = self.engine.sites
        names = [module.site.path for module in sites.expand(["layer.*" if pattern == "*" else pattern])]
        widths: dict[Site, int] = {}
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                for kind in ("residual", "neurons") if "neurons" in sites.kinds(name, "text") else ("residual",):
                    site = Site(name, kind, "text")
                    stack.enter_context(self.at(site, lambda x, _, site=site: widths.update({site: x.shape[-1]})))
            self.engine.read([Shot(**self._settings(1, None))], [[0]], keep=1)
        return [
            SiteRow(
                site=site,
                path=sites.locate(site).path,
                width=width,
                tokens=self.engine.context or 0,
                kinds=sites.kinds(site.path, site.stream),
                neurons=widths.get(Site(site.path, "neurons", "text")),
            )
            for site, width in widths.items()
            if site.kind == "residual"
        ]

    def at(self, site: Site | str, function: SiteFunction) -> AbstractContextManager[None]:
        """Within the block, call `function` with the activations of `site` at each call of the model.

        If it returns a tensor, that replaces the activations; if it returns None, they stay. It sees tokens alone, never padding:
        for texts of different lengths it is called once for each length. When the model writes, the first call has all tokens of
        the prompt, each later one the last token of each text; `context.step` is the number of tokens written so far.
        """
        if not callable(function):
            raise BadInput(
                f"At the site '{site}' a function is needed, not {shown(function)}: it gets activations and a HookContext."
            )
        return self._at(self.engine.sites.locate(site), function)

    @contextmanager
    def edited(self, edits: Iterable[tuple[Site | str, SiteFunction]]) -> Iterator[None]:
        """Make several edits within the block, as `at` does for one."""
        with ExitStack() as stack:
            for site, function in edits:
                stack.enter_context(self.at(site, function))
            yield

    @contextmanager
    def _at(self, target: SiteModule, function: SiteFunction) -> Iterator[None]:
        tracker = self.engine.tracker
        with tracker.claimed(at=True), hook_site(tracker, target, without_padding(tracker, target.site, function)):
            yield

    def pieces(self, text: str | Shot) -> list[str]:
        """Return the tokens of a text as harvested: without those that the tokenizer puts in front of every text."""
        ids = self.engine.encode(text.prompt, text.text_length) if isinstance(text, Shot) else self.engine.encode(text)
        return [str(self.tokenizer.decode([token])) for token in ids[self.engine.first_tokens :]]

    def words(self) -> list[str]:
        """Return the tokens that are text of their own: each is read as itself after a space or at the beginning."""
        special = {*self.tokenizer.all_special_ids}
        texts = dict.fromkeys(
            str(self.tokenizer.decode([token])).strip() for token in range(len(self.tokenizer)) if token not in special
        )
        texts = [text for text in texts if text.isprintable() and text and "\ufffd" not in text]
        rows = cast("list[list[int]]", self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [text for text, row in zip(texts, rows, strict=True) if len(row) == 1 and row[0] not in special]

    def chat(self, prompt: str, system: str | None = None) -> str:
        """Return the prompt in the chat format of the model, up to where it answers."""
        if not self.tokenizer.chat_template:
            raise BadInput(f"The model '{self.name}' has no chat template: it was not trained on chats. Use the prompt as it is.")
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def shots(self, texts: str | Iterable[str], text_length: int | None = None) -> Iterator[Shot]:
        """Yield a shot for each text; the model reads its first `text_length` tokens, by default all of them."""
        settings = self._settings(1, text_length)
        for text in [texts] if isinstance(texts, str) else texts:
            yield Shot(**settings, prompt=check_prompt(text), split=Shot.split_of(text))

    def windows(self, texts: str | Iterable[str], text_length: int) -> Iterator[Shot]:
        """Yield shots of exactly `text_length` tokens: `texts` one after the other, cut into windows.

        The texts are separated by the model's end token; a rest that is shorter than a window is left out.
        """
        settings = self._settings(1, text_length)
        for text in self.engine.windows([texts] if isinstance(texts, str) else map(check_prompt, texts), text_length):
            yield Shot(**settings, prompt=text, split=Shot.split_of(text))

    def harvest(
        self,
        shots: Iterable[Shot],
        sites: Iterable[Site | str] | Site | str,
        batch: int = 16,
        progress: bool = True,
    ) -> Iterator[Activations]:
        """Yield the activations of `sites` (patterns too) for the texts of `shots`: for each batch, each length, each site.

        Activations hold no padding, and no tokens that the tokenizer puts in front of every text: those have activations many
        times as large as others. So shots of different lengths come in different `Activations`.
        """
        _check_batch(batch)
        modules = [self.engine.sites.locate(site) for site in self.expand(sites)]
        if not modules:
            raise BadInput("No site is given to harvest. Give at least one; `sites` lists them.")
        return self._harvest(shots, modules, batch, progress)

    def _harvest(self, shots: Iterable[Shot], sites: list[SiteModule], batch: int, progress: bool) -> Iterator[Activations]:
        def recording(part: Sequence[Shot]) -> tuple[list[Activations], FiniteCheck]:
            recorded = self._record(part, sites)
            return recorded, FiniteCheck([x.values for x in recorded])

        with progress_bar(progress) as bar:
            batches = (result for _, result in map_batches(self.engine, recording, shots, batch))
            for recorded, finite in one_behind(batches, lambda result: all(x.values.is_cuda for x in result[0])):
                bar.update(sum(x.values.shape[:2].numel() for x in recorded if x.site == sites[0].site))
                for activations in recorded:
                    if not finite.passed() and not bool(torch.isfinite(activations.values).all()):
                        raise NonFinite(
                            f"Activations that are not finite at the site '{activations.site}', text "
                            f"{activations.shots[0].prompt[:60]!r}. Try another precision: fp16 overflows where bf16 does not."
                        )
                    yield activations

    def _record(self, shots: Sequence[Shot], sites: Sequence[SiteModule]) -> list[Activations]:
        """Return the activations of `sites` in one pass, which ends at the last of them."""
        recorded: list[Activations] = []
        texts = [self.engine.encode(shot.prompt, shot.text_length) for shot in shots]
        expected = len(set(map(len, texts))) * len(sites)

        def record(x: Float[Tensor, "batch token width"], context: HookContext, site: Site) -> None:
            assert context.shots is not None
            values = x[:, self.engine.first_tokens :]
            recorded.append(Activations(site=site, values=values, shots=context.shots, grid=None))
            if len(recorded) == expected:
                raise StopForward

        with ExitStack() as hooks, suppress(StopForward):
            for target in sites:
                hooks.enter_context(self._at(target, partial(record, site=target.site)))
            self.engine.read(shots, texts, keep=1)
        order = [target.site for target in sites]
        return sorted(recorded, key=lambda x: (x.values.shape[1], order.index(x.site)))

    def generate(
        self,
        prompts: str | Sequence[str],
        tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 16,
        edits: Iterable[tuple[Site | str, SiteFunction]] = (),
    ) -> list[GeneratedText]:
        """Continue each prompt by at most `tokens` tokens, the most likely ones, or samples at a `temperature` above 0.

        Prompt i gets the seed `seed + i`: a sample depends on its own seed, not on the other prompts of its batch. `edits` change
        the activations of sites during the run, as `at` does; `difflex.steering.steering_hooks` makes them.
        """
        prompts = [check_prompt(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        _check_batch(batch)
        if not fits(int, tokens) or not 1 <= tokens <= MOST_TOKENS:
            raise BadInput(f"Texts of {shown(tokens)} tokens are not possible. Use 1 to {MOST_TOKENS:,}.")
        if not fits(float, temperature) or temperature < 0:
            raise BadInput(f"A temperature of {shown(temperature)} is not possible. Use 0 (the most likely tokens) or more.")
        first, settings = check_seed(seed), self._settings(tokens, None)
        shots = [
            Shot(**settings, prompt=prompt, seed=first + i, temperature=float(temperature), split=Shot.split_of(prompt))
            for i, prompt in enumerate(prompts)
        ]
        for shot in shots:
            self.engine.check_length(shot.prompt, len(self.engine.encode(shot.prompt)) + tokens)
        with self.edited(edits):
            written = [ids for _, texts in map_batches(self.engine, self.engine.write, shots, batch) for ids in texts]
        return [
            GeneratedText(str(self.tokenizer.decode(ids, skip_special_tokens=True)), tuple(ids), shot)
            for ids, shot in zip(written, shots, strict=True)
        ]

    def losses(self, texts: str | Sequence[str], batch: int = 16) -> Float[Tensor, " text"]:
        """Return the mean cross-entropy of each text after its first token, in nats; its exponential is the perplexity."""
        encoded = [self.engine.encode(check_prompt(text)) for text in ([texts] if isinstance(texts, str) else texts)]
        if short := [text for text in encoded if len(text) < 2]:
            raise BadInput(f"A text of {len(short[0])} token has no loss: each token is predicted from those before it.")
        return -torch.stack([scores.mean() for scores in self._log_probabilities([(text, 1) for text in encoded], batch)])

    def answer_scores(
        self, prompts: Sequence[str], answers: Sequence[str] | Sequence[Sequence[str]], batch: int = 16
    ) -> Float[Tensor, "prompt answer"]:
        """Return the log probability of each of `answers` as the text that follows each prompt; or of those of each prompt."""
        encode = self.engine.encode
        starts = [encode(check_prompt(prompt)) if prompt else self.engine.tokens("", special=True) for prompt in prompts]
        shared = [answer for answer in answers if isinstance(answer, str)]
        rows = [shared] * len(starts) if shared else [list(row) for row in answers]
        ends = [[self.engine.tokens(answer) for answer in row] for row in rows]
        if not ends or not all(map(all, ends)) or not ends[0] or len({*map(len, ends)}) > 1 or len(ends) != len(starts):
            raise BadInput("There is nothing to score. Give prompts, and as many answers to each, which are not empty.")
        # Nothing predicts the first token of a text.
        texts = [(start + end, len(start) or 1) for start, row in zip(starts, ends, strict=True) for end in row]
        return torch.stack([scores.sum() for scores in self._log_probabilities(texts, batch)]).view(len(starts), -1)

    def _log_probabilities(self, texts: Sequence[tuple[list[int], int]], batch: int) -> Iterator[Float[Tensor, " token"]]:
        """Yield the log probabilities of the tokens of each text from a place on."""
        _check_batch(batch)
        shot = Shot(**self._settings(1, None))

        def score(part: Sequence[tuple[list[int], int]]) -> list[Tensor]:
            texts = [text for text, _ in part]
            keep = max(len(text) - start for text, start in part) + 1
            logits = self.engine.read([shot] * len(part), texts, keep)
            scores = []
            for text, start, own in ((text, start, row) for (text, start), row in zip(part, logits, strict=True)):
                count = len(text) - start
                tokens = torch.tensor(text[start:], device=own.device)
                log_probabilities = own[len(own) - 1 - count : -1].float().log_softmax(-1)
                scores.append(log_probabilities.gather(1, tokens[:, None])[:, 0].cpu())
            return scores

        for _, scores in map_batches(self.engine, score, texts, batch):
            yield from scores

    def _settings(self, steps: int, text_length: int | None) -> dict[str, Any]:
        """Return the checked settings of a shot without prompt and seed."""
        if text_length is not None and (not fits(int, text_length) or text_length <= self.engine.first_tokens):
            raise BadInput(f"A text length of {shown(text_length)} tokens is not possible. Use a whole number above 0.")
        if text_length is not None:
            self.engine.check_length("", text_length)
        return {
            "model": self.name,
            "revision": self.revision,
            "precision": self.precision,
            "text_length": text_length,
            "pixels": (0, 0),
            "steps": steps,
            "guidance": 0.0,
        }


def refusal(name: str, what: str) -> str:
    """Say that `what` is not for the language model `name`."""
    return (
        f"{what} is for image models, and '{name}' is a language model: difflex.load_language_model opens it, for `generate`, "
        "`activations`, `at` and `losses`."
    )


def _check_batch(batch: int) -> None:
    if not fits(int, batch) or batch < 1:
        raise BadInput(f"A batch of {shown(batch)} texts is not possible. Use 1 or more.")
