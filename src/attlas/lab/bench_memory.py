"""Peak memory of one training step of attention, in a process of its own."""

from __future__ import annotations

from typing import Any

from attlas.lab.bench_attention import peak_memory
from attlas.lab.measure import machine_stamp


def run(*, tokens: int = 32768, heads: int = 8, dim: int = 64, impls: str = "blocked,auto") -> dict[str, Any]:
    """Measure a causal forward and backward pass in fp32.

    tokens, heads, dim  of q, k, v
    impls               implementations, separated by commas
    """
    rows = [peak_memory(tokens, heads, dim, impl=impl.strip()) for impl in impls.split(",")]
    return {"machine": machine_stamp(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    return "\n".join(
        f"{row['impl']:10} {row['tokens']} tokens: peak {row['growth'] / 2**20:.0f} MiB beyond q, k, v and the incoming gradient "
        f"= {row['ratio']:.2f} times the bytes of q, k, v and out ({row['base'] / 2**20:.0f} MiB)"
        for row in result["rows"]
    )
