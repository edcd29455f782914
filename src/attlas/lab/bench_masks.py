"""How long masks take to compile and what that needs, and the same against FlexAttention's `create_block_mask`.

python -m attlas.lab.bench_masks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attlas.lab.measure import Thunk, Timing, machine_stamp, peak_allocated, peak_rss, time_interleaved
from attlas.masks import BlockMap, Causal, Dilated, Documents, Global, Grid, Mask, Random, Sinks, Window
from attlas.masks.compile import compile_mask

BLOCK = 128
LONG, SHORT = 1 << 20, 1 << 15  # tokens: compiled alone, and compiled by FlexAttention too


def long_masks(tokens: int = LONG) -> dict[str, Mask]:
    """Masks that people compile for long sequences."""
    return {
        "sliding window": Causal() & Window.last(4096),
        "window and sinks": Causal() & Window.last(1024) | Sinks(4),
        "documents": Causal() & Documents([1000, 300, 4000, 77] * (tokens // 5377)),
        "longformer": Window(256, 256) | Dilated(256, 256, 4) | Global(range(16)),
        "bigbird": Window(96, 96) | Global(range(128)) | Random(3, 64, 0, max(3, tokens // 64)),
        "causal": Causal(),
    }


def run(*, tokens: int = LONG, peer_tokens: int = SHORT, repeats: int = 7, rss: bool = True) -> dict[str, Any]:
    """Measure everything. Times are medians of cold compiles (nothing is cached) with their quartiles, memory is in bytes.

    tokens       length at which the masks of `long_masks` are compiled
    peer_tokens  length at which the window is compiled by both; FlexAttention needs peer_tokens ** 2 bytes, several times over
    rss          also measure resident memory, in a process of its own
    """
    long = [measure(name, mask, tokens, repeats, rss) for name, mask in long_masks(tokens).items()]
    return {"machine": machine_stamp(), "block": BLOCK, "long": long, "peer": against_flex(peer_tokens, repeats)}


def measure(name: str, mask: Mask, tokens: int, repeats: int, rss: bool = True) -> dict[str, Any]:
    """Cold compiles of one mask at one length."""
    found = compiled(mask, tokens)
    assert found.count() == mask.count((tokens, tokens)), f"{name}: the map and the count disagree"
    times = time_interleaved({name: lambda: compiled(mask, tokens)}, repeats, max_seconds=20)
    return {
        "name": name,
        "mask": repr(mask) if len(repr(mask)) < 100 else name,
        "tokens": tokens,
        "blocks": found.nnz,
        "tiles": len(found.tiles),
        "density": found.density(),
        "map_bytes": found.nbytes,
        "seconds": times[name].to_dict(),
        "peak_bytes": peak_allocated(lambda: compiled(mask, tokens)),
        "rss_growth": peak_rss(_compiled, (mask, tokens), setup=_warmed).growth if rss else None,
    }


def compiled(mask: Mask, tokens: int) -> BlockMap:
    """Compile without the cache."""
    return compile_mask(mask, Grid.dense(tokens, tokens), BLOCK, BLOCK)


def _warmed(mask: Mask, tokens: int) -> tuple[Mask, int]:
    """Pages that the first use of torch and of each leaf touches are not the compile's."""
    compiled(mask, 1024)
    return mask, tokens


def _compiled(given: tuple[Mask, int]) -> BlockMap:
    return compiled(*given)


def against_flex(tokens: int, repeats: int = 7) -> dict[str, Any]:
    """The sliding window compiled by attlas and by `create_block_mask` on the CPU, one after the other in turns.

    The two results are compared block by block before anything is timed.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    left = 4095
    mask = Causal() & Window(left, 0)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k <= left)

    def flex() -> Any:
        return create_block_mask(allowed, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)

    agree = _same_blocks(compiled(mask, tokens), flex())
    assert agree, "attlas and FlexAttention disagree about the blocks of a window"
    contenders: dict[str, Thunk] = {"attlas": lambda: compiled(mask, tokens), "flex": flex}
    times: dict[str, Timing] = time_interleaved(contenders, repeats, warmup=0, min_sample=0, max_seconds=60)
    return {
        "mask": repr(mask),
        "tokens": tokens,
        "agree": agree,
        "attlas": times["attlas"].to_dict(),
        "flex": times["flex"].to_dict(),
        "ratio": times["flex"].median / times["attlas"].median,
    }


def _same_blocks(ours: BlockMap, theirs: Any) -> bool:
    """Whether both list the same full and the same partial blocks."""
    rows = ours.rows
    for full, counts, columns in (
        (True, theirs.full_kv_num_blocks, theirs.full_kv_indices),
        (False, theirs.kv_num_blocks, theirs.kv_indices),
    ):
        chosen = (ours.tile_ids == -1) == full
        mine = torch.zeros(ours.nq, ours.nk, dtype=torch.bool)
        mine[rows[chosen], ours.cols[chosen].long()] = True
        listed = torch.arange(columns.shape[-1]) < counts[0, 0][:, None]
        other = torch.zeros_like(mine)
        other[listed.nonzero()[:, 0], columns[0, 0][listed].long()] = True
        if not torch.equal(mine, other):
            return False
    return True


def table(result: dict[str, Any]) -> str:
    """The result of `run` for people to read."""
    head = ("mask", "tokens", "time", "quartiles", "touched blocks", "tiles", "map", "peak", "peak RSS")
    lines = [head]
    for r in result["long"]:
        t = r["seconds"]
        spread = f"{_time(t['low'])} ... {_time(t['high'])}"
        sizes = (_size(r["map_bytes"]), _size(r["peak_bytes"]), "-" if r["rss_growth"] is None else _size(r["rss_growth"]))
        lines.append((r["name"], f"{r['tokens']:,}", _time(t["median"]), spread, f"{r['blocks']:,}", str(r["tiles"]), *sizes))
    p = result["peer"]
    against = (
        f"{p['mask']}, {p['tokens']:,} tokens, same blocks: attlas {_time(p['attlas']['median'])}, "
        f"flex create_block_mask {_time(p['flex']['median'])}, {p['ratio']:,.0f} times faster"
    )
    return "\n".join([*_aligned(lines), "", against])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB"


if __name__ == "__main__":
    print(table(run()))
