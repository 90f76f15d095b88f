"""Budgeted caches: which cached tokens does each head keep?"""

from jaxheads.kvcache.compact import Packed as Packed
from jaxheads.kvcache.compact import compact as compact
from jaxheads.kvcache.expected import ExpectedAttention as ExpectedAttention
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
from jaxheads.kvcache.reread import keep_best as keep_best
from jaxheads.kvcache.reread import reread_scores as reread_scores
from jaxheads.kvcache.scorers import Chance as Chance
from jaxheads.kvcache.scorers import KeyNorm as KeyNorm
from jaxheads.kvcache.scorers import Scorer as Scorer
from jaxheads.kvcache.scorers import WindowAttention as WindowAttention
from jaxheads.kvcache.shard_only import ShardOnly as ShardOnly
from jaxheads.kvcache.static_heads import StaticHeads as StaticHeads
from jaxheads.kvcache.streaming import Streaming as Streaming
from jaxheads.kvcache.task_kv import TaskKV as TaskKV
