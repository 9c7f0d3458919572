"""Dictionaries in the file formats of other tools: read, written and recognised."""

from difflex.interchange.formats import (
    FORMATS,
    ExportResult,
    compare_reconstructions,
    detect_format,
    read_code_statistics,
    read_dictionary,
    write_dictionary,
)

__all__ = [
    "FORMATS",
    "ExportResult",
    "compare_reconstructions",
    "detect_format",
    "read_code_statistics",
    "read_dictionary",
    "write_dictionary",
]
