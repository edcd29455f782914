"""What a part saves, it and the other kinds of parts load."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from attlas.cache import PagedPart, RingPart
from attlas.errors import AttlasError, DataError
from cache_numbers import all_parts, positions, spec, write


@pytest.mark.parametrize("source", range(4))
@pytest.mark.parametrize("carrier", ["torch", "safetensors"])
def test_what_one_part_saved_every_part_that_can_hold_it_loads(source, carrier, tmp_path):
    part = all_parts(3)[source]
    for n in (29, 1, 3):
        write(part, n, 0)
        part.end_step()
    write(part, 7, 2)
    part.end_step()
    state = part.save()
    if carrier == "torch":
        torch.save(state, tmp_path / "cache.pt")
        state = torch.load(tmp_path / "cache.pt", weights_only=True)
    else:
        state = load_safetensors(save_safetensors(state))
    for target in all_parts(3):
        write(target, 5, 1)
        whole = source in (0, 2)
        if not whole and target.spec.window is None:
            with pytest.raises(DataError, match=r"lacks|holds every token"):
                target.load(state)
            assert target.lengths == (0, 5, 0) and positions(target, 1) == [0, 1, 2, 3, 4]
            continue
        target.load(state)
        assert target.lengths == (33, 0, 7) and positions(target, 2) == list(range(7))
        assert set(positions(target, 0)) >= {0, 1, *range(23, 33)}
        write(target, 2, 0)
        target.end_step()
        assert set(positions(target, 0)) >= {0, 1, *range(25, 35)}
        if isinstance(target, PagedPart):
            target.pool.check()


def test_bad_states_are_refused():
    part = RingPart(spec(5, 2), 2)
    write(part, 20)
    part.end_step()
    good = part.save()
    bad = [
        {k: v for k, v in good.items() if k != "gaps"},
        good | {"more": torch.zeros(1)},
        good | {"lengths": good["lengths"][:1]},
        good | {"lengths": torch.tensor([19, 0])},
        good | {"lengths": torch.tensor([20, -1])},
        good | {"gaps": torch.tensor([[2, 17], [0, 0]])},
        good | {"gaps": torch.tensor([[1, 14], [0, 0]])},
        good | {"tensors.v": good["tensors.v"].double()},
        good | {"tensors.v": good["tensors.v"][1:]},
    ]
    for state in bad:
        with pytest.raises(DataError):
            part.load(state)
        assert part.lengths == (20, 0) and len(positions(part)) == 7
    with pytest.raises(AttlasError, match="max_len=10"):
        RingPart(spec(5, 2), 2, 10).load(good)
    part.load(good)
    assert sorted(positions(part)) == [0, 1, *range(15, 20)]


def test_loading_a_shorter_window_keeps_what_it_asks_for():
    wide = RingPart(spec(19, 4), 1)
    write(wide, 50)
    wide.end_step()
    narrow = RingPart(spec(6, 2), 1)
    narrow.load(wide.save())
    assert sorted(positions(narrow)) == [0, 1, *range(44, 50)]
    with pytest.raises(DataError, match="needs the first 4 and the last 18 tokens"):
        wide.load(narrow.save())
