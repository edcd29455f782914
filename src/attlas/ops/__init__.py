"""Public functions: validate, select, call. See `attlas.ops.explain` for which implementation runs and why."""

from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.ops.explain import explain
from attlas.ops.merge import merge

__all__ = ["attention", "attention_cached", "explain", "merge"]
