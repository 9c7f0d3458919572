"""Hide messages and progress bars of diffusers and transformers that a user of difflex does not need."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hide_progress_bars", "quiet"]


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Show only errors of the named loggers and their children."""
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    try:
        for logger in named:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    enabled = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    try:
        for library in enabled:
            library.disable_progress_bar()
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()


# diffusers imports bitsandbytes if it is installed, which warns that a kernel for some CPUs cannot be fetched.
with quiet("bitsandbytes"):
    import diffusers.quantizers  # noqa: F401
