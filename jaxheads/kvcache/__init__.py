"""Budgeted caches: which cached tokens does each head keep?"""

from jaxheads.kvcache.policy import CacheShape as CacheShape
from jaxheads.kvcache.policy import LayerWindow as LayerWindow
from jaxheads.kvcache.policy import Plan as Plan
from jaxheads.kvcache.policy import Policy as Policy
