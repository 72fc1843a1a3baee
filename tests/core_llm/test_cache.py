"""The cache, and attention behind a shared prefix, each against the plain computation in float64."""

import pytest
import torch

from core_llm.cache import KVCache, Prefix
from core_llm.config import LlamaConfig
from core_llm.errors import UserError
from core_llm.kernels import BACKENDS, Mask, attend_shared, shared

CONFIG = LlamaConfig(16, 1, 2, 1, 16, vocab_size=30, max_positions=40)


def numbered(batch: int, n: int, first: int) -> torch.Tensor:
    """Keys [B, 1, n, 8] whose entries are first, first + 1, ..."""
    return torch.arange(first, first + n).float()[None, None, :, None].expand(batch, 1, n, 8)


def held(cache: KVCache, row: int) -> list[int]:
    return cache.keys[0][row, 0, : int(cache.lengths[row]), 0].int().tolist()


@pytest.mark.parametrize("static", [False, True])
def test_ragged_rows_append_behind_their_own_ends(static: bool) -> None:
    cache = KVCache(CONFIG, 3, 12)
    cache.write(0, numbered(3, 5, 0), numbered(3, 5, 0))
    cache.advance(5, torch.tensor([5, 2, 4]))
    if static:
        cache.fix_shapes()
    for step in range(3):
        keys, _ = cache.write(0, numbered(3, 1, 50 + step), numbered(3, 1, 50 + step))
        cache.advance(1)
        assert keys.shape[2] == (12 if static else 6 + step)
    assert held(cache, 0) == [0, 1, 2, 3, 4, 50, 51, 52]
    assert held(cache, 1) == [0, 1, 50, 51, 52]
    assert held(cache, 2) == [0, 1, 2, 3, 50, 51, 52]


def test_finished_rows_give_their_room_free_and_harm_nobody() -> None:
    cache = KVCache(CONFIG, 2, 7)
    cache.write(0, numbered(2, 6, 0), numbered(2, 6, 0))
    cache.advance(6, torch.tensor([6, 1]))
    for step in range(6):  # row 0 would need 12 positions
        cache.forget_finished(1 + step)
        keys, _ = cache.write(0, numbered(2, 1, 50 + step), numbered(2, 1, 50 + step))
        cache.advance(1)
        assert keys.shape[2] == 2 + step
    assert held(cache, 1) == [0, 50, 51, 52, 53, 54, 55]


def test_a_full_cache_says_both_lengths() -> None:
    cache = KVCache(CONFIG, 1, 8)
    cache.advance(6)
    cache.check_room(2)
    with pytest.raises(UserError, match=r"9 tokens.*holds 8"):
        cache.check_room(3)
    with pytest.raises(UserError, match=r"41 positions.*has 40"):
        KVCache(CONFIG, 1, 41)
    prefix = Prefix(tuple(range(30)), [], [])
    with pytest.raises(UserError, match=r"41 positions.*has 40"):
        KVCache(CONFIG, 1, 11, prefix=prefix)


def test_positions_count_from_the_shared_prefix() -> None:
    cache = KVCache(CONFIG, 2, 8, prefix=Prefix((1, 2, 3), [], []))
    cache.advance(4, torch.tensor([4, 2]))
    assert cache.positions(2).tolist() == [[7, 8], [5, 6]]


@pytest.mark.parametrize(
    ("heads", "groups", "t", "p", "s"), [(4, 2, 1, 17, 9), (4, 1, 5, 33, 5), (3, 3, 7, 1, 12)]
)
@pytest.mark.parametrize("limit", [2**25, 200])
def test_shared_keys_attend_as_if_each_row_had_a_copy(
    heads: int, groups: int, t: int, p: int, s: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_MAX_SCORES", limit)  # the small one cuts the queries into blocks
    make = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, t, 8, generator=make)
    far_k, far_v = torch.randn(2, 1, groups, p, 8, generator=make)
    k, v = torch.randn(2, 3, groups, s, 8, generator=make)
    offsets = torch.tensor([s - t, 0, max(0, s - t - 1)])
    whole_k = torch.cat([far_k.expand(3, -1, -1, -1), k], dim=2).double()
    whole_v = torch.cat([far_v.expand(3, -1, -1, -1), v], dim=2).double()
    right = BACKENDS["reference"](q.double(), whole_k, whole_v, Mask.cached(offsets + p))
    out = attend_shared(q, far_k, far_v, k, v, Mask.cached(offsets))
    torch.testing.assert_close(out.double(), right, atol=2e-6, rtol=1e-5)


def test_shared_attention_in_bf16_is_as_exact_as_without_sharing() -> None:
    make = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 3, 16, generator=make).bfloat16()
    far_k, far_v = torch.randn(2, 1, 2, 21, 16, generator=make).bfloat16()
    k, v = torch.randn(2, 2, 2, 3, 16, generator=make).bfloat16()
    whole_k = torch.cat([far_k.expand(2, -1, -1, -1), k], dim=2)
    whole_v = torch.cat([far_v.expand(2, -1, -1, -1), v], dim=2)
    mask = Mask.cached(torch.full((2,), 21))
    right = BACKENDS["reference"](q.double(), whole_k.double(), whole_v.double(), mask)
    usual = (BACKENDS["sdpa"](q, whole_k, whole_v, mask).double() - right).abs().max()
    ours = attend_shared(q, far_k, far_v, k, v, Mask.causal())
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - right).abs().max() <= 2 * usual


def test_shared_attention_refuses_masks_that_may_hide_everything() -> None:
    x = torch.zeros(1, 1, 2, 8)
    for mask in (Mask.full(), Mask.keys(torch.ones(1, 2, dtype=torch.bool))):
        with pytest.raises(ValueError, match="causal or cached"):
            attend_shared(x, x, x, x, x, mask)
