"""From tokens to text that never has to be taken back."""

from collections.abc import Callable, Sequence

# A character of UTF-8 has four bytes, so three can wait for the last one.
_MOST_UNSETTLED = 3
# Tokens that are decoded once more with the next ones: enough that what a
# decoder does at the start of a text (drop a space) is behind them.
_CONTEXT = 16


class TextStream:
  """Turns a stream of tokens into text that never has to be taken back.

  A character may be spread over several tokens: what could still change is
  held back until it is settled. Joined, the pieces are the tokenizer's text of
  all tokens; each costs the same time, however long the text already is.

  Args:
    decode: Text of token ids, with U+FFFD for bytes that are not UTF-8.
  """

  def __init__(self, decode: Callable[[list[int]], str]) -> None:
    self._decode = decode
    # The newest tokens, beginning with a whole character.
    self._tokens: list[int] = []
    self._shown = 0  # Characters of them.
    self._whole = 0  # So many of them ended with a whole character.
    self._context = 0  # Likewise: the part that is dropped next.

  def push(self, token: int) -> str:
    """The text that is settled now that `token` has come."""
    self._tokens.append(token)
    text = self._decode(self._tokens)
    # The beginning of a character reads as U+FFFD at the end: one, or one for
    # each byte, or even one for each byte of the characters before it.
    broken = len(text) - len(text.rstrip("\ufffd"))
    if not broken:
      piece = self._take(text, len(text))
      self._whole = len(self._tokens)
      self._forget()
      return piece
    if len(self._tokens) <= self._whole + _MOST_UNSETTLED:
      return ""
    return self._take(text, len(text) - min(broken, _MOST_UNSETTLED))

  def _forget(self) -> None:
    """Drops tokens that the next ones do not need."""
    if self._whole >= self._context + _CONTEXT:
      del self._tokens[: self._context]
      self._context = self._whole = len(self._tokens)
      self._shown = len(self._decode(self._tokens))

  def flush(self) -> str:
    """What was held back, when no token follows."""
    text = self._decode(self._tokens)
    return self._take(text, len(text))

  def _take(self, text: str, settled: int) -> str:
    piece = text[self._shown : settled]
    self._shown = max(self._shown, settled)
    return piece


class StopStrings:
  """Ends a stream of text before the first stop string.

  Which stop string is first, and hence the text, does not depend on how the
  text is cut into pieces: the one that is complete first, and among those the
  longest. Text that could be the beginning of a stop string is held back.

  Args:
    stops: Strings of at least one character each.

  Attributes:
    found: Whether a stop string has come; no text follows then.
  """

  def __init__(self, stops: Sequence[str]) -> None:
    self._stops = tuple(stops)
    self._held = ""
    self.found = False

  def push(self, piece: str) -> str:
    """The text that is surely before any stop string."""
    if self.found or not self._stops:
      return "" if self.found else piece
    text = self._held + piece
    ends = [
      (start + len(stop), start)
      for stop in self._stops
      if (start := text.find(stop)) >= 0
    ]
    if ends:
      self.found = True
      self._held = ""
      return text[: min(ends)[1]]
    settled = next(
      start
      for start in range(max(0, len(text) - self._longest), len(text) + 1)
      if any(stop.startswith(text[start:]) for stop in self._stops)
    )
    self._held = text[settled:]
    return text[:settled]

  def flush(self) -> str:
    """What was held back, when no text follows."""
    held, self._held = self._held, ""
    return held

  @property
  def _longest(self) -> int:
    return max(map(len, self._stops))
