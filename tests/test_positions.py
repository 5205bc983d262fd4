"""Slots and survivors, against a list from which tokens are deleted one by one."""

from __future__ import annotations

import pytest

from streaming_llm import StreamingConfig
from streaming_llm.positions import StreamLayout

CONFIGS = [(4, 8), (0, 5), (1, 1), (3, 1), (0, 1)]


def survivors_by_deletion(n_sink: int, window_size: int, n_seen: int) -> list[int]:
    tokens: list[int] = []
    for token in range(n_seen):
        if len(tokens) > n_sink + window_size:
            del tokens[n_sink]
        tokens.append(token)
    return tokens


@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
def test_slots_hold_the_survivors(n_sink, window_size):
    layout = StreamLayout(StreamingConfig(n_sink, window_size))
    slots: dict[int, int] = {}
    for token in range(5 * layout.capacity):
        slots[layout.slot(token)] = token
        assert sorted(slots.values()) == survivors_by_deletion(n_sink, window_size, token + 1)
        assert max(slots) < layout.capacity
        assert layout.kept(token + 1) == min(token + 1, n_sink + window_size)


@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
def test_blocks_leave_the_same_survivors(n_sink, window_size):
    layout = StreamLayout(StreamingConfig(n_sink, window_size))
    for start in range(2 * layout.capacity):
        for end in range(start + 1, start + 3 * layout.capacity):
            new = [token for tokens in layout.survivors(start, end) for token in tokens]
            expected = [token for token in survivors_by_deletion(n_sink, window_size, end) if token >= start]
            assert new == expected
            for tokens in layout.survivors(start, end):
                runs = layout.segments(tokens)
                assert [run.token + i for run in runs for i in range(run.length)] == list(tokens)
                for run in runs:
                    assert [layout.slot(run.token + i) for i in range(run.length)] == list(
                        range(run.slot, run.slot + run.length)
                    )


@pytest.mark.parametrize(
    ("n_sink", "window_size"), [(-1, 4), (4, 0), (4, -3), (1.0, 4), (4, "8"), (True, 4), (4, None)]
)
def test_bad_numbers_are_refused_by_name(n_sink, window_size):
    with pytest.raises(ValueError, match=r"n_sink|window_size"):
        StreamingConfig(n_sink, window_size)


def test_cache_size():
    assert StreamingConfig(4, 1020).cache_size == 1024
