"""Flax NNX modules: parameters here, arithmetic in `moh` and `s2`."""

from jaxheads.nn._attention import HeadAttention as HeadAttention
from jaxheads.nn._attention_fn import attention_fn as attention_fn
from jaxheads.nn._moh_attention import MoHAttention as MoHAttention
from jaxheads.nn._s2_attention import S2Attention as S2Attention
from jaxheads.nn._variables import AuxLoss as AuxLoss
from jaxheads.nn._variables import RoutingStats as RoutingStats
from jaxheads.nn._variables import auxiliary_loss as auxiliary_loss
