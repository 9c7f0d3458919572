"""`export_html`: the read-only part of the web app as files for any static host: the same pages, with relative links."""

from __future__ import annotations

import asyncio
import html
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, final
from urllib.parse import unquote, urlsplit

import numpy as np
from fastapi import FastAPI
from starlette.types import Message, Scope

from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.explore.search import search, vocabulary
from difflex.features import ImageAlbum
from difflex.files import disk_errors, folder_lock, read_json, write_json
from difflex.progress import ProgressBar
from difflex.study import DictionaryRef, Study
from difflex.web.browse import add_browsing
from difflex.web.catalogue import MOST_TILES, SORTS, Catalogue
from difflex.web.pages import HERE, Pages, place

FORMAT, MARK = 1, "difflex-export.json"
"""The file that says that a folder is such an export, and may be replaced by a newer one."""
WORDS, HITS = 2000, 120
"""Most words that can be searched for, and most features that one of them finds."""
ADDRESS = re.compile(r'\b(href|src|action|value|data-place)="(/[^"]*)"')
IMPORT = re.compile(r'(?:from|import\()\s*"(?:/static|\.)/([\w-]+\.js)"')
DIGITS = 6


class ExportedDictionary(NamedTuple):
    """A dictionary and what is exported of it."""

    ref: DictionaryRef
    place: str
    """Its folder in the export."""
    features: list[int]
    size: int
    """How many features it has."""


class ExportSummary(NamedTuple):
    """What was exported."""

    dictionaries: list[ExportedDictionary]
    images: int
    missing: int
    """Images that are missing or damaged in the study."""
    size: int
    """Bytes of all files."""


def export_html(study: Study, out: Path, refs: Sequence[DictionaryRef], most: int, *, progress: bool = True) -> ExportSummary:
    """Write walls, feature pages, images and the search of some dictionaries to the folder `out`.

    Of a dictionary with more than `most` features the best are taken: by average precision, then by the score of their
    explanations, then by density. The folder appears when all is there; it replaces an older export, and nothing else.
    """
    out = out.absolute()
    _check_out(out)
    partial_folder = out.with_name(f".{out.name}.partial")
    with folder_lock(partial_folder):
        with disk_errors(partial_folder):
            for path in partial_folder.iterdir():  # what a killed process left
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        summary = _Export(study, partial_folder, refs, most).write(progress)
        former = out.with_name(f".{out.name}.former")
        with disk_errors(out):
            shutil.rmtree(former, ignore_errors=True)
            if out.exists():
                out.rename(former)
            partial_folder.rename(out)
            shutil.rmtree(former, ignore_errors=True)
    return summary


def _check_out(out: Path) -> None:
    """Refuse a folder that holds anything else than an export."""
    with disk_errors(out, "read"):
        if out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file()):
            if (out / MARK).is_file():
                read_json(out / MARK, FORMAT, "Name another folder.")
            return
        if out.exists() or out.is_symlink():
            raise BadInput(f"{out} exists and is no export of difflex: it is left as it is. Name another folder with --out.")


@final
class _Export:
    """Writes an export into an empty folder."""

    def __init__(self, study: Study, folder: Path, refs: Sequence[DictionaryRef], most: int) -> None:
        self.study, self.folder, self.catalogue = study, folder, Catalogue(study)
        self.dictionaries = list(_chosen(self.catalogue, refs, most))
        self._exported = {
            place(str(entry.ref.site), entry.ref.label): (entry.place, set(entry.features)) for entry in self.dictionaries
        }
        self._images: set[str] = set()
        self._scripts: set[str] = set()
        self.app = FastAPI()
        add_browsing(self.app, self.catalogue, Pages(study, can_paint=False, is_static=True))

    def write(self, progress: bool) -> ExportSummary:
        """Write all files."""
        entries = [{"place": entry.place, "name": str(entry.ref)} for entry in self.dictionaries]
        self._write_json("dictionaries.json", entries)
        pages = sum(len(entry.features) for entry in self.dictionaries)
        words = {entry.ref: _words(self.catalogue, entry, progress) for entry in self.dictionaries}
        with ProgressBar(total=pages, desc="export", unit=" pages", show=progress) as bar, _event_loop() as loop:
            render = partial(_page, self.app, loop)
            self._write_page("search.html", render("/search"))
            for entry in self.dictionaries:
                self._write_dictionary(entry, render, bar)
                self._write_json(f"{entry.place}/words.json", words[entry.ref])
            front = self.catalogue.front()
            [first] = [e for e in self.dictionaries if e.ref == front] or self.dictionaries[:1]
            self._write_page("index.html", render(place(str(first.ref.site), first.ref.label)))
        self._write_static()
        missing = self._write_images()
        names = [str(entry.ref) for entry in self.dictionaries]
        write_json(self.folder / MARK, FORMAT, {"model": self.study.model, "dictionaries": names})
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return ExportSummary(self.dictionaries, len(self._images) - missing, missing, size)

    def _write_dictionary(self, entry: ExportedDictionary, render: Callable[[str], str], bar: ProgressBar) -> None:
        address = place(str(entry.ref.site), entry.ref.label)
        self._write_page(f"{entry.place}/index.html", render(address))
        columns = {name: _rounded(self.catalogue.columns(entry.ref)[name][entry.features]) for name in SORTS}
        best, names = self.catalogue.best_concepts(entry.ref), self.catalogue.concepts(entry.ref)
        numbers = {name: number for number, name in enumerate(names)}
        concept = [numbers[best[feature].concept] if feature in best else -1 for feature in entry.features]
        content = {"size": entry.size, "grid": self.catalogue.grid(entry.ref), "columns": columns}
        self._write_json(f"{entry.place}/columns.json", {**content, "concepts": names, "concept": concept})
        for number, first in enumerate(range(0, len(entry.features), MOST_TILES)):
            tiles = self.catalogue.tiles(entry.ref, entry.features[first : first + MOST_TILES])
            self._images |= {tile.image for tile in tiles if tile.image}
            self._write_json(f"{entry.place}/tiles-{number}.json", [tile.model_dump(mode="json") for tile in tiles])
        for feature in entry.features:
            self._write_page(f"{entry.place}/{feature}.html", render(f"{address}/{feature}"))
            bar.update()

    def _write_page(self, file: str, page: str) -> None:
        """Write a page with relative links; what has no place in the export loses its address."""
        up = "../" * file.count("/")

        def relative(match: re.Match[str]) -> str:
            target = self._target(html.unescape(match[2]), match[1])
            return "" if target is None else f'{match[1]}="{html.escape(up + target)}"'

        self._write(file, ADDRESS.sub(relative, page))

    def _target(self, address: str, attribute: str) -> str | None:
        """Return where an address of the app is in the export; None for one that is not in it."""
        parts = urlsplit(address)
        if parts.path in ("/", "/search"):
            return {"/": "index.html", "/search": "search.html"}[parts.path]
        if match := re.fullmatch(r"/(static|images)/([\w.-]+)", parts.path):
            (self._scripts if match[1] == "static" else self._images).add(match[2])
            return f"{match[1]}/{match[2]}"
        if parts.path in self._exported:
            folder, _ = self._exported[parts.path]
            return folder if attribute == "data-place" else f"{folder}/index.html" + (f"?{parts.query}" if parts.query else "")
        wall, _, feature = parts.path.rpartition("/")
        folder, features = self._exported.get(wall, ("", set()))
        return f"{folder}/{feature}.html" if feature.isdigit() and int(feature) in features else None

    def _write_static(self) -> None:
        """Write the scripts that the pages need, and those that these import."""
        waiting, done = {*self._scripts, "exported.js"}, set[str]()
        while waiting:
            name = waiting.pop()
            done.add(name)
            text = (HERE / "static" / name).read_text(encoding="utf-8")
            if name.endswith(".js"):
                waiting |= set(IMPORT.findall(text)) - done
                text = text.replace('"/static/', '"./')
            self._write(f"static/{name}", text)

    def _write_images(self) -> int:
        """Copy the images that the pages show, and return how many are missing or damaged."""
        album, missing = ImageAlbum(self.study.images), 0
        (self.folder / "images").mkdir()
        for file in sorted(self._images):
            try:
                content = album.read(file)
            except BrokenFile:
                missing += 1
                continue
            with disk_errors(self.folder):
                (self.folder / "images" / file).write_bytes(content)
        return missing

    def _write_json(self, file: str, content: object) -> None:
        self._write(file, json.dumps(content, separators=(",", ":"), allow_nan=False))

    def _write(self, file: str, text: str) -> None:
        path = self.folder / file
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _chosen(catalogue: Catalogue, refs: Sequence[DictionaryRef], most: int) -> Iterator[ExportedDictionary]:
    """Yield dictionaries with their best features, by number, and a folder for each."""
    taken = set[str]()
    for ref in refs:
        columns = catalogue.columns(ref)
        keys = [-np.nan_to_num(columns[name], nan=-1.0) for name in ("density", "score", "ap")]
        best = np.sort(np.lexsort(keys)[:most])  # by the last key first
        folder = name = f"d/{_plain(str(ref.site))}/{_plain(ref.label)}"
        number = 1
        while folder in taken:
            number += 1
            folder = f"{name}-{number}"
        taken.add(folder)
        yield ExportedDictionary(ref, folder, best.tolist(), len(columns["density"]))


def _plain(name: str) -> str:
    """Return a name that any file system and host takes."""
    return re.sub(r"[^\w.-]|^\.", "-", name)


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _words(catalogue: Catalogue, entry: ExportedDictionary, progress: bool) -> Mapping[str, list[tuple[int, float, str]]]:
    """Return what the search finds for each concept and the most frequent words: positions, scores and reasons, best first."""
    positions, found = {feature: position for position, feature in enumerate(entry.features)}, {}
    texts = vocabulary(catalogue.study, entry.ref, WORDS)
    for words, text in ProgressBar(texts.items(), desc=f"search in {entry.ref}", unit=" words", show=progress):
        try:
            hits = search(catalogue.study, text, entry.ref, len(positions))
        except UnknownName:
            continue
        rows = [(positions[hit.feature], round(hit.score, DIGITS), hit.reason) for hit in hits if hit.feature in positions]
        if rows:
            found[words] = rows[:HITS]
    return found


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own: that of the caller may have one, as in a notebook."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _page(app: FastAPI, loop: asyncio.AbstractEventLoop, address: str) -> str:
    """Return the page that the app has at an address."""
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        messages.append(message)

    scope: Scope = {"type": "http", "method": "GET", "path": unquote(address), "query_string": b"", "headers": []}
    scope |= {"root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}
    asyncio.run_coroutine_threadsafe(app(scope, receive, send), loop).result()
    assert messages[0]["status"] == 200, (address, messages)
    return b"".join(message.get("body", b"") for message in messages).decode()
