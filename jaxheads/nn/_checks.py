"""What the attention modules refuse, in the caller's terms."""

from typing import Any

from jaxtyping import Array

from jaxheads.moh import MoHConfig
from pallas_kernels.head_attention import HeadContexts


def check_sizes(
  *,
  num_heads: int,
  num_kv_heads: int,
  qkv_features: int,
  moh: MoHConfig | None,
  pattern: HeadContexts | None,
  rope_theta: float | None,
  dropout_rate: float,
  execution: str | None,
) -> None:
  """Raises a ValueError that names the constructor's argument."""
  if num_heads < 1:
    raise ValueError(f"`num_heads` must be at least 1, got {num_heads}.")
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(
      f"`num_heads` must be a multiple of `num_kv_heads`, got {num_heads} "
      f"and {num_kv_heads}."
    )
  if qkv_features % num_heads:
    raise ValueError(
      f"`qkv_features` must be a multiple of `num_heads`, got "
      f"{qkv_features} and {num_heads}."
    )
  for name, value in (("moh", moh), ("pattern", pattern)):
    if value is not None and value.num_heads != num_heads:
      raise ValueError(
        f"`{name}.num_heads` must equal `num_heads`, got {value.num_heads} "
        f"and {num_heads}."
      )
  if not 0.0 <= dropout_rate < 1.0:
    raise ValueError(f"`dropout_rate` must be in [0, 1), got {dropout_rate}.")
  if rope_theta is not None and (qkv_features // num_heads) % 2:
    raise ValueError(
      "`rope_theta` needs an even head size, got `qkv_features` // "
      f"`num_heads` = {qkv_features // num_heads}."
    )
  if pattern is not None and moh is None and execution == "dispatch":
    raise ValueError(
      "`execution` must be None or 'dense' with a `pattern` and no `moh`: all "
      "heads are computed, got 'dispatch'."
    )


def check_inputs(
  inputs_q: Array,
  inputs_k: Array,
  inputs_v: Array,
  *,
  in_features: int,
  in_kv_features: int,
  **per_token: Any,
) -> None:
  """Raises a ValueError that names the call's argument.

  Args:
    inputs_q, inputs_k, inputs_v: The layer's inputs.
    in_features, in_kv_features: What the layer was made for.
    **per_token: Arrays of one entry for each query, or None, by name.
  """
  if inputs_q.ndim < 2 or inputs_q.shape[-1] != in_features:
    raise ValueError(
      f"`inputs_q` must be [*batch, T, {in_features}], "
      f"got {list(inputs_q.shape)}."
    )
  batch_shape = inputs_q.shape[:-2]
  for name, array in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
    expected = (*batch_shape, inputs_k.shape[-2], in_kv_features)
    if array.shape != expected:
      raise ValueError(
        f"`{name}` must be {[*batch_shape, 'S', in_kv_features]} to "
        f"fit `inputs_q`, with one S for keys and values, "
        f"got {list(array.shape)}."
      )
  for name, array in per_token.items():
    if array is not None and array.shape != inputs_q.shape[:-1]:
      raise ValueError(
        f"`{name}` must be {list(inputs_q.shape[:-1])} to fit `inputs_q`, "
        f"got {list(array.shape)}."
      )
