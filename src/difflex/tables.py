"""Text tables for the terminal."""

from collections.abc import Collection, Sequence

__all__ = ["text_table"]


def text_table(rows: Sequence[Sequence[str]], right_align: Collection[int] = (), indent: str = "") -> str:
    """Return `rows` of cells, the first with the names of the columns, as lines of aligned columns.

    `right_align`: the numbers of the columns to align to the right; all others are aligned to the left.
    """
    columns: list[list[str]] = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        align, width = (str.rjust if number in right_align else str.ljust), max(map(len, cells))
        columns.append([align(cell, width) for cell in cells])
    return "\n".join(f"{indent}{'  '.join(line)}".rstrip() for line in zip(*columns, strict=True))
