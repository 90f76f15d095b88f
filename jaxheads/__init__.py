"""Attention heads are not equal: no head should do work that does not matter.

- `jaxheads.moh`: mixture-of-head attention, as pure functions
- `jaxheads.s2`, `jaxheads.attention`: heads that see a context each
- `jaxheads.kvcache`: which cached tokens each head keeps
- `jaxheads.serve`: continuous batching, over caches of uneven heads
- `jaxheads.decoding`: the newest tokens over a cache of keys and values
- `jaxheads.nn`: the same as Flax NNX modules
- `jaxheads.models`: a decoder language model with one head plan per layer
- `jaxheads.checks`: checks of values, for programs under `jax.jit`
- `jaxheads.flops`: what a model costs by the token
- `jaxheads.data`, `jaxheads.training`: what the experiment scripts are made of
"""

from jaxheads.errors import UserError as UserError
from jaxheads.moh import MoHConfig as MoHConfig
from jaxheads.nn import MoHAttention as MoHAttention
