"""Prompts: read from a list, a file, a folder of files or a data set on the hub, and encoded for the denoiser."""

import csv
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from difflex.errors import BadInput, BrokenFile, DifflexError, MissingExtra, UnknownName
from difflex.files import disk_errors
from difflex.pipeline.families import Family
from difflex.quiet import quiet
from difflex.values import fits, shown

DEFAULT_COLUMNS = ("prompt", "caption", "text")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CACHE_BYTES = 512 * 2**20
"""Embeddings to keep: about a hundred prompts of FLUX, enough to encode a prompt once for all its seeds."""
AHEAD_BYTES = 64 * 2**20
"""Embeddings to compute ahead: a small text encoder spends most of its time on being called."""
SPECIAL_TOKENS = 4
"""The most tokens that a tokenizer adds around a prompt."""


def read_prompts(source: str | Path | Iterable[str], column: str | None = None, revision: str | None = None) -> Iterator[str]:
    """Read the prompts in `source` lazily; the first one at once, so that errors come early.

    A file holds a prompt on each line, or a column of prompts: .csv, .json (a list), .jsonl or .parquet. A folder holds such
    files; OWNER/NAME or OWNER/NAME:COLUMN is a data set on the hub, streamed at `revision`. Empty entries are left out.
    Anything else is a list.
    """
    prompts = _prompts(source, column, revision)
    first = next(prompts, None)
    if first is None:
        raise BadInput(f"There is no prompt in {source}. Give it at least one.")
    return chain([first], prompts)


def _prompts(source: str | Path | Iterable[str], column: str | None, revision: str | None) -> Iterator[str]:
    if not isinstance(source, (str, Path)):
        return iter(source)
    path = Path(os.path.expanduser(source))
    with disk_errors(path, "read"):
        is_file = path.is_file()
    if is_file:
        if path.suffix.lower() not in READERS and column is not None:
            raise BadInput(
                f"The file {path} has no column '{column}': it is read as text. Columns are in {', '.join(READERS)} files."
            )
        read = READERS.get(path.suffix.lower(), _lines)
        return _texts(path, read(path, column))
    name, _, name_column = str(source).partition(":")
    if path.is_dir() or (HUB_NAME.fullmatch(name) and path.suffix.lower() not in SUFFIXES):
        return _texts(path, _dataset(str(path) if path.is_dir() else name, column or name_column or None, revision))
    raise BadInput(
        f"The file {source} does not exist. Name a file or folder of prompts, or a data set on the hub as OWNER/NAME:COLUMN."
    )


def _texts(source: Path, prompts: Iterable[str]) -> Iterator[str]:
    """Yield the prompts that are not empty; each must be text that can be stored."""
    with disk_errors(source, "read"):
        for prompt in filter(None, prompts):
            if re.search("[\0\ud800-\udfff]", prompt):
                raise BrokenFile(f"{source} holds a prompt with a character that is no text: {prompt[:60]!a}. Take it out.")
            yield prompt


def _lines(path: Path, column: str | None = None) -> Iterator[str]:
    """Yield each line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise BrokenFile(f"{path}, line {number}, is not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
            if text:
                yield text


def _csv(path: Path, column: str | None) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # line breaks may be part of a cell
            rows = csv.DictReader(file)
            column = _column(path, column, rows.fieldnames or ())
            for row in rows:
                yield row[column] or ""
    except csv.Error as error:
        raise BrokenFile(f"{path} is not a table in CSV ({error}). Look for a quote that is opened and never closed.") from error
    except UnicodeDecodeError as error:
        raise BrokenFile(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8.") from error


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    return _entries(path, column, (_parse(path, f"entry {number}", line) for number, line in enumerate(_lines(path), 1)))


def _json(path: Path, column: str | None) -> Iterator[str]:
    entries = _parse(path, "the file", "\n".join(_lines(path)) or "[]")
    if not isinstance(entries, list):
        raise BrokenFile(f"{path} holds no list. Write a list of prompts or of objects, or one object a line in a .jsonl file.")
    return _entries(path, column, entries)


def _parse(path: Path, place: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}, {place}, is not JSON ({error}). Write one object on each line of a .jsonl file.") from error


def _entries(path: Path, column: str | None, entries: Iterable[object]) -> Iterator[str]:
    """Yield the prompt of each entry, which is an object or the prompt itself."""
    key = None
    for number, entry in enumerate(entries, 1):
        place = f"{path}, entry {number}"
        if isinstance(entry, Mapping):
            key = key or _column(path, column, entry)
            if key not in entry:
                raise BrokenFile(f"{place}, has no '{key}'. Give all objects the same keys.")
            entry = entry[key]
        yield _prompt(entry, place)


def _prompt(value: object, place: str) -> str:
    """Return the text of an entry; an empty one for null."""
    if value is None or isinstance(value, str):
        return value or ""
    raise BrokenFile(f"{place}, holds {shown(value)} instead of a prompt. Write text, or name another column.")


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    return _rows(path, column, "parquet", data_files=str(path))


def _dataset(name: str, column: str | None, revision: str | None) -> Iterator[str]:
    return _rows(name, column, name, revision=revision)


def _rows(source: str | Path, column: str | None, kind: str, **options: str | None) -> Iterator[str]:
    """Yield a column of a data set, streamed by the package datasets."""
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(kind, split="train", streaming=True, **options)
        first = next(iter(rows), None)
        column = None if first is None else _column(source, column, rows.column_names or first)
        for number, row in enumerate(rows if column else (), 1):
            yield _prompt(row[column], f"{source}, row {number}")
    except Exception as error:  # the readers of the file formats have their own errors, some without a common base
        if isinstance(error, DifflexError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"The data set '{source}' cannot be read ({reason}). Name a folder of files in UTF-8, or OWNER/NAME on the hub."
        ) from error


def _column(source: str | Path, column: str | None, columns: Iterable[str]) -> str:
    """Return `column` if it exists; without a name, the only column or the first of the default ones."""
    names = list(columns)
    if column is not None:
        if column in names:
            return column
        raise UnknownName.among(f"In {source} the column", column, names)
    defaults = [name for name in DEFAULT_COLUMNS if name in names]
    if defaults or len(names) == 1:
        return defaults[0] if defaults else names[0]
    listed = ", ".join(str(name)[:50] for name in names[:12]) + (", ..." if len(names) > 12 else "")
    raise BadInput(f"The column of {source} that holds the prompts is not given. Its columns are: {listed or 'none'}.")


def _datasets() -> Any:
    if find_spec("datasets") is None:
        raise MissingExtra.of("datasets", "data", "reading Parquet files, folders and data sets on the hub")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    datasets.disable_progress_bars()
    return datasets


READERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
"""Files with columns."""
SUFFIXES = (".txt", *READERS)
"""Suffixes that no data set on the hub has."""


def check_prompt(prompt: str) -> str:
    """Return `prompt` if it is text."""
    if not fits(str, prompt):
        raise BadInput(f"{shown(prompt)} is not a prompt. A prompt is text without NUL and without halves of characters.")
    return prompt


@final
class PromptEncoder:
    """The text encoders of a pipeline, with a cache: each prompt is encoded once."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family, text_length: int | None) -> None:
        self._pipeline = pipeline
        self._family = family
        self._text_length = self._own_length = text_length
        self._cache: OrderedDict[str | None, dict[str, Tensor]] = OrderedDict()
        """Embeddings by prompt; those of the unconditional half under None."""
        self._bytes = 0
        self._device: torch.device | None = None
        self.encoded = 0
        """Number of prompts that went through the text encoders."""
        self.truncated = 0
        """Number of those that were longer than the text length."""

    def __call__(self, prompts: Sequence[str], guided: bool, length: int | None = None) -> dict[str, object]:
        """Return the arguments of the pipeline for `prompts`, and for as many empty prompts if `guided`."""
        if not self._family.embeds:
            return {"prompt": list(prompts)}
        self.encode(prompts, length)
        if guided and None not in self._cache:
            self._keep(None, {name: rows[0] for name, rows in self._encode([""], negative=True).items()})
        arguments: dict[str, object] = {
            name: torch.stack([self._cache[prompt][name] for prompt in prompts]) for name in self._cache[prompts[0]]
        }
        if guided:
            arguments |= {name: row.expand(len(prompts), *row.shape).contiguous() for name, row in self._cache[None].items()}
        return arguments

    def encode(self, prompts: Sequence[str], length: int | None = None) -> None:
        """Encode those of `prompts` that are not cached, and drop the oldest others if the cache is full.

        `length` is that of the text; None for the model's default.
        """
        if self._text_length != (length or self._own_length):
            self._text_length = length or self._own_length
            self._cache.clear()
            self._bytes = 0
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache] if self._family.embeds else []
        if not fresh:
            return
        self._warn_of_long(fresh)
        rows = self._encode(fresh, negative=False)
        for i, prompt in enumerate(fresh):
            # A slice would keep the whole batch alive.
            self._keep(prompt, {name: rows[name][i].clone() for name in rows})
        self.encoded += len(fresh)
        for prompt in [prompt for prompt in self._cache if prompt not in {*prompts, None}]:
            if self._bytes <= CACHE_BYTES:
                return
            self._bytes -= sum(row.nbytes for row in self._cache.pop(prompt).values())

    def batches_ahead(self, batch: int) -> int:
        """Return the number of batches to encode in one call: several if embeddings are small, one until their size is known."""
        size = next((sum(row.nbytes for row in rows.values()) for rows in self._cache.values()), AHEAD_BYTES)
        return min(8, max(1, AHEAD_BYTES // (size * batch)))

    @torch.no_grad()
    def _encode(self, prompts: list[str], negative: bool) -> dict[str, Tensor]:
        family = self._family
        # diffusers looks up the device of every module, which takes longer than a small text encoder.
        self._device = self._device or self._pipeline._execution_device
        arguments = {"prompt": prompts, "num_images_per_prompt": 1, "device": self._device, **family.encode}
        if self._text_length is not None and family.text_length is not None:
            arguments["max_sequence_length"] = self._text_length
        if family.guidance == "doubled":
            # The pipeline's own rule for the unconditional half (SDXL: zeros), which does not depend on the prompt.
            arguments["do_classifier_free_guidance"] = negative
        with quiet(type(self._pipeline).__module__, "transformers.tokenization_utils_base"):
            outputs = self._pipeline.encode_prompt(**arguments)
        named = {name: rows for name, rows in zip(family.embeds, outputs, strict=True) if name is not None and rows is not None}
        if family.guidance != "doubled":
            return {f"negative_{name}": rows for name, rows in named.items()} if negative else named
        return {name: rows for name, rows in named.items() if name.startswith("negative_") == negative}

    def _keep(self, prompt: str | None, rows: dict[str, Tensor]) -> None:
        self._cache[prompt] = rows
        self._bytes += sum(row.nbytes for row in rows.values())

    def _warn_of_long(self, prompts: list[str]) -> None:
        tokenizer = self._pipeline.components.get(self._family.tokenizer)
        if tokenizer is None:
            return
        longest = self._text_length or tokenizer.model_max_length
        # A token stands for at least one byte: most prompts need no tokenizer to be short enough.
        candidates = [prompt for prompt in prompts if len(prompt.encode()) > longest - SPECIAL_TOKENS]
        with quiet("transformers.tokenization_utils_base") if candidates else nullcontext():
            count = sum(len(ids) > longest for ids in tokenizer(candidates).input_ids) if candidates else 0
        if count and not self.truncated:
            warnings.warn(
                f"{count} of {len(prompts)} prompts are longer than the {longest} tokens that the model reads and are truncated. "
                "Further ones are counted without a warning.",
                stacklevel=3,
            )
        self.truncated += count
