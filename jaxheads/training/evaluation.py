"""Validation: the same batches every time, in the same order."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from jaxheads.data import (
  Batch,
  Corpus,
  Tokenizer,
  bits_per_byte,
  make_loader,
)
from jaxheads.training import devices, distributed
from jaxheads.training.figures import token_classes
from jaxheads.training.step import TrainState, make_eval_step

# One order of the validation text for every run, whatever its seed is, so that
# losses of different runs can be compared.
_ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Validation loss of one state.

  Attributes:
    loss: Mean nats per token.
    bits_per_byte: The same information per byte of text, whatever the
      tokenizer.
    num_tokens: Tokens it was measured on.
  """

  loss: float
  bits_per_byte: float
  num_tokens: int

  def scalars(self) -> dict[str, float]:
    """What the metrics record besides the loss."""
    return {"validation_bits_per_byte": self.bits_per_byte}

  def __str__(self) -> str:
    return f"{self.loss:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


class Evaluator:
  """Validates on a fixed set of batches.

  Args:
    corpus: Its validation split is used.
    tokenizer: Counts the bytes of text that tokens stand for.
    num_batches: How many batches, drawn evenly from the split; 0 takes all.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef[Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    num_batches: int,
    mesh: Mesh,
  ) -> None:
    self._step = make_eval_step(graphdef)
    self._mesh = mesh
    self._tokenizer = tokenizer
    self._num_batches = num_batches
    self._batch_size = batch_size
    self._make_loader = lambda rows: make_loader(
      corpus.validation,
      seq_len=seq_len,
      batch_size=batch_size,
      seed=_ORDER_SEED,
      shuffle=num_batches > 0,
      num_epochs=1,
      rows=rows,
      name="the validation text",
    )
    self._make_loader(None).close()  # Too little text is told before training.

  def __call__(
    self, state: TrainState, *, should_stop: Callable[[], bool] = lambda: False
  ) -> Evaluation | None:
    """The validation loss; None if `should_stop` became true on the way."""
    sums = []
    num_bytes = 0
    rows = devices.rows_of_process(self._mesh, self._batch_size)
    # What processes share is counted once.
    counted = np.isin(
      rows, devices.rows_of_process(self._mesh, self._batch_size, shared=False)
    )
    for batch in self._read(rows):
      if should_stop():
        return None
      placed = devices.put_batch(self._mesh, batch)
      sums.append(self._step(state.params, state.rest, placed))
      real = batch["mask"] & counted[:, None]
      num_bytes += self._tokenizer.num_bytes(batch["targets"][real])
      if len(sums) > 2:
        jax.block_until_ready(sums[-3])  # Do not run ahead of the devices.
    nats = math.fsum(float(total) for total, _ in sums)
    tokens = sum(int(count) for _, count in sums)
    num_bytes = sum(distributed.everyone(num_bytes))
    return Evaluation(
      loss=nats / tokens,
      bits_per_byte=bits_per_byte(nats, max(num_bytes, 1)),
      num_tokens=tokens,
    )

  def batches(self) -> Iterator[Batch]:
    """The batches, whole, in every process."""
    return self._read(None)

  def _read(self, rows: Sequence[int] | None) -> Iterator[Batch]:
    loader = self._make_loader(rows)
    try:
      for index, batch in enumerate(loader):
        if self._num_batches and index >= self._num_batches:
          break
        yield batch
    finally:
      loader.close()


def head_load(
  model: Any,
  batches: list[Any],
  tokenizer: Tokenizer,
) -> tuple[Float[np.ndarray, "layers classes heads"], tuple[str, ...]]:
  """How often each head answers tokens of each class.

  Args:
    model: Has `head_activity(tokens) -> Bool[layers, B, T, heads]`.
    batches: Batches of the loader.
    tokenizer: Says what text a token stands for.
  Returns:
    Fractions in [0, 1], NaN for a class without tokens, and the class names.
  """
  graphdef, state = nnx.split(model)
  activity = jax.jit(lambda s, t: nnx.merge(graphdef, s).head_activity(t))
  totals: Any = 0
  counts: Any = 0
  names: tuple[str, ...] = ()
  for batch in batches:
    tokens = np.asarray(batch["tokens"])
    active = np.asarray(activity(state, tokens), np.float64)
    classes, names = token_classes(tokens, tokenizer)
    # [B, T, classes], zero where the row only fills the batch up.
    member = np.asarray(classes)[..., None] == np.arange(len(names))
    member = (member & np.asarray(batch["mask"])[..., None]).astype(np.float64)
    totals = totals + np.einsum("lbtn,btc->lcn", active, member)
    counts = counts + member.sum((0, 1))
  with np.errstate(invalid="ignore"):
    return totals / np.asarray(counts)[:, None], names
