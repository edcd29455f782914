"""The words of the report: what came out, how it was measured, and what it does not show. All of it is made from the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attlas.lab import units
from attlas.lab.build import RECALL_HEAD_DIM
from attlas.lab.options import REFERENCE
from attlas.lab.results import Results


@dataclass(frozen=True)
class Headline:
    """question, who answers it best, the figure, and what to know about it."""

    question: str
    label: str
    big: str
    unit: str
    note: str


def title(results: Results) -> str:
    number = len(results.mechanisms)
    return f"{units.words(number).capitalize()} attention {_s('mechanism', number)}, one machine, equal conditions"


def lede(results: Results) -> str:
    stages = results.records.keys() - {"gate"}
    parts = []
    if "text" in stages:
        parts.append("trained on the same bytes of real text in models of the same size")
    if "recall" in stages:
        parts.append("tested on associative recall")
    if "speed" in stages:
        parts.append("timed in turns against the length of the sequence")
    if "cache" in stages:
        parts.append("weighed by the cache that decoding needs")
    return f"Each was {units.listed(parts)}." if parts else "Nothing has been measured yet."


def _s(word: str, number: int) -> str:
    return word if number == 1 else word + "s"


# ---------------------------------------------------------------------------------------------------- headlines


def headlines(results: Results) -> list[Headline]:
    rows = results.rows()
    found = [_bits(results, rows), _recall(rows), *(_fastest(rows, what) for what in ("prefill", "decode")), _cache(rows)]
    return [h for h in found if h is not None]


def _bits(results: Results, rows: list[dict[str, Any]]) -> Headline | None:
    rows = [r for r in rows if r["bits_per_byte"] is not None]
    if not rows:
        return None
    best = min(rows, key=lambda r: r["bits_per_byte"])
    label = best["mechanism"]
    ties = []
    for r in rows:
        gap, error = results.bits_between(r["mechanism"], label)
        if r is not best and gap is not None and error is not None and gap < 2 * error:
            ties.append(r["mechanism"])
    runs = "one seed" if results.options["seeds"] == 1 else f"{units.words(results.options['seeds'])} seeds"
    if ties:
        note = f"{runs}; within twice the error of it: {units.listed(ties)}"
    elif label != REFERENCE and best["bits_to_causal"] is not None:
        note = f"{runs}; {units.signed(best['bits_to_causal'])} to causal; nobody else is within twice the error"
    else:
        note = f"{runs}; nobody else is within twice the error"
    return Headline("Best language model", label, units.fixed(best["bits_per_byte"]), "bits per byte", note)


def _recall(rows: list[dict[str, Any]]) -> Headline | None:
    rows = [r for r in rows if r["recall"] is not None]
    if not rows:
        return None
    solved = [r for r in rows if r["recall"] >= 0.99]
    # Runs stop once they answer 99 %, so among those that do the one that got there first is the best.
    best = min(solved, key=lambda r: r["recall_steps"]) if solved else max(rows, key=lambda r: r["recall"])
    if not solved:
        note = "nobody reached 99 % in this budget: read the order as speed of learning, not as ability"
    else:
        note = (
            f"{units.words(len(solved))} of {units.words(len(rows))} reached 99 %; this one after {best['recall_steps']:,} steps"
        )
    return Headline("Best recall", best["mechanism"], units.percent(best["recall"]), "of queries", note)


def _fastest(rows: list[dict[str, Any]], what: str) -> Headline | None:
    rows = [r for r in rows if r[f"{what}_seconds"] is not None]
    if not rows:
        return None
    best = min(rows, key=lambda r: r[f"{what}_seconds"])
    ratio, length = best[f"{what}_to_causal"], best["length"]
    note = f"{length:,} tokens" if what == "prefill" else f"one token after {length:,}"
    if best["mechanism"] == REFERENCE or ratio is None:
        note += "; nothing else is faster here"
    else:
        note += f", {1 / ratio:.2g} times as fast as causal"
        if what == "prefill" and best["faster_than_causal_from"]:
            note += f"; ahead of it from {best['faster_than_causal_from']:,} on"
    value, _, unit = units.seconds(best[f"{what}_seconds"]).partition(" ")
    return Headline(f"Fastest {what}", best["mechanism"], value, unit, note)


def _cache(rows: list[dict[str, Any]]) -> Headline | None:
    rows = [r for r in rows if r["cache_bytes"]]
    if not rows:
        return None
    best = min(rows, key=lambda r: r["cache_bytes"])
    full = next((r["cache_bytes"] for r in rows if r["mechanism"] == REFERENCE), None)
    ties = [r["mechanism"] for r in rows if r is not best and r["cache_bytes"] == best["cache_bytes"]]
    note = f"one layer after {best['cache_length']:,} tokens"
    if full and full > best["cache_bytes"]:
        note += f", {full / best['cache_bytes']:.3g} times less than causal"
    if ties:
        note += f"; the same for {units.listed(ties)}"
    value, _, unit = units.nbytes(best["cache_bytes"]).partition(" ")
    return Headline("Smallest cache", best["mechanism"], value, unit, note)


# ---------------------------------------------------------------------------------------------------- method and limits


def method(results: Results) -> list[str]:
    """How it was measured, one paragraph per stage."""
    plan, options = results.plan, results.options
    out = [
        "Gate: before anything else every mechanism must give finite outputs and gradients, must not look at later tokens, "
        "and must decode token by token what one prefill gives. A mechanism whose gate is red is neither trained nor timed."
    ]
    if plan.get("text"):
        out.append(_method_text(plan, options))
    if plan.get("recall"):
        out.append(_method_recall(plan, options["heads"]))
    if plan.get("speed"):
        out.append(_method_speed(options))
    if plan.get("cache"):
        out.append(
            "Cache: the markers are the bytes of real caches after that many tokens went through the layer, the lines are the "
            "formula that attlas gives for them."
        )
    return out


def _method_text(plan: dict[str, Any], options: dict[str, Any]) -> str:
    text, corpus = plan["text"], plan["corpus"]
    rates = units.listed([f"{r:.2g}" for r in text["rates"]])
    context, tokens = options["context"], text["steps"] * text["batch"] * options["context"]
    return (
        f"Language: a decoder over bytes with {options['layers']} layers of width {options['dim']} (pre-norm, RMSNorm, SwiGLU, "
        f"tied embedding) and the mechanism in every layer; the feed-forward width is adjusted until all models have the same "
        f"number of weights to 2 %. Each sees the same {tokens:,} bytes in the same order: {text['steps']:,} steps of "
        f"{text['batch']} windows of {context} bytes, AdamW, learning rate {rates}{_best_of(text['rates'])}. "
        f"Text: {corpus['source']}, {corpus['train_documents']:,} documents to train on and "
        f"{corpus['validation_documents']:,} held out, split by file, copies removed (fingerprint {corpus['fingerprint']}; "
        f"{corpus['overlap']:.1%} of the long lines held out also occur in training). Quality is bits per byte on windows of "
        "the held-out files, each byte predicted from those before it in its window; the error is that of the choice of windows."
    )


def _best_of(rates: list[float]) -> str:
    return ", the best of them reported" if len(rates) > 1 else ""


def _method_recall(plan: dict[str, Any], heads: int) -> str:
    recall, task = plan["recall"], plan["task"]
    return (
        f"Recall: multi-query associative recall (Zoology, arXiv:2312.04927) with {task['pairs']} pairs of key and value in "
        f"{task['length']} tokens, a vocabulary of {task['vocab']}, queries placed by the paper's power law and fillers left "
        f"blank. Two layers of width {RECALL_HEAD_DIM * heads}: short convolution, the mechanism, a small feed-forward network; "
        f"weights equal to 2 %. Fresh examples every step, at most {recall['steps']:,} steps of {recall['batch']}; a run stops "
        "once it answers 99 % of held-out queries."
    )


def _method_speed(options: dict[str, Any]) -> str:
    return (
        f"Speed: one layer with its projections, width {options['layer_dim']}, {options['heads']} heads, batch 1, float32. At "
        "each length all mechanisms and operations are timed in turns, in an order that rotates; shown are medians, bars are "
        "quartiles. Train is forward and backward; decode is one token behind that many cached ones; peak memory is the most "
        "that tensors held at once in a training step. Exponents are least-squares fits on log axes through the four longest "
        "lengths, with decode as measured, overheads included."
    )


def limits(results: Results) -> list[str]:
    """What a reader must not conclude."""
    plan, options = results.plan, results.options
    out = []
    if plan.get("text"):
        out += _limits_text(results)
    if options["seeds"] == 1 and (plan.get("text") or plan.get("recall")):
        out.append("One seed: another start may change the order of neighbours. --seeds 3 --minutes 12 shows the spread.")
    recall = [r["recall"] for r in results.rows() if r["recall"] is not None]
    if recall and max(recall) < 0.99:
        out.append("No mechanism solved recall within its steps, so the budget, not the mechanisms, may be what is measured.")
    if recall:
        out.append("A mechanism that fails recall here has not learned it in this budget; that is no proof that it cannot.")
    if plan.get("speed"):
        out.append(
            "Times are those of attlas's own implementations on this machine, in float32 at batch 1. Another processor, a GPU or "
            "another library's kernels can reverse an order that rests on constants; exponents travel better than milliseconds."
        )
        out.append("One layer is timed. A whole model dilutes the differences by everything in it that is not attention.")
    if options["window"] is None:
        span = max(8, options["context"] // 8)
        out.append(f"Windows and blocks hold {span} keys unless a card above says otherwise; wider ones trade speed for quality.")
    return out


def _limits_text(results: Results) -> list[str]:
    weights = next((m["parameters"] for m in results.mechanisms.values() if m["parameters"]), 0)
    out = [
        f"These are models of {weights:,} weights trained for minutes. Orders change with scale, data and training time; small "
        "differences early in training say little about where training ends.",
        f"Every text window is {results.options['context']} bytes: what a mechanism does with a long context is not in the bits "
        "per byte.",
    ]
    if len(results.plan["text"]["rates"]) == 1:
        out.append("One learning rate was used for all; a mechanism that wants another one looks worse than it is.")
    return out
