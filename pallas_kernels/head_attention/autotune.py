"""Finds the fastest tile sizes on the machine at hand.

As a program, for a shape of your own:

  python -m pallas_kernels.head_attention.autotune --seq-len 8192 --heads 16
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.head_attention.api import head_attention
from pallas_kernels.head_attention.contexts import HeadContexts, Strided
from pallas_kernels.head_attention.tiling import Tiling

_SIZES = (128, 256, 512, 1024, 2048)


class Timing(NamedTuple):
  """What one tiling took.

  Attributes:
    tiling: The tile sizes.
    median_s: Seconds of one call; infinite if it did not run.
    error: Why it did not run, else None.
  """

  tiling: Tiling
  median_s: float
  error: str | None = None


def autotune(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  pattern: HeadContexts,
  backward: bool = False,
  candidates: Iterable[Tiling] | None = None,
  rounds: int = 5,
  **options: Any,
) -> list[Timing]:
  """Times `head_attention` with every tiling, fastest first.

  The candidates take turns in each round, so that a slow moment of the machine
  meets all of them. Pass the winner as `tiling=`.

  Args:
    q, k, v: As for `head_attention`; only shapes and dtypes matter.
    pattern: What each head sees.
    backward: Time forward and backward together.
    candidates: Tilings to try; `None` means all pairs of 128 to 2048 that the
      lengths can fill.
    rounds: Calls of each candidate.
    **options: More arguments of `head_attention`.

  Returns:
    One entry a candidate; those that do not compile or are refused come last,
    with the reason.

  Raises:
    ValueError: `rounds` is less than 1, or no candidate is given.
  """
  if rounds < 1:
    raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
  tilings = list(
    default_candidates(q.shape[1], k.shape[1])
    if candidates is None
    else candidates
  )
  if not tilings:
    raise ValueError("`candidates` must hold at least one tiling.")

  def program(tiling: Tiling) -> Any:
    def run(q: Array, k: Array, v: Array) -> Array:
      return head_attention(q, k, v, pattern=pattern, tiling=tiling, **options)

    def loss(q: Array, k: Array, v: Array) -> Array:
      return run(q, k, v).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if backward else run)

  ready: dict[Tiling, Callable[..., Any]] = {}
  failed = []
  for tiling in tilings:
    try:
      compiled = program(tiling).lower(q, k, v).compile()
      jax.block_until_ready(compiled(q, k, v))
      ready[tiling] = compiled
    except Exception as error:  # Compilers raise what they like.
      reason = str(error).strip().splitlines()
      failed.append(
        Timing(tiling, float("inf"), reason[0] if reason else repr(error))
      )
  seconds: dict[Tiling, list[float]] = {tiling: [] for tiling in ready}
  for _ in range(rounds):
    for tiling, compiled in ready.items():
      start = time.perf_counter()
      jax.block_until_ready(compiled(q, k, v))
      seconds[tiling].append(time.perf_counter() - start)
  timed = [
    Timing(tiling, statistics.median(times))
    for tiling, times in seconds.items()
  ]
  return sorted(timed, key=lambda timing: timing.median_s) + failed


def default_candidates(q_length: int, kv_length: int) -> list[Tiling]:
  """All pairs of the usual sizes that the lengths can fill."""
  q_sizes = [n for n in _SIZES if n < 2 * q_length] or [_SIZES[0]]
  kv_sizes = [n for n in _SIZES if n < 2 * kv_length] or [_SIZES[0]]
  return [
    Tiling(block_q=block_q, block_kv=block_kv)
    for block_q, block_kv in itertools.product(q_sizes, kv_sizes)
  ]


def main(arguments: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for flag, default, text in (
    ("--batch", 1, "sequences"),
    ("--seq-len", 8192, "tokens of a sequence"),
    ("--heads", 16, "query heads"),
    ("--kv-heads", 0, "KV heads; 0 means as many as query heads"),
    ("--head-dim", 128, "size of a head"),
    ("--block", 64, "tokens of a block of the pattern"),
    ("--local", 8, "blocks of the window"),
    ("--stride", 16, "vertical stride in blocks; 1 is dense"),
    ("--rounds", 5, "calls of each candidate"),
  ):
    parser.add_argument(flag, type=int, default=default, help=text)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--implementation", help="default: the best one here")
  parser.add_argument("--backward", action="store_true")
  flags = parser.parse_args(arguments)
  try:
    timings = _tune(flags)
  except (TypeError, ValueError) as error:
    parser.error(" ".join(str(error).split()))
  for timing in timings:
    block_q, block_kv = timing.tiling.block_q, timing.tiling.block_kv
    result = timing.error or f"{1e3 * timing.median_s:10.3f} ms"
    print(f"block_q {block_q:5}  block_kv {block_kv:5}", result)


def _tune(flags: argparse.Namespace) -> list[Timing]:
  kv_heads = flags.kv_heads or flags.heads
  dtype = jnp.dtype(flags.dtype)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(
      key, (flags.batch, flags.seq_len, heads, flags.head_dim), dtype
    )
    for key, heads in zip(keys, (flags.heads, kv_heads, kv_heads), strict=True)
  )
  groups = max(1, flags.heads // kv_heads)
  rules = tuple(
    Strided(
      local=flags.local,
      stride=flags.stride,
      residue=-(head // groups) % max(1, flags.stride),
    )
    for head in range(flags.heads)
  )
  return autotune(
    q,
    k,
    v,
    pattern=HeadContexts(flags.block, rules),
    backward=flags.backward,
    rounds=flags.rounds,
    implementation=flags.implementation,
  )


if __name__ == "__main__":
  main()
