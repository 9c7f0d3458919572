"""Store activations from files: of an export, which says what they are of, or of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from difflex.activation_files.exporting import FORMAT, INDEX, SHOTS
from difflex.activation_files.rows import ADVICE, READERS, RowReader, open_rows
from difflex.choices import StoredDtype
from difflex.errors import BadInput, BrokenFile
from difflex.files import file_sha256, parsing, read_json
from difflex.records import Activations, Shot, Site
from difflex.store import RecordingConfig, Store, record

READ_SHOTS = 16
"""Shots that are read at once."""
STORED: dict[torch.dtype, StoredDtype] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What files of other tools do not say of their rows."""

    site: Site | None = None
    """Where the activations are read; None for that of the index."""
    model: str | None = None
    revision: str | None = None
    key: str | None = None
    """The tensor or column; None for the only one that can be meant."""
    tokens: int = 1
    """Rows of an image, where the arrays have no axis for it."""
    dtype: StoredDtype | None = None
    """How the rows are stored; None for that of the files, or bf16."""


class FileIndex(NamedTuple):
    """What the index of an export says."""

    site: Site
    dtype: StoredDtype
    width: int
    tokens: int
    grid: tuple[int, int] | None
    files: dict[str, str]
    """The checksums of the files by name, in the order of the rows."""
    shots: tuple[Shot, ...]


def import_activations(source: Path, folder: Path, options: ImportOptions, begin: Callable[[str, str | None], None]) -> Store:
    """Store the activations in `source`, a folder or a file, in a folder for its site under `folder`, and return the store.

    `begin` is called with the model and its revision before anything is written. An import that was stopped continues.
    """
    index = _read_index(source / INDEX) if (source / INDEX).is_file() else None
    paths = [source / name for name in index.files] if index else _find_files(source)
    reader = open_rows(paths, options.key or ("values" if index else None))
    if index is not None:
        _check_index(source, index, options, reader)
        site, shots, grid, tokens = index.site, index.shots, index.grid, index.tokens
    else:
        site, shots, grid = options.site, _shots_of_rows(paths, reader, options), None
        tokens = reader.tokens or options.tokens
    assert site is not None, "_shots_of_rows checks it"
    numbers = {shot: number for number, shot in enumerate(shots)}
    if len(numbers) != len(shots):
        raise BrokenFile(f"{source / SHOTS} lists a shot twice. {ADVICE}")
    dtype = options.dtype or (index.dtype if index else STORED.get(reader.dtype, "bf16"))
    digest = file_sha256(source / INDEX) if index else f"{len(reader)} rows of width {reader.width}"
    config = RecordingConfig(dtype=dtype, source=f"imported from {paths[0].suffix[1:]} files: {digest}")

    def harvest(wanted: Sequence[Shot], sites: Sequence[Site], batch: int) -> Iterator[Activations]:
        for first in range(0, len(wanted), READ_SHOTS):
            part = tuple(wanted[first : first + READ_SHOTS])
            values = torch.stack([reader.rows(numbers[shot] * tokens, tokens) for shot in part])
            yield Activations(site=site, values=values, shots=part, grid=grid)

    [store] = record(folder, shots, site, harvest, config, before_writing=partial(begin, shots[0].model, shots[0].revision))
    return store


def _find_files(source: Path) -> list[Path]:
    """Return the files of a format in a folder, sorted by name, or the file itself."""
    if not source.is_dir() and source.exists() and source.suffix in READERS:
        return [source]
    names = sorted(source.iterdir()) if source.is_dir() else []
    by_suffix = {suffix: [path for path in names if path.suffix == suffix] for suffix in READERS}
    kinds = [suffix for suffix, paths in by_suffix.items() if paths]
    if len(kinds) != 1:
        found = f"files of {len(kinds)} formats" if kinds else "none"
        raise BadInput(f"{source} must be, or hold, files that end in one of {', '.join(READERS)}; it holds {found}.")
    return by_suffix[kinds[0]]


def _shots_of_rows(paths: Sequence[Path], reader: RowReader, options: ImportOptions) -> tuple[Shot, ...]:
    """Return a shot for each image of files that do not tell them; a tenth of the images is held out."""
    if options.site is None or options.model is None:
        raise BadInput("The files do not say of which model and site they are. Name them with --model and --site.")
    tokens = reader.tokens or options.tokens
    if len(reader) % tokens:
        raise BadInput(f"{len(reader):,} rows are not images of {tokens} tokens each. Give another --tokens-per-image.")
    shot = Shot(model=options.model, revision=options.revision, pixels=(1, 1), steps=1, guidance=0.0)
    names = (f"{paths[0].parent.name}#{number}" for number in range(len(reader) // tokens))
    return tuple(replace(shot, image=name, split=Shot.split_of(name)) for name in names)


def _read_index(path: Path) -> FileIndex:
    """Read the index of an export and its list of shots."""
    entries = read_json(path, FORMAT, ADVICE)
    with parsing(path, "an index of activations", ADVICE):
        files = {str(name): str(checksum) for name, checksum in entries["files"].items()}
        if outside := [name for name in files if Path(name).name != name or Path(name).suffix not in READERS]:
            raise BrokenFile(f"{path} lists the file {outside[0]!r}, which is not in its folder. Do not use it.")
        site = Site.parse(entries["site"])
        shots = path.with_name(SHOTS)
        if not shots.is_file() or file_sha256(shots) != entries["shots"]:
            raise BrokenFile(f"{shots} is missing or does not match its checksum: it is damaged. {ADVICE}")
        lines = [json.loads(line) for line in shots.read_text("utf-8").splitlines()]
        grid, tokens = entries["grid"], int(entries["tokens"])
        rows_columns = None if grid is None else (int(grid[0]), int(grid[1]))
        impossible = rows_columns is not None and (min(rows_columns) < 1 or rows_columns[0] * rows_columns[1] != tokens)
        if not files or not lines or tokens < 1 or entries["dtype"] not in get_args(StoredDtype) or impossible:
            raise BrokenFile(f"{path} lists no files or shots, or names a dtype, tokens or a grid that cannot be. {ADVICE}")
        return FileIndex(
            site=site,
            dtype=entries["dtype"],
            width=int(entries["width"]),
            tokens=tokens,
            grid=rows_columns,
            files=files,
            shots=tuple(Shot(**{**line, "pixels": tuple(line["pixels"])}) for line in lines),
        )


def _check_index(source: Path, index: FileIndex, options: ImportOptions, reader: RowReader) -> None:
    """Compare the files of an export with its index, and the index with the arguments."""
    for what, given, found in (("site", options.site, index.site), ("model", options.model, index.shots[0].model)):
        if given not in (None, found):
            raise BadInput(f"The activations in {source} are of the {what} {found}, not {given}. Leave --{what} out.")
    if (len(reader), reader.width) != (len(index.shots) * index.tokens, index.width):
        raise BrokenFile(f"The files in {source} have other rows than the index says. {ADVICE}")
    for name, checksum in index.files.items():
        if file_sha256(source / name) != checksum:
            raise BrokenFile(f"{source / name} does not match its checksum: it is damaged. {ADVICE}")
