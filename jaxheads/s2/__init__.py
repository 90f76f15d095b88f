"""Sharded sparse attention: which keys each head may see, fixed by position."""

from jaxheads.s2._constructors import context_range as context_range
from jaxheads.s2._constructors import dense as dense
from jaxheads.s2._constructors import from_block_mask as from_block_mask
from jaxheads.s2._constructors import phi3_small as phi3_small
from jaxheads.s2._constructors import sliding_window as sliding_window
from jaxheads.s2._constructors import strided as strided
from jaxheads.s2._pattern import Pattern as Pattern
