"""The timer of the GPU benchmarks. It times several functions in turns with CUDA events, and takes medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """The timing of one function."""

    ms: float
    """Median of the turns."""
    peak_bytes: int
    """Peak of the memory that the last turn allocated."""
    output: Any
    """Output of the last turn."""


def take_turns(
    ways: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_ups: int = 3,
    before: Callable[[str], None] = lambda name: None,
    wait: bool = True,
    swap: bool = False,
) -> dict[str, Timing]:
    """Time several functions in turns, so that all of them run at the same power-limited clocks.

    Args:
        ways: the functions to time, by name.
        repeats: number of turns that count.
        warm_ups: number of turns before them, which do not count.
        before: called with the name before each turn. Its time does not count.
        wait: wait for the device after each turn. With False, nothing waits until the end. As in a training step, the
            host is then ahead of the device, and power limits the clocks. A GPU that was idle is faster for some time.
        swap: reverse the order of the functions in every other turn.
    """
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    names = list(ways)
    for turn in range(warm_ups + repeats):
        if turn == warm_ups and not wait:
            torch.cuda._sleep(20_000_000)
        for name in reversed(names) if swap and turn % 2 == 0 else names:
            # The output of the previous turn would count as memory of this turn.
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
    """Time a single function, and wait for the device after each turn."""
    return take_turns({"way": way}, repeats=repeats)["way"]
