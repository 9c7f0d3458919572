"""Change a book as no command does, so that its checksums hold."""

import sqlite3
from contextlib import closing
from pathlib import Path

from difflex.features import tables


def change_book(path: Path, statement: str, *values: object) -> None:
    """Execute an SQL statement in the book at `path` and seal it again."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)
        entries = tables._about(path, connection)
        del entries["checksum"]
        pages = entries["content"][0]
        connection.execute("BEGIN")
        tables.seal(connection, {**entries, "content": [pages, tables._content(path, connection, pages)]})
        connection.execute("COMMIT")
