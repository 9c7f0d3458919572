"""What the verbs that read books share: a book that still is of its dictionary."""

from collections.abc import Iterable

from difflex.dictionaries import fingerprint
from difflex.errors import BrokenFile, StaleWork, UnknownName
from difflex.features import Book
from difflex.study import DictionaryRef, Study

__all__ = ["kept_strength", "opened_book"]


def opened_book(study: Study, place: DictionaryRef) -> Book:
    """The book of a dictionary, to be read; one of a dictionary that has changed since is an error."""
    path, folder = study.book(*place), study.dictionary(*place)
    if not path.is_file():
        raise UnknownName(f"{place} has no book yet. difflex collect makes it.")
    book = Book.open(path)
    # The checksum of a large dictionary takes seconds: it is asked only of one whose files are younger than the book.
    weights = folder / "dictionary.safetensors"
    changed = weights.is_file() and weights.stat().st_mtime >= path.stat().st_mtime
    if changed and book.about.fingerprint != fingerprint(folder):
        book.close()
        raise StaleWork(f"{path} is of {place} as it was before it changed. difflex collect makes it anew.")
    return book


def kept_strength(study: Study, place: DictionaryRef, features: Iterable[int]) -> float | None:
    """The strength at which features of a dictionary are added where none is named: the least of those in its book; None where
    there is no book that says."""
    if not study.book(*place).is_file():
        return None
    try:
        with opened_book(study, place) as book:
            found = [book.feature(feature).strength for feature in features]
    except (BrokenFile, StaleWork) as error:
        print(f"{error} The strength is found without it.")
        return None
    known = [strength for strength in found if strength is not None]
    return min(known) if known and len(known) == len(found) else None
