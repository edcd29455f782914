"""`/v1/engine`: the state of the moment, for the page at `/`. Another key's requests and prompts are counted, not shown."""

from __future__ import annotations

import time
from dataclasses import asdict, is_dataclass
from typing import Any

from attlas.serve.metrics import usage
from attlas.serve.service import Service

MOST_REQUESTS, MOST_NODES, MOST_PAGES = 200, 400, 16384


async def overview(service: Service, owner: str, *, draining: bool) -> dict[str, Any]:
    """Statistics, requests, the cache tree and the page map. Tokens are numbers of tokens: no text leaves the server here."""
    now = time.monotonic()
    mine = [flight for flight in service.flights.values() if flight.owner == owner]
    stats, cache = await service.worker.ask(lambda engine: (engine.stats(), cache_picture(engine, f"{owner}\0")))
    return {
        "model": service.served.name,
        "max_len": service.served.max_len,
        "max_running": service.served.max_running,
        "uptime_seconds": int(time.time()) - service.started,
        "draining": draining,
        "stats": {
            "running": stats.running,
            "waiting": stats.waiting,
            "swapped": stats.swapped,
            "preemptions": stats.preemptions,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "generated_tokens": stats.generated_tokens,
            "hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            "cache_usage": usage(stats),
            "steps": stats.steps,
            "last_step_seconds": stats.last_step_seconds,
            "cache": asdict(stats.cache) if is_dataclass(stats.cache) and not isinstance(stats.cache, type) else None,
        },
        "requests": [
            {
                "id": flight.id[:8],
                "prompts": len(flight.jobs),
                "answers": flight.size,
                "open": len(flight.open),
                "prompt_tokens": flight.prompt_tokens,
                "cached_tokens": flight.cached_tokens,
                "tokens": flight.times.tokens,
                "seconds": round(now - flight.times.arrival, 3),
                "first_token": flight.times.first is not None,
            }
            for flight in mine[:MOST_REQUESTS]
        ],
        "requests_of_others": len(service.flights) - len(mine),
        **cache,
    }


def cache_picture(engine: Any, namespace: str) -> dict[str, Any]:
    """The page map, a character for each page ("." free, "c" cached, "1" ... "9" held by so many rows), and the prefix tree of
    the asking key. Called on the engine's thread."""
    cache = getattr(engine, "cache", None)
    if cache is None:
        return {"pages": "", "pages_per_cell": 1, "tree": []}
    nodes = [node for node in cache.walk() if node.salt.startswith(namespace)]
    cells, each = page_cells(cache.page_map())
    tree = [
        {"depth": n.depth, "tokens": len(n.tokens), "pages": sum(n.pages), "locks": n.locks, "age": n.age}
        for n in nodes[:MOST_NODES]
    ]
    return {"pages": cells, "pages_per_cell": each, "tree": tree, "tree_left_out": max(0, len(nodes) - MOST_NODES)}


def page_cells(states: list[int]) -> tuple[str, int]:
    """One character for so many pages, the fullest of them counts; and how many pages that is."""
    each = -(-len(states) // MOST_PAGES) or 1
    fullest = [max(states[i : i + each]) for i in range(0, len(states), each)]
    return "".join("." if n < 0 else "c" if n == 0 else str(min(n, 9)) for n in fullest), each
