"""The timer of the benchmarks that run on a GPU: CUDA events, ways that take turns, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """What `take_turns` found of one way."""

    ms: float
    """Median of the turns."""
    peak_bytes: int
    """Memory that the last turn took at most, above what was allocated before it."""
    output: Any
    """Of the last turn."""


def take_turns(
    ways: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_ups: int = 3,
    before: Callable[[str], None] = lambda name: None,
    wait: bool = True,
    swap: bool = False,
) -> dict[str, Timing]:
    """Time several ways, one after the other, so that all of them run at the clocks that the others leave.

    Args:
        ways: by name, what to time.
        repeats: turns of each that count.
        warm_ups: turns of each before those.
        before: called with the name before each turn, outside of the time.
        wait: wait for the device after each turn. Otherwise nothing waits until the end: as in the middle of a training
            step the host is ahead, and the clocks are what the power allows. A GPU that has rested is faster for some
            time.
        swap: every other turn goes through the ways backwards.
    """
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    names = list(ways)
    for turn in range(warm_ups + repeats):
        if turn == warm_ups and not wait:
            torch.cuda._sleep(20_000_000)
        for name in reversed(names) if swap and turn % 2 == 0 else names:
            # The output of the turn before would count as memory of this one.
            outputs.pop(name, None)
            before(name)
            allocated = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            outputs[name] = ways[name]()
            end.record()
            if wait:
                end.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - allocated
            if turn >= warm_ups:
                spans[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: Timing(statistics.median(start.elapsed_time(end) for start, end in spans[name]), peaks[name], output)
        for name, output in outputs.items()
    }


def time_one(way: Callable[[], Any], *, repeats: int) -> Timing:
    """Time a single way, and wait for the device after each turn."""
    return take_turns({"way": way}, repeats=repeats)["way"]
