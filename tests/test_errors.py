"""Errors say what was asked, what was found and what to do."""

import pytest

from difflex import errors
from difflex.errors import DifflexError, MissingExtra, UnknownName


def test_the_tree_shows_every_error_class():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DifflexError)]
    tree = errors.__doc__ or ""
    assert len(classes) >= 8
    assert [error.__name__ for error in classes if error.__name__ not in tree] == []


def test_an_unknown_name_shows_its_nearest_neighbours():
    error = UnknownName.among("The site", "duble.1", ["double.1", "double.18", "single.1", "mid.0"])
    assert "'duble.1' is unknown" in str(error)
    assert str(error).index("double.1") < str(error).index("double.18")
    assert "mid.0" not in str(error)


def test_a_name_without_a_neighbour_lists_the_known_names_and_the_advice():
    error = UnknownName.among("The model", "xyzzy", ["mini-flux"], "Name a folder by its path.")
    assert str(error) == "The model 'xyzzy' is unknown; known: mini-flux. Name a folder by its path."


def test_a_long_list_of_known_names_is_cut():
    error = UnknownName.among("The word", "xyzzy", [f"q{i}" for i in range(100)])
    assert "q11, ..." in str(error)
    assert "q12" not in str(error)


def test_an_unknown_name_without_known_ones_says_so():
    assert "none are known" in str(UnknownName.among("The model", "mini", []))


def test_a_missing_extra_says_how_to_get_it():
    error = MissingExtra.of("bitsandbytes", "nf4", "Loading in 4 bits")
    assert str(error) == "Loading in 4 bits needs the package bitsandbytes: pip install 'difflex[nf4]'."


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(errors.UnknownName, LookupError), (errors.BadInput, ValueError), (errors.MissingExtra, ImportError)],
)
def test_errors_can_be_caught_as_the_builtin_they_resemble(error: type[DifflexError], builtin: type[Exception]):
    assert issubclass(error, builtin)
