"""What is paid for stays: explanations survive a new book, damage is found and never deleted, a kill loses nothing."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from changed_book import change_book
from test_book import ABOUT, EXAMPLES, IMAGES, SHOTS, stats, write_book

from difflex.errors import BadInput, BrokenFile, OutOfSpace, StaleWork
from difflex.features import Book, BookInfo, BookWriter
from difflex.features.explanations import Explanation, ExplanationScore, Judgement, RecordedUsage
from difflex.features.writing import move_aside

OTHER = replace(ABOUT, fingerprint="1a2b3c4d5e")
EXPLANATION = Explanation(feature=0, backend="rule", protocol="heldout", text="stars", descriptions=("one star",))
SCORES = [ExplanationScore("accuracy", 0.9, 0.8, 1.0, 10)]
USAGE = RecordedUsage(backend="rule", role="judge", tokens_in=5, cost=0)


def explain(path: Path, text: str = "stars") -> None:
    """Add an explanation with a judgement of every example."""
    with Book.edit(path) as book:
        judgements = [Judgement(number, number != 2, 0.5) for number in (1, 2, 3)]
        book.add_explanation(replace(EXPLANATION, text=text), judgements, SCORES, [USAGE])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A book with an explanation."""
    path = write_book(tmp_path / "books" / "book.sqlite")
    explain(path)
    return path


def others(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other != path)


def explanation_texts(path: Path) -> list[str]:
    with Book.open(path) as book:
        book.verify()
        return [explanation.text for explanation in book.explanations()]


def test_explanations_are_carried_over_to_the_examples_that_stay(path: Path):
    with BookWriter.open(path, ABOUT) as writer:
        writer.add_images(IMAGES)
        writer.add_shots((number + 7, number, shot) for number, shot in enumerate(SHOTS))
        writer.add_features([stats(0, 0.25, 4.0), stats(1, 0.5, 0.5), stats(2, 0.0, 0.0)])
        writer.add_examples(replace(example, shot=example.shot + 7) for example in EXAMPLES[:0:-1])
    with Book.open(path) as book:
        book.verify()
        [entry] = book.explanations()
        assert entry == replace(EXPLANATION, id=entry.id) and book.scores(entry.id) == SCORES
        judgements = book.judgements(entry.id)
        assert [(judgement.fires, judgement.score) for judgement in judgements] == [(True, 0.5), (False, 0.5), (True, 0.5)]
        assert [judgement.example for judgement in judgements] == [None, 2, 1]
        assert [*book.usage()] == [replace(USAGE, explanation=entry.id)]
    assert others(path) == []


def test_explanations_of_other_weights_are_moved_to_a_name_of_their_own(path: Path):
    lines: list[str] = []
    for about in (OTHER, ABOUT, OTHER):
        with BookWriter.open(path, about, lines.append):
            pass
        explain_nothing = about is ABOUT
        assert explanation_texts(path) == [], explain_nothing
    assert others(path) == ["book.former-abc-1.sqlite"], "a book without explanations is replaced"
    assert explanation_texts(path.with_name("book.former-abc-1.sqlite")) == ["stars"]
    assert len(lines) == 1 and "holds explanations of other weights" in lines[0] and "book.former-abc-1.sqlite" in lines[0]


def test_discarded_explanations_are_gone(path: Path):
    with Book.edit(path) as book:
        assert book.discard_explanations() == 1
        assert book.explanations() == [*book.usage()] == []
        book.verify()


def test_a_book_of_a_newer_format_is_never_replaced(path: Path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 5")
    before = path.read_bytes()
    with pytest.raises(BadInput, match="is of format 5"):
        write_book(path)
    assert path.read_bytes() == before and others(path) == []


def test_damaged_and_older_books_are_moved_aside(path: Path):
    lines: list[str] = []
    for content in (b"first", b"second"):
        path.write_bytes(content)
        with BookWriter.open(path, ABOUT, lines.append):
            pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with BookWriter.open(path, ABOUT, lines.append):
        pass
    assert len(lines) == 3 and "is damaged" in lines[0] and "is of format 3" in lines[2]
    damaged = [path.with_name(f"book.damaged-{number}.sqlite") for number in (1, 2)]
    assert [file.read_bytes() for file in damaged] == [b"first", b"second"]
    assert others(path) == ["book.damaged-1.sqlite", "book.damaged-2.sqlite", "book.older-1.sqlite"]


def test_a_book_is_moved_with_its_log(path: Path):
    log = Path(f"{path}-wal")
    log.write_bytes(b"log")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rename = os.replace

        def stopping(source: Path, target: Path) -> None:
            if source == path:
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr(os, "replace", stopping)
        move_aside(path, "damaged")
    assert not log.exists() and path.exists()
    aside = move_aside(path, "damaged")
    assert others(path) == ["book.damaged-1.sqlite", "book.damaged-1.sqlite-wal"], "log and book are together again"
    assert explanation_texts(aside) == ["stars"]


def contents(path: Path) -> list[object]:
    """Return everything that a book says, after it is verified."""
    with Book.open(path) as book:
        book.verify()
        numbers = [explanation.id for explanation in book.explanations()]
        parts = [[*book.examples(n), *book.explanations(n), *book.neighbours(n), book.patch(n)] for n in range(3)]
        explained = [[*book.judgements(n), *book.scores(n)] for n in numbers]
        return [book.about, book.features(), book.images(), book.shots([0, 1]), *parts, *explained, [*book.usage()]]


def test_every_flipped_bit_is_found(path: Path):
    content, before, noticed = path.read_bytes(), contents(path), 0
    places = range(0, len(content), 311)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (zlib.crc32(b"%d" % place) % 8)
        path.write_bytes(damaged)
        try:
            assert contents(path) == before, "only unused bytes in the pages of explanations may change"
        except (BrokenFile, StaleWork, BadInput):
            noticed += 1
    assert noticed > len(places) // 2


def test_a_truncated_book_is_found(path: Path):
    content = path.read_bytes()
    for size in (0, 50, 1024, 4096, len(content) - 4096, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(BrokenFile), Book.open(path) as book:
            book.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE features SET peak = 5.0 WHERE feature = 0",
        "UPDATE about SET value = '9' WHERE name = 'size'",
        "UPDATE explanations SET text = 'moons'",
        "UPDATE judgements SET score = 1.0 WHERE id = 1",
        "DELETE FROM scores",
        "UPDATE usage SET cost = 7.0",
        "UPDATE judgements SET example = 99",
    ],
)
def test_changes_by_another_program_are_found(path: Path, statement: str):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)
    with pytest.raises(BrokenFile, match=r"checksum|damaged"), Book.open(path) as book:
        book.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE about SET value = '\"many\"' WHERE name = 'size'",
        "UPDATE about SET value = '[1]' WHERE name = 'grid'",
        "UPDATE about SET name = 'sizes' WHERE name = 'size'",
        "UPDATE about SET value = '{' WHERE name = 'shots'",
        "UPDATE features SET histogram = '[\"a\"]'",
        "UPDATE features SET histogram = '{}', activity = '7'",
        "UPDATE features SET activity = 'x'",
        "UPDATE shots SET shot = '[]'",
        f"UPDATE shots SET shot = '{'[' * 100_000}'",
        "UPDATE shots SET shot = '{\"model\": 3}'",
        "UPDATE examples SET map = x'010203'",
        "UPDATE explanations SET descriptions = 'x'",
    ],
)
def test_odd_fields_are_explained_in_a_sentence(path: Path, statement: str):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)
    with pytest.raises(BrokenFile, match="Run difflex collect"), Book.open(path) as book:
        assert (book.features(), book.shots([0, 1]), book.examples(0), book.explanations()) is None


def test_a_book_that_was_changed_and_sealed_is_whole(path: Path):
    change_book(path, "UPDATE features SET peak = 5.0 WHERE feature = 0")
    with Book.open(path) as book:
        book.verify("abc")
        assert book.feature(0).peak == 5.0
        with pytest.raises(StaleWork, match="has changed since"):
            book.verify("def")


def test_explanations_that_grow_beyond_a_page_keep_the_checksum(path: Path):
    with Book.edit(path) as book:
        for number in range(14):
            book.add_explanation(replace(EXPLANATION, protocol=str(number % 10), text="stars " * 900))
        book.verify()
    write_book(path)
    assert len(explanation_texts(path)) == 11


def test_a_writer_notices_that_its_book_was_replaced(path: Path):
    with Book.edit(path) as book:
        write_book(path)
        with pytest.raises(BadInput, match="was replaced by another process"):
            book.add_explanation(EXPLANATION)
    assert explanation_texts(path) == ["stars"]


def test_a_book_is_not_replaced_while_another_process_writes_in_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.features.writing.REPLACE_TIMEOUT", 0.05)
    with Book.edit(path) as writer:
        writer._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(BadInput, match="Another process is writing"):
            write_book(path)
        writer._connection.execute("ROLLBACK")
    assert others(path) == []


def test_a_full_disk_leaves_the_older_book(path: Path):
    with pytest.raises(OutOfSpace), BookWriter.open(path, ABOUT) as writer:
        writer._connection.execute("PRAGMA max_page_count = 1")
        writer.add_images([IMAGES[0]._replace(id=number, file=f"{number:0200d}") for number in range(100)])
    assert explanation_texts(path) == ["stars"] and others(path) == []


def write_and_die(path: Path, about: BookInfo, at: int, after: bool) -> None:
    """Write a book in a process that is killed at its rename number `at`, before or after it."""
    rename, renames = os.replace, [0]

    def dying(source: Path, target: Path) -> None:
        renames[0] += 1
        if renames[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if renames[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    write_book(path, about)


@pytest.mark.parametrize(("about", "renames"), [(ABOUT, 1), (OTHER, 2)], ids=["same weights", "other weights"])
def test_a_kill_at_a_rename_loses_no_explanation(path: Path, about: BookInfo, renames: int, monkeypatch: pytest.MonkeyPatch):
    whole = shutil.copytree(path.parent, path.parent.with_name("whole"))
    for at in range(1, renames + 1):
        for after in (False, True):
            shutil.rmtree(path.parent)
            shutil.copytree(whole, path.parent)
            process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path, about, at, after))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            monkeypatch.setattr("difflex.files._swept", set())  # as in a new process
            write_book(path, about)
            kept = path if about is ABOUT else path.with_name("book.former-abc-1.sqlite")
            assert explanation_texts(kept) == ["stars"]
            assert others(path) == ([] if about is ABOUT else [kept.name]), "the leftover of the killed process is deleted"
