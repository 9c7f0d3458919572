"""What the verbs that read books share: a book that still is of its dictionary."""

from difflex.book import Book
from difflex.dictionary import checksum
from difflex.errors import StaleWork, UnknownName
from difflex.study import Place, Study

__all__ = ["opened_book"]


def opened_book(study: Study, place: Place) -> Book:
    """The book of a dictionary, to be read; one of a dictionary that has changed since is an error."""
    path, folder = study.book(*place), study.dictionary(*place)
    if not path.is_file():
        raise UnknownName(f"{place} has no book yet. difflex collect makes it.")
    book = Book.open(path)
    # The checksum of a large dictionary takes seconds: it is asked only of one whose files are younger than the book.
    weights = folder / "dictionary.safetensors"
    changed = weights.is_file() and weights.stat().st_mtime >= path.stat().st_mtime
    if changed and book.about.checksum != checksum(folder):
        book.close()
        raise StaleWork(f"{path} is of {place} as it was before it changed. difflex collect makes it anew.")
    return book
