"""Where a model comes from: the package, a folder or the hub; its default settings; whether its files are complete."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.files import disk_errors, parsing, read_json
from difflex.pipeline.components import PLANS, PipelinePlan, read_plan
from difflex.pipeline.families import Family
from difflex.quiet import hide_progress_bars, quiet
from difflex.values import fits, shown

MOST_TEXT = 512
"""The largest `max_sequence_length` that the pipelines of diffusers accept."""
MOST_PIXELS = 2**26
"""Of an image that is generated: 8192 x 8192."""
SMALL_MODEL = 2**30
"""Bytes below which a model loads without progress bars."""
HUB_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
NAMES = "Name a folder by its path (./my-model), a hub model as OWNER/NAME."
COPY_AGAIN = "Copy or download it again."
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
DEFAULTS, INDEX = "difflex.json", "model_index.json"
CONFIG = "config.json"
"""What a language model of transformers has in place of the index."""


class ModelSource(NamedTuple):
    """Where a model is."""

    name: str
    """As the user wrote it."""
    folder: Path | None
    """None for a hub model that is not downloaded yet."""
    revision: str | None
    """The commit or branch on the hub, or the random weights; None for folders and embedded models."""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """The settings a model is made for: `difflex.json` in its folder, or else the defaults of its family."""

    steps: int
    guidance: float
    pixels: tuple[tuple[int, int], ...] = ()
    """Possible image sizes, the default first; empty if any multiple of a token's size is possible."""
    text_length: int | None = None
    words: frozenset[str] = frozenset()
    """All words of the training captions; empty if unknown."""

    def default_pixels(self, sample_size: object, vae_scale: int) -> tuple[int, int]:
        """Return the default image size; without a list of sizes, from the denoiser's `sample_size` in latents."""
        if self.pixels:
            return self.pixels[0]
        # Flux has no sample_size: its pipelines generate 128 x 128 latents.
        sample = cast("int | Sequence[int]", sample_size or 128)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * vae_scale, width * vae_scale

    def check_pixels(self, pixels: tuple[int, int], token_pixels: int) -> None:
        """Raise an error that names the possible sizes if the model cannot generate images of `pixels`."""
        if self.pixels and tuple(pixels) not in self.pixels:
            sizes = ", ".join(f"{height} x {width}" for height, width in self.pixels)
            raise BadInput(
                f"Images of {pixels[0]} x {pixels[1]} pixels are not possible with this model. Its sizes are: {sizes}."
            )
        if min(pixels) < token_pixels or any(side % token_pixels for side in pixels):
            near = " x ".join(str(max(token_pixels, round(side / token_pixels) * token_pixels)) for side in pixels)
            raise BadInput(
                f"Images of {pixels[0]} x {pixels[1]} pixels are not possible with this model. "
                f"Both sides must be multiples of {token_pixels}; the nearest size is {near}."
            )

    def warn_of_unknown_words(self, prompts: Iterable[str]) -> None:
        """Warn of words that the training captions do not contain, if their words are known."""
        words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt.lower()))
        unknown = [word for word in words if word not in self.words] if self.words else []
        if unknown:
            listed = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            warnings.warn(f"The model does not know these words: {listed}. It knows {len(self.words)} words.", stacklevel=3)


def check_pixels(pixels: tuple[int, int]) -> tuple[int, int]:
    """Return `pixels` if they are two whole numbers of a possible size."""
    try:
        height, width = map(index, pixels)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{shown(pixels)} is not a size of images. Give height and width as two whole numbers.") from error
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise BadInput(f"Images of {shown(height)} x {shown(width)} pixels are not possible. Use at most {MOST_PIXELS:,} pixels.")
    return height, width


def check_text_length(length: int, family: Family) -> int:
    """Return `length` if models of `family` can read so many tokens of a prompt."""
    if family.text_length is None:
        raise BadInput(f"The text length of models like this one ({family.name}) is fixed. Leave {shown(length)} out.")
    if not fits(int, length) or not 1 <= length <= MOST_TEXT:
        raise BadInput(f"A text length of {shown(length)} tokens is not possible. Use 1 to {MOST_TEXT}.")
    return length


def check_seed(seed: int) -> int:
    """Return `seed` if it is one."""
    if not fits(int, seed) or seed < 0:
        raise BadInput(f"{shown(seed)} is not a seed. Seeds are whole numbers from 0 to 2^63 - 1.")
    return seed


def embedded(index: str = INDEX) -> dict[str, Path]:
    """Return the folders of the models inside the package by name: of image models, or those with another file as `index`."""
    root = Path(str(files("difflex") / "models"))
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{index}"))}


def find(name: str | Path, revision: str | None = None) -> ModelSource:
    """Find the image model `name` in the package, in a folder or on the hub, from which nothing is downloaded yet."""
    if (place := _config_folder(name)) is not None:
        check_no_language_model(str(name), place)
    return find_source(name, revision, INDEX, "a diffusers pipeline")


def _config_folder(name: str | Path) -> Path | None:
    """Return the folder of a model that has a config and no index; None for any other name."""
    if not isinstance(name, str | Path) or not fits(str, str(name)) or not str(name).strip():
        return None
    place = embedded(CONFIG).get(str(name)) or _folder(str(name))
    return place if (place / CONFIG).is_file() and not (place / INDEX).is_file() else None


def is_language_model(name: str | Path, revision: str | None = None, offline: bool = False) -> bool:
    """Whether `name` is a language model: one inside the package, a folder, or a hub model, whose config is downloaded."""
    if str(name) in PLANS or str(name) in embedded():
        return False
    if (place := _config_folder(name)) is not None:
        return has_language_config(place)
    is_hub_name = isinstance(name, str) and HUB_NAME.fullmatch(name) and not _folder(name).exists()
    return bool(is_hub_name) and has_language_config(name, revision, offline)


def check_no_language_model(name: str, place: str | Path, revision: str | None = None, offline: bool = True) -> None:
    """Refuse a language model where an image model is needed."""
    if has_language_config(place, revision, offline):
        raise BadInput(
            f"'{name}' is a language model, and this needs an image model: a diffusers pipeline. "
            "difflex.load_language_model opens it, for activations, dictionaries, contrasts and edits of its text."
        )


def has_language_config(place: str | Path, revision: str | None = None, offline: bool = True) -> bool:
    """Whether a folder or hub model has the config of a causal language model of transformers."""
    try:
        with quiet("transformers"):
            config = AutoConfig.from_pretrained(os.fspath(place), revision=revision, local_files_only=offline)
    except Exception:  # whatever it is, it is no language model that transformers can read
        return False
    return any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or ())


def find_source(name: str | Path, revision: str | None, index: str, what: str) -> ModelSource:
    """Find the model `name` in the package, in a folder with the file `index`, which makes it `what`, or on the hub."""
    models = embedded(index)
    if not isinstance(name, str | Path) or not fits(str, str(name)) or not str(name).strip():
        raise UnknownName.among("The model", shown(name), models, NAMES)
    folder = _folder(str(name))
    if revision is not None and (str(name) in models or folder.is_dir()):
        raise BadInput(f"The model '{name}' has no revision {revision}: only models on the hub have revisions. Leave it out.")
    if str(name) in models:
        return ModelSource(str(name), models[str(name)], None)
    if folder.is_dir():
        if not (folder / index).is_file():
            raise BadInput(f"The folder {folder} has no {index}: it is not {what}. Name the folder that has one.")
        return ModelSource(str(name), folder, None)
    if folder.exists():
        raise BadInput(f"{folder} is a file, not a model. {NAMES}")
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise UnknownName.among("The model", str(name)[:200], models, NAMES)
    return ModelSource(name, None, revision)


def _folder(name: str) -> Path:
    """Return the folder that `name` stands for, which need not exist."""
    try:
        folder = Path(name).expanduser()
        folder.stat()
    except FileNotFoundError:
        return Path(name).expanduser()
    except (OSError, RuntimeError) as error:  # such as a name that is too long, or the home folder of an unknown user
        raise UnknownName(f"The model '{name[:200]}' cannot be found: {error.args[-1]}. {NAMES}") from error
    return folder


def plan_of(source: ModelSource, offline: bool) -> PipelinePlan:
    """Read the components of a model; for a hub model only the configs are downloaded."""
    try:
        return read_plan(source.folder or source.name, source.revision, offline)
    except Exception as error:  # configs of any content, read by diffusers and transformers
        if isinstance(error, DifflexError):
            raise
        if source.folder is not None:
            raise BrokenFile(
                f"The configs of the model in {source.folder} cannot be read: {first_line(error)}. {COPY_AGAIN}"
            ) from error
        check_no_language_model(source.name, source.name, source.revision, offline)
        raise _unreachable(source, offline, error) from error


def fetch(source: ModelSource, offline: bool) -> ModelSource:
    """Download a hub model unless it is in the cache; return its folder and exact revision."""
    if source.folder is not None:
        return source
    try:
        folder = Path(DiffusionPipeline.download(source.name, revision=source.revision, local_files_only=offline))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreachable(source, offline, error) from error
    return ModelSource(source.name, folder, folder.name)


def _unreachable(source: ModelSource, offline: bool, error: Exception) -> UnknownName:
    where = "the local cache of the hub" if offline else "the hub"
    revision = f" at revision {source.revision}" if source.revision else ""
    # diffusers reports only that this file is missing, whatever the reason.
    reason = "it has no such diffusers pipeline or cannot be reached" if INDEX in str(error) else first_line(error)
    return UnknownName(
        f"The model '{source.name}'{revision} could not be read from {where}: {reason}. "
        f"Models inside the package: {', '.join(embedded()) or 'none'}. {NAMES}"
    )


def read_defaults(folder: Path | None, family: Family, plan: PipelinePlan) -> ModelDefaults:
    """Read `difflex.json` in `folder`, completed by the defaults of the family for such a model."""
    path, defaults = folder / DEFAULTS if folder else None, _family_defaults(family, plan)
    if path is None or not path.exists():
        return defaults
    advice = "Write it again, or delete it: it is optional."
    entries = read_json(path, 1, advice)
    with parsing(path, "default settings of a model", advice):
        return ModelDefaults(
            steps=int(entries.get("steps", defaults.steps)),
            guidance=float(entries.get("guidance", defaults.guidance)),
            pixels=tuple((int(height), int(width)) for height, width in entries.get("pixels", ())),
            text_length=entries.get("text_length", defaults.text_length),
            words=frozenset(entries.get("words", ())),
        )


def _family_defaults(family: Family, plan: PipelinePlan) -> ModelDefaults:
    few = family.few
    if few and all(plan.config(entry) == value for entry, value in few.config.items()):
        return ModelDefaults(steps=few.steps, guidance=0.0, text_length=few.text_length or family.text_length)
    return ModelDefaults(steps=family.steps, guidance=family.default_guidance, text_length=family.text_length)


def check_weights(folder: Path) -> None:
    """Raise an error that names the file if a file in `folder` is truncated, damaged in its header or missing."""
    index = _read_index(folder / INDEX)
    for part, value in index.items():
        if isinstance(value, list) and "Tokenizer" in str(value[-1:]):
            _check_tokenizer(folder / part)
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, "pt"):  # reads the header and compares it with the size of the file
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise BrokenFile(f"{path} is truncated or damaged: {first_line(error)}. {COPY_AGAIN}") from error
    for path in sorted(folder.glob("*/*.index.json")):
        for shard in sorted(set(_read_index(path).get("weight_map", {}).values())):
            if not (path.parent / shard).is_file():
                raise BrokenFile(f"{path.parent / shard}, listed in {path.name}, is missing. Copy or download the model again.")


def _check_tokenizer(folder: Path) -> None:
    """Raise an error for a tokenizer without settings or vocabulary, which transformers makes up in silence."""
    for names in (("tokenizer_config.json",), VOCABULARIES):
        if not any((folder / name).is_file() for name in names):
            raise BrokenFile(f"The tokenizer in {folder} has no {' or '.join(names)}. {COPY_AGAIN}")


def _read_index(path: Path) -> Mapping[str, Any]:
    try:
        with parsing(path, "JSON", COPY_AGAIN), disk_errors(path, "read"):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError as error:
        raise BrokenFile(f"{path} is nested too deeply: it is damaged. {COPY_AGAIN}") from error


def read_pipeline(folder: Path, dtype: torch.dtype, **components: object) -> DiffusionPipeline:
    """Read the pipeline in `folder`, except for the `components` given, in one precision whatever it is stored in."""
    small = sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) < SMALL_MODEL
    try:
        with quiet("transformers", "diffusers"), hide_progress_bars() if small else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(os.fspath(folder), dtype=dtype, local_files_only=True, **components)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # readers of diffusers, transformers, tokenizers: each has its own errors for a damaged file
        raise BrokenFile(f"The model in {folder} cannot be read: {first_line(error)}. {COPY_AGAIN}") from error
    for part, component in pipeline.components.items():
        if isinstance(component, nn.Module) and part not in components:
            _check_stored(folder / part, component)
        _check_tokens(folder, part, pipeline)
    return pipeline


def _check_stored(folder: Path, component: nn.Module) -> None:
    """Raise an error if the files of a component hold other weights: transformers makes random ones in silence."""
    stored: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored.update(map(_ending, file.keys()))
    names = [*component.state_dict()]
    if stored and 2 * sum(_ending(name) in stored for name in names) < len(names):
        raise BrokenFile(f"{folder} holds other weights than its config describes, such as {names[0]}. {COPY_AGAIN}")


def _check_tokens(folder: Path, part: str, pipeline: DiffusionPipeline) -> None:
    """Raise an error for a tokenizer with a special token or a padded length that its text encoder does not know."""
    encoder, tokenizer = pipeline.components.get(part.replace("tokenizer", "text_encoder")), pipeline.components[part]
    if part.startswith("tokenizer") and isinstance(encoder, PreTrainedModel):
        known = cast(nn.Embedding, encoder.get_input_embeddings()).num_embeddings
        if (last := max(tokenizer.all_special_ids, default=0)) >= known:
            raise BrokenFile(f"{folder / part} has a special token with the number {last}, of {known} known ones. {COPY_AGAIN}")
        most = encoder.config.max_position_embeddings if encoder.config.model_type == "clip_text_model" else None
        if most is not None and tokenizer.model_max_length > most:  # diffusers pads the prompts of CLIP to it
            longest = f"{tokenizer.model_max_length:.9g}"
            raise BrokenFile(f"{folder / part} has prompts of {longest} tokens, of which the encoder reads {most}. {COPY_AGAIN}")


def _ending(name: str) -> str:
    """Return the end of the name of a tensor: its beginning differs between versions of transformers."""
    return ".".join(name.split(".")[-4:])


def check_whole(name: str, parts: Mapping[str, object]) -> None:
    """Raise an error that names the first tensor of a model that its files do not hold."""
    for part, component in parts.items():
        for path, tensor in component.state_dict().items() if isinstance(component, nn.Module) else ():
            if tensor.is_meta:
                raise BrokenFile(f"The files of the model '{name}' do not hold the weights {part}.{path}. {COPY_AGAIN}")


@torch.no_grad()
def check_finite(name: str, parts: Mapping[str, object]) -> None:
    """Raise an error that names the first tensor of a model that holds NaN or infinity."""
    for part, component in parts.items():
        for path, tensor in component.state_dict().items() if isinstance(component, nn.Module) else ():
            # A sum of finite numbers may overflow, but one with NaN or infinity is never finite.
            if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
                raise NonFinite(
                    f"The weights of the model '{name}' hold NaN or infinity: {part}.{path}. {COPY_AGAIN} If it was trained "
                    "so, or overflows in fp16, use other weights."
                )


def first_line(error: BaseException) -> str:
    """Return the first line of a message, without its full stop."""
    message = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
    return message.strip().split("\n")[0].removesuffix(".")
