"""Attention in which every head sees its own part of the context."""

from pallas_kernels.head_attention.api import head_attention as head_attention
from pallas_kernels.head_attention.cases import Case as Case
from pallas_kernels.head_attention.cases import Part as Part
from pallas_kernels.head_attention.cases import attend_case as attend_case
from pallas_kernels.head_attention.contexts import HeadContexts as HeadContexts
from pallas_kernels.head_attention.contexts import Ranged as Ranged
from pallas_kernels.head_attention.contexts import Rule as Rule
from pallas_kernels.head_attention.contexts import Strided as Strided
from pallas_kernels.head_attention.contexts import Table as Table
from pallas_kernels.head_attention.tiling import Tiling as Tiling
