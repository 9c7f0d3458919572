"""Words of strangers, made harmless: a model's answer is data, and may hold anything."""

import re
import unicodedata

__all__ = ["cleaned"]

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
"""What a terminal would obey: colours, cursor moves, titles, links."""
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn"}
"""Unicode categories that show nothing: control, formatting such as reversed writing, halves of pairs, nobody's."""


def cleaned(text: str, limit: int) -> str:
    """`text` as one line of at most `limit` characters, without terminal escapes and characters that cannot be seen.

    What looks like HTML stays as it is: whoever shows it on a page escapes it there.
    """
    plain = ESCAPES.sub("", text[: 8 * limit])
    spaced = " ".join("".join(_visible(letter) for letter in unicodedata.normalize("NFC", plain)).split())
    return spaced if len(spaced) <= limit else spaced[: limit - 1].rstrip() + "…"


def _visible(letter: str) -> str:
    if letter.isspace():
        return " "
    return "" if unicodedata.category(letter) in UNSEEN else letter
