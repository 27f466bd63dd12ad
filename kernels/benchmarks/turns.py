"""The time of GPU work without the host's: calls in CUDA graphs, the graphs in turns, so that a busy moment meets them all."""

import statistics
from typing import Any, Callable, Dict, List, Tuple

import torch

__all__ = ["MOST", "floor", "turns"]

MOST, LEAST = 64, 4  # calls in a graph
REPLAY = 3000  # microseconds that a graph should take: long beside the events around it, short enough for many rows
Call = Callable[[int], Any]


def captured(call: Call, count: int) -> "torch.cuda.CUDAGraph":
    """A graph of `count` calls."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return graph


def replayed(graph: "torch.cuda.CUDAGraph") -> float:
    """Microseconds of the whole graph."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return 1000 * start.elapsed_time(stop)


def sized(call: Call) -> Tuple["torch.cuda.CUDAGraph", int]:
    """A graph of as many calls as take about REPLAY, and their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and gives libraries their workspaces, before anything is recorded
        for index in range(3):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    few = captured(call, LEAST)
    replayed(few)
    count = max(LEAST, min(MOST, int(REPLAY * LEAST / replayed(few))))
    return (few if count == LEAST else captured(call, count)), count


def turns(candidates: Dict[str, Call], rounds: int) -> Dict[str, float]:
    """Median microseconds of one call of each candidate; their graphs alternate."""
    graphs = {name: sized(call) for name, call in candidates.items()}
    times: Dict[str, List[float]] = {name: [] for name in candidates}
    for index in range(-1, rounds):
        for name, (graph, count) in graphs.items():
            spent = replayed(graph) / count
            if index >= 0:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def floor(rounds: int) -> float:
    """Microseconds of two kernel launches in a graph that do next to nothing."""
    one = torch.zeros(1, device="cuda")

    def two(_: int) -> None:
        one.add_(1)
        one.add_(1)

    return turns({"floor": two}, rounds)["floor"]
