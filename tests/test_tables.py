"""Text tables."""

from difflex.tables import text_table


def test_columns_are_aligned_and_lines_have_no_trailing_blanks():
    rows = [("name", "size", "text"), ("a", "1,000", ""), ("long name", "7", "b")]
    assert text_table(rows, right_align=[1]).split("\n") == ["name        size  text", "a          1,000", "long name      7  b"]
    assert text_table(rows[:2], indent="  ").split("\n") == ["  name  size   text", "  a     1,000"]
