"""What a policy of cache budgets is: the contract of every file beside it."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class CacheShape(NamedTuple):
  """Who owns keys and values: R layers of K heads."""

  num_layers: int
  num_kv_heads: int


class Plan(NamedTuple):
  """What the host knows of a prompt's cache before the prompt is read.

  A row slot holds the tokens of one KV head. Slots of a layer are sorted: the
  head that keeps most takes slot 0; among heads that keep as many, the lowest
  comes first.

  Attributes:
    lengths: Tokens that each row slot keeps of the prompt, descending along
      slots; an upper bound if the policy's lengths depend on the prompt.
    rings: 0 for a row slot that grows by every generated token; otherwise
      generated tokens overwrite, oldest first, the last so many of the row,
      which must be there.
    layers: What `Policy.keep` needs besides, int32 or float32, each with a
      leading axis of layers.
    heads: The KV head of each row slot, for policies that know it (see
      `Policy.knows_heads`); needed where rows differ or `drops` gives pages up.
    rings_by_rank: Where the prompt decides which row slot has which ring: of
      the row that keeps most, of the one after it (ties as above), and so on.
      `rings` are then lower bounds, 0 where a row may grow.
  """

  lengths: Int[np.ndarray, "R K"]
  rings: Int[np.ndarray, "R K"]
  layers: dict[str, np.ndarray]
  heads: Int[np.ndarray, "R K"] | None = None
  rings_by_rank: Int[np.ndarray, "R K"] | None = None

  def kept_fraction(self, length: int) -> float:
    """Tokens kept over those of the full cache: the effective budget.

    An upper bound of it, where `lengths` are upper bounds.
    """
    return float(self.lengths.sum()) / max(1, self.lengths.size * length)


class LayerWindow(NamedTuple):
  """What a policy may look at: one layer of one prompt.

  Attributes:
    q: Queries of the last L tokens, after RoPE; the last row is the prompt's
      last token. Rows from before the prompt's start may hold anything.
    k: Keys after RoPE, by position; those from `length` on may hold anything.
    v: Values, likewise.
    length: Tokens of the prompt; at most S.
    w_o: The layer's output projection.
    layer: Index of the layer.
  """

  q: Float[Array, "L N H"]
  k: Float[Array, "S K H"]
  v: Float[Array, "S K H"]
  length: Int[Array, ""]
  w_o: Float[Array, "N H D"]
  layer: Int[Array, ""]


class Policy(Protocol):
  """Which cached tokens each head keeps; a hashable value.

  To add one, write `plan` and `keep`; the rest has the answers of a policy that
  looks at the last query only, knows its lengths and gives nothing up later.
  """

  @property
  def window(self) -> int:
    """L: how many of the prompt's last queries `keep` looks at; at least 1."""
    return 1

  @property
  def knows_lengths(self) -> bool:
    """Whether `plan` gives exact lengths; if not, upper bounds."""
    return True

  @property
  def places_early(self) -> bool:
    """Whether rows have pages for `Plan.lengths` as soon as a prompt is read.

    Then its survivors go there at once, and what exact lengths leave is given
    back. Else they stay in the prompt's pages until lengths are known.
    """
    return self.knows_lengths

  @property
  def knows_heads(self) -> bool:
    """Whether `plan` tells whose rows are long: all are alike, or `heads` says.

    If not, the prompt decides. Devices that share the heads of a layer then
    learn what their rows keep when the prompt has been read.
    """
    return False

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    """The host's part, in integers; nothing is compiled for it.

    Args:
      length: Tokens of the prompt, at least 1.
      budget: Fraction of the full cache to keep, in (0, 1].
      shape: Layers and KV heads.
    Raises:
      ValueError: `length` or `budget` is out of range, or the policy is for
        other layers or heads.
    """

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    """The device's part: which tokens each head keeps.

    Traced once for all layers, prompts and budgets: `window.length` and
    `layer`, one layer of `Plan.layers`, are traced.
    """

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"] | None:
    """Pages that rows give up before the token at `position` is written.

    Asked when `position` is a multiple of `page_size`, from the first
    generated token on: `plan` tells what rows hold before that. Only full
    pages can go, and none that holds a part of the row's ring.

    Returns:
      For each KV head (see `Plan.heads` for its row slot) the index, among the
      pages of its row, of the one that goes, or -1; `None` if no row ever
      gives one up.
    """
    del position, page_size, shape
    return None
