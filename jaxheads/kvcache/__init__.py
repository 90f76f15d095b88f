"""Budgeted caches: which cached tokens does each head keep?"""

from jaxheads.kvcache.compact import Packed as Packed
from jaxheads.kvcache.compact import compact as compact
from jaxheads.kvcache.full import Full as Full
from jaxheads.kvcache.memory import CacheMemory as CacheMemory
from jaxheads.kvcache.memory import cache_memory as cache_memory
from jaxheads.kvcache.names import POLICIES as POLICIES
from jaxheads.kvcache.names import make_policy as make_policy
from jaxheads.kvcache.policy import CacheShape as CacheShape
from jaxheads.kvcache.policy import LayerWindow as LayerWindow
from jaxheads.kvcache.policy import Plan as Plan
from jaxheads.kvcache.policy import Policy as Policy
from jaxheads.kvcache.ranked import Ranked as Ranked
from jaxheads.kvcache.scorers import WindowAttention as WindowAttention
from jaxheads.kvcache.streaming import Streaming as Streaming
from jaxheads.kvcache.task_kv import TaskKV as TaskKV
