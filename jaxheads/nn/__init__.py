"""Flax NNX modules: parameters here, arithmetic in `jaxheads.moh`."""

from jaxheads.nn._attention import MoHAttention as MoHAttention
from jaxheads.nn._variables import AuxLoss as AuxLoss
from jaxheads.nn._variables import RoutingStats as RoutingStats
from jaxheads.nn._variables import auxiliary_loss as auxiliary_loss
