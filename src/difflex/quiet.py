"""Silence for what diffusers and transformers say that a user of difflex is told otherwise, or need not be told."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["muted", "quiet", "without_bars"]


@contextmanager
def muted(*loggers: str) -> Iterator[None]:
    """The named loggers, but not those below them, say errors only; quicker than `quiet`, which empties logging's caches."""
    found = [logging.getLogger(name) for name in loggers]
    try:
        for logger in found:
            logger.addFilter(_is_error)
        yield
    finally:
        for logger in found:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """The named loggers and those below them say errors only."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """diffusers and transformers draw no progress bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    drawing = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    try:
        for library in drawing:
            library.disable_progress_bar()
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()


# Where bitsandbytes is installed diffusers imports it, and it regrets aloud that a kernel for some CPUs cannot be fetched.
with quiet("bitsandbytes"):
    import diffusers.quantizers  # noqa: F401
