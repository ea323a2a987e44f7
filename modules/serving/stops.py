"""The texts that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopText:
    """Hands text on until one of some texts comes, which is not handed on; what may be the beginning of one is held back.

    Args:
        stops: the texts.
        write: gets each piece.

    Attributes:
        found: one has come.
    """

    def __init__(self, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self.stops, self.write = stops, write
        self.held, self.found = "", False

    def put(self, text: str) -> None:
        """Take the next piece."""
        if self.found:
            return
        text = self.held + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.found = bool(places)
        ready = min(places) if places else len(text) - self._beginning(text)
        self.held = "" if self.found else text[ready:]
        if ready:
            self.write(text[:ready])

    def end(self) -> None:
        """Hand on what was held back."""
        held, self.held = self.held, ""
        if held:
            self.write(held)

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` with which one of the texts begins."""
        longest = max(map(len, self.stops), default=1) - 1
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0
        )
