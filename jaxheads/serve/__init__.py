"""Serving: continuous batching over a pool of pages of one head each.

`Engine` is all that a program needs: requests in, tokens out. The parts, from
the host to the device: `scheduler` (who runs next, on which pages), `device`
(programs by size), `programs` (a turn), `layers` (a model over pages), `shards`
(devices that share the heads). `replicas` puts several engines behind one
queue. What talks HTTP is in `http`, and needs the extra `serve`.
"""

from jaxheads.serve.engine import Engine as Engine
from jaxheads.serve.engine import EngineConfig as EngineConfig
from jaxheads.serve.engine import EngineStats as EngineStats
from jaxheads.serve.request import Event as Event
from jaxheads.serve.request import QueueFull as QueueFull
from jaxheads.serve.request import Request as Request
from jaxheads.serve.request import SamplingParams as SamplingParams
