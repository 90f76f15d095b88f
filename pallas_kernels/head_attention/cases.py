"""Head attention where a device takes one of several static problems.

Devices of a mesh run one program. Where they have other heads or other
queries, each of them picks its case by a traced index. A case may also put a
row's keys together from several places: the softmax is over all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import platform
from pallas_kernels.head_attention import api
from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.head_attention.operands import Operands, Settings

Source = tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]


class Part(NamedTuple):
  """Keys that some queries see, all of them static.

  Attributes:
    source: Which of the sources.
    keys: Range of its keys that are passed on.
    pattern: What each head sees; blocks are counted from the first of them.
    q_offset: Of the first query among them.
  """

  source: int
  keys: tuple[int, int]
  pattern: HeadContexts
  q_offset: int


class Case(NamedTuple):
  """One static problem.

  Attributes:
    queries: Consecutive ranges of queries, all of [0, T), each with the parts
      that share its softmax; none gives 0.
  """

  queries: tuple[tuple[tuple[int, int], tuple[Part, ...]], ...]


class _Step(NamedTuple):
  """A part, and what runs it."""

  implementation: str
  source: int
  keys: tuple[int, int]
  settings: Settings


_Branch = tuple[tuple[tuple[int, int], tuple[_Step, ...]], ...]


class _Arrays(NamedTuple):
  """What all cases choose from."""

  q: Float[Array, "B T N H"]
  sources: tuple[Source, ...]
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: tuple[Int[Array, "B S"], ...] | None
  branch: Int[Array, ""]


def attend_case(
  q: Float[Array, "B T N H"],
  sources: tuple[Source, ...],
  *,
  cases: tuple[Case, ...],
  which: Int[Array, ""],
  scale: float | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: tuple[Int[Array, "B S"], ...] | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
  """What `head_attention` gives for case number `which`.

  Equal cases are compiled once, and one case alone needs no choice. What is
  kept for the backward pass does not depend on the number of cases.

  Args:
    q: Queries (after RoPE).
    sources: Pairs of keys (after RoPE) and values, of any lengths.
    cases: Static problems.
    which: Index into `cases`; traced.
    scale: Multiplies the logits; `None` means H ** -0.5.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment; both
      or neither, the latter one array a source.
    implementation: As of `head_attention`; `None` takes the best one for each
      part.

  Returns:
    Output in q's dtype; 0 where a query sees nothing.

  Raises:
    ValueError: Shapes disagree with each other or with a case.
    NotImplementedError: The named implementation does not cover a part.
  """
  _check(q, sources, q_segment_ids, kv_segment_ids)
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  if not cases:
    raise ValueError("`cases` must hold at least one case, got none.")
  distinct = tuple(dict.fromkeys(cases))
  branch_of = [distinct.index(case) for case in cases]
  arrays = _Arrays(
    q,
    sources,
    q_segment_ids,
    kv_segment_ids,
    jnp.asarray(branch_of, jnp.int32)[which],
  )
  branches = tuple(
    _plan(arrays, case, scale, implementation) for case in distinct
  )
  return _attend(branches, arrays)


def _plan(
  arrays: _Arrays, case: Case, scale: float, implementation: str | None
) -> _Branch:
  """The case with an implementation for each part."""
  end = 0
  branch = []
  for (start, stop), parts in case.queries:
    if start != end or stop < start:
      raise ValueError(
        "`cases` must hold consecutive ranges of queries, got "
        f"({start}, {stop}) after {end}."
      )
    end = stop
    steps = []
    for part in parts:
      _check_part(arrays, part, stop - start)
      if start == stop or part.keys[0] == part.keys[1]:
        continue  # Nothing to see, or nobody to see it.
      settings = Settings(
        pattern=part.pattern,
        scale=scale,
        logits_soft_cap=None,
        q_offset=part.q_offset,
        tiling=None,
        interpret=platform.interpret(),
      )
      # Looks at shapes and dtypes only.
      operands = jax.eval_shape(
        functools.partial(_operands, queries=(start, stop), part=part), arrays
      )
      name = api.choose(implementation, settings, operands)
      steps.append(_Step(name, part.source, part.keys, settings))
    branch.append(((start, stop), tuple(steps)))
  if end != arrays.q.shape[1]:
    raise ValueError(
      f"`cases` must cover all {arrays.q.shape[1]} queries, got {end}."
    )
  return tuple(branch)


def _operands(
  arrays: _Arrays, *, queries: tuple[int, int], part: Part | _Step
) -> Operands:
  k, v = arrays.sources[part.source]
  rows, keys = slice(*queries), slice(*part.keys)
  q_segment_ids = kv_segment_ids = None
  if arrays.q_segment_ids is not None and arrays.kv_segment_ids is not None:
    q_segment_ids = arrays.q_segment_ids[:, rows]
    kv_segment_ids = arrays.kv_segment_ids[part.source][:, keys]
  return Operands(
    arrays.q[:, rows],
    k[:, keys],
    v[:, keys],
    q_segment_ids,
    kv_segment_ids,
    jnp.zeros((), jnp.int32),  # It is static.
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(branches: tuple[_Branch, ...], arrays: _Arrays) -> Array:
  return _attend_fwd(branches, arrays)[0]


# The choice is inside of both rules: JAX's own derivative of a choice would
# keep what each branch wants to keep.
def _attend_fwd(
  branches: tuple[_Branch, ...], arrays: _Arrays
) -> tuple[Array, tuple[_Arrays, Array, Array]]:
  out, lse = _choose(_forward, branches, arrays)
  return out, (arrays, out, lse)


def _attend_bwd(
  branches: tuple[_Branch, ...],
  residuals: tuple[_Arrays, Array, Array],
  d_out: Array,
) -> tuple[_Arrays]:
  dq, d_sources = _choose(_backward, branches, *residuals, d_out)
  # Integers have no gradients.
  return (_Arrays(dq, d_sources, None, None, None),)  # type: ignore[arg-type]


_attend.defvjp(_attend_fwd, _attend_bwd)


def _choose(
  run: Callable[..., Any],
  branches: tuple[_Branch, ...],
  arrays: _Arrays,
  *others: Array,
) -> Any:
  """`run` of the branch that `arrays` names."""
  if len(branches) == 1:
    return run(branches[0], arrays, *others)

  def one(branch: _Branch, *operands: Any) -> Any:
    # Without the barrier XLA moves conversions out of some branches only, and
    # its TPU compiler then refuses the result (libtpu 0.0.42).
    return jax.lax.optimization_barrier(run(branch, *operands))

  runs = [functools.partial(one, branch) for branch in branches]
  return jax.lax.switch(arrays.branch, runs, arrays, *others)


def _forward(branch: _Branch, arrays: _Arrays) -> tuple[Array, Array]:
  """Output [B, T, N, Hv] and log-sum-exp [B, N, T] over all parts."""
  B, _, N, _ = arrays.q.shape
  Hv = arrays.sources[0][1].shape[-1]
  outs, lses = [], []
  for queries, steps in branch:
    length = queries[1] - queries[0]
    parts = [
      api.module(step.implementation).forward(
        step.settings, _operands(arrays, queries=queries, part=step)
      )
      for step in steps
    ]
    if not parts:
      out = jnp.zeros((B, length, N, Hv), arrays.q.dtype)
      lse = jnp.full((B, N, length), -jnp.inf, jnp.float32)
    elif len(parts) == 1:
      out, lse = parts[0]
    else:
      out, lse = _merged(parts)
    outs.append(out)
    lses.append(lse)
  return _joined(outs, 1), _joined(lses, 2)


def _merged(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
  """The softmax over the keys of all parts."""
  lses = jnp.stack([lse for _, lse in parts])
  peak = lses.max(0)
  empty = peak == -jnp.inf
  peak = jnp.where(empty, 0.0, peak)  # No inf - inf.
  weights = jnp.exp(lses - peak)
  total = jnp.where(empty, 1.0, weights.sum(0))
  shares = (weights / total).swapaxes(2, 3)[..., None]
  out = sum(
    share * out.astype(jnp.float32)
    for share, (out, _) in zip(shares, parts, strict=True)
  )
  lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
  return jnp.asarray(out).astype(parts[0][0].dtype), lse


def _backward(
  branch: _Branch, arrays: _Arrays, out: Array, lse: Array, d_out: Array
) -> tuple[Array, tuple[Source, ...]]:
  """Gradients of the queries and of all sources.

  A part's own rule, given the output and log-sum-exp over all parts, weighs
  its keys by their share of the whole softmax.
  """
  dqs = []
  met: list[list[tuple[tuple[int, int], Source]]] = [[] for _ in arrays.sources]
  for queries, steps in branch:
    rows = slice(*queries)
    terms = []
    d_lse = jnp.zeros_like(lse[:, :, rows])
    for step in steps:
      dq, dk, dv = api.module(step.implementation).backward(
        step.settings,
        _operands(arrays, queries=queries, part=step),
        out[:, rows],
        lse[:, :, rows],
        d_out[:, rows],
        d_lse,
      )
      terms.append(dq)
      met[step.source].append((step.keys, (dk, dv)))
    dqs.append(_sum(terms, like=arrays.q[:, rows]))
  d_sources = tuple(
    (
      _gathered(k, [(keys, dk) for keys, (dk, _) in gradients]),
      _gathered(v, [(keys, dv) for keys, (_, dv) in gradients]),
    )
    for (k, v), gradients in zip(arrays.sources, met, strict=True)
  )
  return _joined(dqs, 1), d_sources


def _sum(terms: list[Array], *, like: Array) -> Array:
  """Summed in float32, if there is anything to sum."""
  if len(terms) == 1:
    return terms[0]
  total = jnp.zeros(like.shape, jnp.float32)
  for term in terms:
    total += term.astype(jnp.float32)
  return total.astype(like.dtype)


def _gathered(
  of: Array, gradients: list[tuple[tuple[int, int], Array]]
) -> Array:
  """Sum of the gradients of ranges of keys; the shape and dtype of `of`."""
  if len(gradients) == 1 and gradients[0][0] == (0, of.shape[1]):
    return gradients[0][1]
  total = jnp.zeros(of.shape, jnp.float32)
  for keys, gradient in gradients:
    total = total.at[:, slice(*keys)].add(gradient.astype(jnp.float32))
  return total.astype(of.dtype)


def _joined(arrays: list[Array], axis: int) -> Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _check(
  q: Array,
  sources: tuple[Source, ...],
  q_segment_ids: Array | None,
  kv_segment_ids: tuple[Array, ...] | None,
) -> None:
  if not sources:
    raise ValueError("`sources` must hold at least one pair, got none.")
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError(
      "`q_segment_ids` and `kv_segment_ids` must be given together."
    )
  if kv_segment_ids is not None and len(kv_segment_ids) != len(sources):
    raise ValueError(
      f"`kv_segment_ids` must hold one array for each of the {len(sources)} "
      f"sources, got {len(kv_segment_ids)}."
    )
  sizes: dict[str, int] = {}
  for index, (k, v) in enumerate(sources):
    ids = None if kv_segment_ids is None else kv_segment_ids[index]
    shared = {axis: size for axis, size in sizes.items() if axis != "S"}
    api.check_operands(q, k, v, q_segment_ids, ids, shared)
    sizes = shared


def _check_part(arrays: _Arrays, part: Part, q_length: int) -> None:
  if not 0 <= part.source < len(arrays.sources):
    raise ValueError(
      f"`source` must be in [0, {len(arrays.sources)}), got {part.source}."
    )
  start, stop = part.keys
  keys = arrays.sources[part.source][0].shape[1]
  if not 0 <= start <= stop <= keys:
    raise ValueError(
      f"`keys` must be a range in [0, {keys}], got ({start}, {stop})."
    )
  if part.q_offset < 0:
    raise ValueError(f"`q_offset` must not be negative, got {part.q_offset}.")
  api.check_heads(part.pattern, arrays.q)
  part.pattern.check_lengths(part.q_offset + q_length, stop - start)
