"""Mixture-of-head attention: which queries does each head answer?"""

from jaxheads.moh._config import MoHConfig as MoHConfig
from jaxheads.moh._execution import ExecutionChoice as ExecutionChoice
from jaxheads.moh._execution import explain_execution as explain_execution
from jaxheads.moh._execution import moh_attention as moh_attention
from jaxheads.moh._losses import load_balance_loss as load_balance_loss
from jaxheads.moh._routing import RouterParams as RouterParams
from jaxheads.moh._routing import Routing as Routing
from jaxheads.moh._routing import init_router as init_router
from jaxheads.moh._routing import route as route
from jaxheads.moh._routing import route_by_query_norm as route_by_query_norm
from jaxheads.moh._routing import router_shapes as router_shapes
from jaxheads.moh._routing import router_size as router_size
