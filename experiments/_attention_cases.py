"""What `bench_attention.py` times: our attention, and what others offer.

Every maker returns two compiled calls, "forward" and "forward+backward", or
raises `Unavailable` with the reason.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._timing import Calls, Unavailable
from jaxheads import s2
from jaxheads.attention import attention


class Problem(NamedTuple):
  """One size; also what the calls share."""

  q: jax.Array  # [B, T, N, H]
  k: jax.Array  # [B, T, K, H]
  v: jax.Array
  d_out: jax.Array
  block_size: int
  local_blocks: int

  @classmethod
  def make(
    cls,
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    block_size: int,
    local_blocks: int,
  ) -> "Problem":
    """Normally distributed inputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, d_out = (
      jax.random.normal(key, (batch, length, count, head_dim), dtype)
      for key, count in zip(keys, counts, strict=True)
    )
    return cls(q, k, v, d_out, block_size, local_blocks)

  def pattern(self, stride: int) -> s2.Pattern:
    """Stride 1: everything is visible."""
    with warnings.catch_warnings():
      # What is timed does not depend on what the heads see together.
      warnings.simplefilter("ignore")
      return s2.strided(
        self.q.shape[2],
        num_kv_heads=self.k.shape[2],
        block_size=self.block_size,
        local_blocks=self.local_blocks if stride > 1 else 1,
        vertical_stride=stride,
        step=1,
        require_union=False,
      )

  def visible_pairs(self, stride: int) -> int:
    """Pairs of a query and a key that a head sees, summed over the heads."""
    pattern = self.pattern(stride)
    block = self.block_size
    blocks = -(-self.q.shape[1] // block)
    pairs = 0
    for rule in pattern.rules:
      i = np.arange(blocks)[:, None]
      kept = int(rule.keep(i, np.arange(blocks)[None]).sum())
      pairs += (kept - blocks) * block**2 + blocks * block * (block + 1) // 2
    return pairs


def both(
  problem: Problem, function: Callable[..., jax.Array], *others: jax.Array
) -> Calls:
  """Compiled calls of function(q, k, v, *others)."""

  def gradients(q: Any, k: Any, v: Any, d_out: Any, *others: Any) -> Any:
    out, pull = jax.vjp(lambda *qkv: function(*qkv, *others), q, k, v)
    return out, pull(d_out)

  forward, backward = jax.jit(function), jax.jit(gradients)
  q, k, v, d_out = problem[:4]
  return {
    "forward": lambda: jax.block_until_ready(forward(q, k, v, *others)),
    "forward+backward": lambda: jax.block_until_ready(
      backward(q, k, v, d_out, *others)
    ),
  }


def ours(problem: Problem, stride: int) -> Calls:
  """`jaxheads.attention.attention`, in its best implementation here."""
  return both(
    problem,
    functools.partial(attention, pattern=problem.pattern(stride)),
  )


def dense(problem: Problem, *, limit_gib: float) -> Calls:
  """`jax.nn.dot_product_attention`: cuDNN where it can, else XLA."""
  implementation = "xla"
  if jax.default_backend() == "gpu" and problem.q.dtype.itemsize == 2:
    implementation = "cudnn"
  batch, length, heads = problem.q.shape[:3]
  # Logits, weights, and the gradients of both.
  gib = 4 * 4 * batch * heads * length**2 / 2**30
  if implementation == "xla" and gib > limit_gib:
    raise Unavailable(
      f"not run: needs about {gib:,.0f} GiB, `--dense-limit-gib` is "
      f"{limit_gib:g}"
    )
  return both(
    problem,
    functools.partial(
      jax.nn.dot_product_attention,
      is_causal=True,
      implementation=implementation,
    ),
  )


def splash(problem: Problem) -> Calls:
  """JAX's splash attention with a causal mask, on TPUs."""
  if jax.default_backend() != "tpu":
    raise Unavailable("not run: TPUs only")
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length, heads = problem.q.shape[1:3]
  mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
  size = min(512, length)
  kernel = kernels.make_splash_mha_single_device(
    mask,
    block_sizes=kernels.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
  )

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q = q * q.shape[-1] ** -0.5
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

  return both(problem, attend)


def flex(problem: Problem, stride: int) -> Calls:
  """PyTorch's FlexAttention with the same mask, where torch is installed."""
  try:
    import torch  # type: ignore[import-not-found, unused-ignore]
    from torch.nn.attention.flex_attention import (  # type: ignore[import-not-found, unused-ignore]
      create_block_mask,
      flex_attention,
    )
  except ImportError:
    raise Unavailable("not run: PyTorch is not installed") from None
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  if device == "cuda" and not torch.cuda.is_available():
    raise Unavailable("not run: this PyTorch has no CUDA")

  def tensor(x: jax.Array) -> Any:
    wide = np.asarray(x.astype(jnp.float32)).swapaxes(1, 2).copy()
    dtype = getattr(torch, str(x.dtype))
    return torch.from_numpy(wide).to(device=device, dtype=dtype)

  q, k, v, d_out = (tensor(x) for x in problem[:4])
  for x in (q, k, v):
    x.requires_grad_(True)
  pattern = problem.pattern(stride)
  rules: Any = pattern.rules
  residues = torch.tensor([rule.residue for rule in rules], device=device)
  size, local = problem.block_size, rules[0].local

  def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    del b
    near = i // size - j // size < local
    return (j <= i) & (near | ((j // size) % stride == residues[h]))

  length, heads = problem.q.shape[1:3]
  mask = create_block_mask(seen, None, heads, length, length, device=device)
  compiled = torch.compile(flex_attention)

  def attend() -> Any:
    return compiled(q, k, v, block_mask=mask, enable_gqa=heads != k.shape[1])

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  def forward() -> Any:
    with torch.no_grad():
      attend()
    wait()

  def backward() -> Any:
    torch.autograd.grad(attend(), (q, k, v), d_out)
    wait()

  return {"forward": forward, "forward+backward": backward}
