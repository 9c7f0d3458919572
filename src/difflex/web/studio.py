"""`Studio`: what the browser asks of the model, one piece of work at a time; readers take turns.

It does not import torch: the model comes from a function that is called when it is first needed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from PIL import Image

from difflex.errors import DifflexError
from difflex.records import Edit, Shot, Site
from difflex.study import DictionaryRef

MOST_WAITING = 16
"""Jobs in the queue; further ones are refused."""
SHELF_BYTES = 128 * 2**20
"""Generated images that are kept in memory."""

Event = dict[str, Any]
"""A line of an answer that is streamed: an object whose `type` says what it is."""
Report = Callable[[int, int], None]
"""Called with the denoising step and the number of steps; raises `Cancelled` when the work should stop."""


class Cancelled(Exception):
    """A job was cancelled."""


class QueueFull(DifflexError):
    """Too many jobs wait for the model."""


class TokenFeatures(NamedTuple):
    """The features that fire at each token of an image, at one step, of one dictionary."""

    ref: DictionaryRef
    step: int
    timestep: float
    grid: tuple[int, int] | None
    values: np.ndarray
    """`[token, slot]`, largest first; 0 in an empty slot."""
    features: np.ndarray
    """Their numbers."""


class ReadImage(NamedTuple):
    """An image and what fires in it."""

    image: Image.Image
    fired: Sequence[TokenFeatures]
    """By dictionary and step."""


class ImageModel(ABC):
    """A text-to-image model with the dictionaries of a study. All methods are called from one thread."""

    batch: int
    """Images that it generates at once."""

    @abstractmethod
    def shots(self, prompt: str, seeds: Sequence[int], steps: int | None) -> list[Shot]:
        """Return the shots of finished images; by default with the steps of the study."""

    @abstractmethod
    def images(self, shots: Sequence[Shot], edits: Sequence[Edit], report: Report) -> list[Image.Image]:
        """Generate images under edits."""

    @abstractmethod
    def read(self, shot: Shot, refs: Sequence[DictionaryRef], report: Report) -> ReadImage:
        """Generate an image and encode the activations of its steps with dictionaries."""

    @abstractmethod
    def record(self, shot: Shot, edits: Sequence[Edit]) -> str:
        """Return the record of an edited image, as `difflex steer --record` writes it."""


class Suggestion(NamedTuple):
    """A feature whose edit was measured to show its concept."""

    concept: str
    ref: DictionaryRef
    feature: int
    strength: float
    """In peaks."""
    gain: float
    """By how much the share of images that show the concept rose."""


class PaintChoices(NamedTuple):
    """What a study offers to paint with, besides its dictionaries."""

    suggestions: list[Suggestion]
    """Largest gain first."""
    contrasts: dict[str, Site]
    """Where each contrast direction is."""


Work = Callable[[ImageModel, Report], Iterator[Event]]
"""What to do with the model: yields an event after each part; between two parts others have their turn."""


@final
class Job:
    """A request to the model, in progress or in the queue. Its events are sent from the thread of the studio; None is the end."""

    def __init__(self, client: str, work: Work, send: Callable[[Event | None], None]) -> None:
        self.client, self.send, self._work = client, send, work
        self.is_cancelled = False
        self._parts: Iterator[Event] | None = None

    def cancel(self) -> None:
        """Stop at the next denoising step."""
        self.is_cancelled = True

    def run_part(self, model: Callable[[Job], ImageModel]) -> bool:
        """Do the next part and send its event; return whether there may be more to do."""
        try:
            if self._parts is None:
                self._parts = self._work(model(self), self._report)
            self._check()
            event = next(self._parts, None)
        except Cancelled:
            event = {"type": "cancelled"}
        except DifflexError as error:
            event = {"type": "error", "error": str(error)}
        except Exception as error:  # the thread must go on for all others
            logging.getLogger("difflex").exception("The model failed")
            event = {"type": "error", "error": f"The model failed: {type(error).__name__}: {error}"}
        else:
            if event is not None:
                self.send(event)
                return True
            event = {"type": "done"}
        self.send(event)
        self.send(None)
        return False

    def _report(self, step: int, steps: int) -> None:
        self._check()
        self.send({"type": "step", "step": step, "steps": steps})

    def _check(self) -> None:
        if self.is_cancelled:
            raise Cancelled


@final
class Studio:
    """A queue for the model of a study. A client has one job at a time: a new one cancels the old one."""

    def __init__(self, load: Callable[[], ImageModel], choices: Callable[[], PaintChoices]) -> None:
        """Work with the model that `load` returns, which is called in the thread of the studio."""
        self._load, self.choices = load, choices
        self._model: ImageModel | None = None
        self._queue: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self.shelf = Shelf()

    def submit(self, client: str, work: Work, send: Callable[[Event | None], None]) -> Job:
        """Queue work; its events are sent in the order in which they happen, None at the end."""
        job = Job(client, work, send)
        with self._changed:
            older = [other for other in (self._current, *self._queue) if other is not None and other.client == client]
            if len(self._queue) - sum(other in self._queue for other in older) >= MOST_WAITING:
                raise QueueFull(f"{MOST_WAITING} people wait for the model already. Try again in a moment.")
            for other in older:
                other.cancel()
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="studio", daemon=True)
                self._thread.start()
            self._send_places()
            self._changed.notify()
        return job

    @property
    def is_idle(self) -> bool:
        """Whether no job is running or waiting."""
        with self._changed:
            return self._current is None and not self._queue

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._is_closed = True
            for job in (self._current, *self._queue):
                if job is not None:
                    job.cancel()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._is_closed)
                if not self._queue:
                    return
                job = self._current = self._queue.popleft()
                self._send_places()
            goes_on = job.run_part(self._open)
            with self._changed:
                self._current = None
                if goes_on:
                    self._queue.append(job)

    def _open(self, job: Job) -> ImageModel:
        """Return the model, loaded for the first job."""
        if self._model is None:
            job.send({"type": "loading"})
            self._model = self._load()
        return self._model

    def _send_places(self) -> None:
        """Send those who wait how many are before them."""
        before = 0 if self._current is None else 1
        for number, job in enumerate(self._queue):
            job.send({"type": "waiting", "before": number + before})


@final
class Shelf:
    """Generated images in memory by name, the latest ones up to a number of bytes."""

    def __init__(self, most_bytes: int = SHELF_BYTES) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._unedited: dict[Shot, str] = {}
        self._lock = threading.Lock()

    def add(self, image: Image.Image, shot: Shot | None = None) -> str:
        """Keep an image, the unedited one of `shot` if that is given, and return its name."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=3)
        content = buffer.getvalue()
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.png"
        with self._lock:
            self._bytes += len(content) - len(self._files.pop(name, b""))
            self._files[name] = content
            while self._bytes > self._most_bytes and len(self._files) > 1:
                self._bytes -= len(self._files.popitem(last=False)[1])
            self._unedited = {own: file for own, file in self._unedited.items() if file in self._files}
            if shot is not None:
                self._unedited[shot] = name
        return name

    def unedited(self, shot: Shot) -> str | None:
        """Return the name of the unedited image of a shot; None if it is not kept."""
        with self._lock:
            return self._unedited.get(shot)

    def get(self, name: str) -> bytes | None:
        """Return the content of an image, a PNG file; None if it is not kept."""
        with self._lock:
            content = self._files.get(name)
            if content is not None:
                self._files.move_to_end(name)
            return content
