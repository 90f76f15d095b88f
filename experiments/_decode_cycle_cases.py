"""What `bench_decode_tpu_cycles.py` compiles, and rows of uneven length."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import paged_attention as stock

from experiments._tpu_cycle_cases import HEAD_SIZE, Schedules, schedules
from pallas_kernels.paged_attention import PageTable, paged_attention


@dataclasses.dataclass(frozen=True)
class Case:
  """One compile.

  Attributes:
    chip: As in `aot.compile_for`.
    kernel: "ours", "stock, virtual" (each KV head a sequence) or "stock, all
      heads".
    dtype: Of the pages; queries are bfloat16.
    page_size: Tokens of a page.
  """

  chip: str
  kernel: str
  dtype: str
  page_size: int

  def __str__(self) -> str:
    return f"{self.chip} {self.kernel} {self.dtype}, pages of {self.page_size}"

  @property
  def page_bytes(self) -> int:
    """Keys and values of a page of one head."""
    return 2 * self.page_size * HEAD_SIZE * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sequences of one length, in one layer; what heads keep differs.

  Attributes:
    stock_tokens: Of a block of the stock kernel: best of 512 to 2,048.
  """

  batch: int = 8
  length: int = 8192
  kv_heads: int = 8
  groups: int = 4
  stock_tokens: int = 1024

  @property
  def rows(self) -> int:
    """KV heads of all sequences."""
    return self.batch * self.kv_heads


def row_lengths(problem: Problem, budget: float, heads: str) -> list[int]:
  """Tokens of every row, in all `budget` of the full cache.

  Args:
    problem: What is full.
    budget: In (0, 1].
    heads: "even", or "uneven": an eighth of the heads keep everything, the
      others what is left.
  """
  full = problem.kv_heads // 8 if heads == "uneven" else 0
  others = (budget * problem.kv_heads - full) / (problem.kv_heads - full)
  short = round(others * problem.length)
  one = [problem.length] * full + [short] * (problem.kv_heads - full)
  return one * problem.batch


def compile_case(case: Case, problem: Problem) -> Schedules | str:
  """Its kernel, or why it does not compile; call it in a fresh process."""
  if case.kernel == "ours":
    return _ours(case, problem)
  return _stock(case, problem)


def _ours(case: Case, problem: Problem) -> Schedules | str:
  pages_per_row = problem.length // case.page_size
  is_quantised = jnp.dtype(case.dtype).itemsize == 1

  def program(q: Any, k: Any, v: Any, lengths: Any, scales: Any) -> Any:
    k_scales, v_scales = scales if is_quantised else (None, None)
    table = PageTable.contiguous(lengths, pages_per_row=pages_per_row)
    return paged_attention(
      q,
      k,
      v,
      table,
      k_scales=k_scales,
      v_scales=v_scales,
      implementation="mosaic_tpu",
    )

  count = problem.rows * pages_per_row
  pool = _shape(count, case.page_size, HEAD_SIZE, dtype=case.dtype)
  arguments = (
    _shape(problem.rows, problem.groups, HEAD_SIZE),
    pool,
    pool,
    _shape(problem.rows, dtype="int32"),
    (_shape(count, dtype="float32"),) * 2,
  )
  return schedules(case.chip, program, arguments, "paged_attention")


def _stock(case: Case, problem: Problem) -> Schedules | str:
  kv_heads = 1 if case.kernel == "stock, virtual" else problem.kv_heads
  batch = problem.rows // kv_heads
  pages_per_row = problem.length // case.page_size

  def program(q: Any, k: Any, v: Any, lengths: Any, table: Any) -> Any:
    return stock.paged_attention(
      q,
      k,
      v,
      lengths,
      table,
      pages_per_compute_block=problem.stock_tokens // case.page_size,
    )

  pool = _shape(kv_heads, batch * pages_per_row, case.page_size, HEAD_SIZE)
  arguments = (
    _shape(batch, kv_heads * problem.groups, HEAD_SIZE),
    pool,
    pool,
    _shape(batch, dtype="int32"),
    _shape(batch, pages_per_row, dtype="int32"),
  )
  return schedules(case.chip, program, arguments, "paged_attention")


def _shape(*sizes: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
