"""What is wrong with a recipe, in words: the place, what was found there, and the mend."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe or with what was asked on the command line."""

    place: str
    """Dotted path in the recipe, or the argument as it was typed."""
    found: str
    mend: str

    def __str__(self) -> str:
        return f"{self.place}: {self.found}; {self.mend}"


class RecipeError(ValueError):
    """A recipe that cannot be run; nothing was started. Holds every mistake, not just the first."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(map(str, self.mistakes)))


def suggest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, else all of them, as the end of a sentence."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of: {', '.join(options)}" if options else "there is nothing to choose from"
