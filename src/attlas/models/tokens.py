"""How the tokens of a call lie: dense, padded on either side, or packed; brought to one form, and outputs brought back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import ShapeError, UnsupportedError
from attlas.nn.packing import Rows, consecutive_starts
from attlas.shapes import SeqInfo, describe


@dataclass(frozen=True)
class Tokens:
    """Token ids in the form that the layers compute in.

    ids        dense [B, T] with seq None, or packed [T] with seq (starts resolved)
    positions  absolute position of each id: [T] for dense ids, [T] packed
    irregular  the positions again where they are not consecutive within a sequence, else None (then `seq` says it all)
    """

    ids: Tensor
    seq: SeqInfo | None
    positions: Tensor
    irregular: Tensor | None
    rows: Rows | None

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        seq: SeqInfo | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        held: Sequence[int] | None,
        *,
        packed: bool = False,
    ) -> Tokens:
        """`held` = tokens that each cache row holds (None = no cache); `packed` asks for the packed form even of a full batch."""
        call = f"Transformer: got {describe(tokens=tokens, attention_mask=attention_mask, positions=positions)}"
        if tokens.dim() not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ShapeError(f"{call}: tokens must be integers, [B, T] or packed [T]")
        plain = tokens.dim() == 2 and seq is None and positions is None and held is None and not packed
        rows = cls._rows(tokens, seq, attention_mask, call)
        if plain and rows.index is None:
            return cls(tokens, None, torch.arange(tokens.shape[1], device=tokens.device), None, None)
        ids = None if seq is None else seq.ids
        starts = cls._starts(rows, None if seq is None else seq.starts, ids, held, call)
        irregular = None
        if positions is not None:
            flat = rows.pack_positions(positions, call)
            given = consecutive_starts(flat, rows.lengths)
            irregular = flat if given is None else None
            starts = starts if given is None else given
        resolved = SeqInfo(rows.lengths, starts=starts, ids=ids)
        where = resolved.positions(tokens.device) if irregular is None else irregular
        return cls(rows.pack(tokens), resolved, where, irregular, rows)

    @staticmethod
    def _rows(tokens: Tensor, seq: SeqInfo | None, mask: Tensor | None, call: str) -> Rows:
        if mask is None:
            if seq is None and tokens.dim() == 1:
                seq = SeqInfo((tokens.shape[0],))
            # Rows tells dense from packed by the rank of an activation, which has one dimension more than the tokens.
            return Rows.of(tokens.unsqueeze(-1), seq, call)
        if tokens.dim() != 2 or seq is not None or mask.shape != tokens.shape:
            raise ShapeError(f"{call}: attention_mask goes with dense tokens [B, T] of its own shape, and not with seq")
        return padded_rows((mask != 0).to(tokens.device), call)

    @staticmethod
    def _starts(
        rows: Rows, given: tuple[int, ...] | None, ids: tuple[int, ...] | None, held: Sequence[int] | None, call: str
    ) -> tuple[int, ...]:
        if held is None:
            return given if given is not None else (0,) * len(rows.lengths)
        wanted = ids if ids is not None else tuple(range(len(rows.lengths)))
        if max(wanted, default=-1) >= len(held):
            raise ShapeError(f"{call}: sequences stand in cache rows {wanted}, the cache has {len(held)} rows")
        return tuple(held[i] for i in wanted)

    @property
    def last_position(self) -> int:
        """The largest position, -1 when there are no tokens."""
        if self.irregular is not None:
            return int(self.irregular.max()) if self.irregular.numel() else -1
        if self.seq is None:
            return self.ids.shape[1] - 1
        return max((first + n - 1 for first, n in zip(self.seq.first, self.seq.lengths, strict=True) if n), default=-1)

    def pack(self, values: Tensor, name: str) -> Tensor:
        """Bring another tensor of the shape of the caller's tokens (token types) to the form of `ids`."""
        shape = self.ids.shape if self.rows is None or self.rows.width is None else (len(self.rows.lengths), self.rows.width)
        if values.shape != shape:
            raise ShapeError(
                f"Transformer: {name} must have the shape {list(shape)} of the tokens; got {describe(**{name: values})}"
            )
        return values if self.rows is None else self.rows.pack(values)

    def unpack(self, values: Tensor) -> Tensor:
        """Bring an output [..., C] back to the form of the caller's tokens; padding becomes 0."""
        return values if self.rows is None else self.rows.unpack(values)


def padded_rows(mask: Tensor, call: str) -> Rows:
    """The layout of a batch [B, T] whose tokens are where `mask` is True: one run in each row, anywhere (reads the mask on the
    host)."""
    width = mask.shape[1]
    lengths = mask.sum(-1)
    # Inside one run of tokens, a row changes from padding to token at most once.
    begins = torch.nn.functional.pad(mask, (1, 0))[:, :-1].logical_not() & mask
    gaps = (begins.sum(-1) > 1).nonzero().flatten().tolist()
    if gaps:
        raise UnsupportedError(
            f"{call}: attention_mask has padding between the tokens of rows {gaps}; only left or right padding is known"
        )
    counts = tuple(int(n) for n in lengths.tolist())
    full = all(n == width for n in counts)
    return Rows(counts, width, None if full else mask.flatten().nonzero().flatten())
