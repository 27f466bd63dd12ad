"""Processes side by side that try what may fail: each takes one job at a time, and one that dies is replaced.

    with Workers(work, 16) as workers:
        ran = workers.run(jobs, deadline)        work(job) for each: True where it returned, False where it failed, else None

A kernel that does not fit a device raises; one that reads where it must not leaves the process without a device, and one
that never ends holds it for good. A pool of the standard library would wait for such a process, so this one has a deadline
for all jobs and a limit for each, after which a process is ended and the job counts as failed.
"""

import multiprocessing
import multiprocessing.connection
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

__all__ = ["Workers"]

STILLBORN = 3  # processes in a row that end without having done a job, after which none will


def _serve(work: Callable[[Any], Any], channel: Any) -> None:
    """In a process of its own: answer every job with the text of its failure, or with nothing."""
    torch.set_num_threads(1)
    try:
        while True:
            job = channel.recv()
            try:
                work(job)
                answer = ""
            except Exception as error:  # every backend has its own error for a tile that does not fit
                answer = f"{type(error).__name__}: {str(error)[:200]}"
            channel.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):  # nobody asks any more
        return


class Workers:
    """At most `count` processes, started when there is work for them.

    Args:
        work: a function that a process can import. limit: seconds that one job may take, a process's start included.
    """

    def __init__(self, work: Callable[[Any], Any], count: int, limit: float = 120.0):
        self._work, self._count, self._limit = work, count, limit
        self._context = multiprocessing.get_context("spawn")  # a fork would share the device's state
        self._processes: Dict[Any, Any] = {}  # by the parent's end of the channel
        self._done = self._lost = 0
        self.failures: List[str] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        for channel in list(self._processes):
            self._end(channel)

    def run(self, jobs: Sequence[Any], deadline: float) -> List[Optional[bool]]:
        """Whether each job ran; None for those that were not done by `deadline`, a time of time.monotonic().

        Raises:
            RuntimeError: no process lives long enough to do a job.
        """
        ran: List[Optional[bool]] = [None] * len(jobs)
        waiting = list(range(len(jobs)))[::-1]
        busy: Dict[Any, Any] = {}  # channel -> (job, when it is overdue)
        while waiting or busy:
            now = time.monotonic()
            if now > deadline:
                break
            idle = [channel for channel in self._processes if channel not in busy]
            while waiting and len(busy) < self._count:
                channel = idle.pop() if idle else self._start()
                busy[channel] = waiting.pop(), now + self._limit
                try:
                    channel.send(jobs[busy[channel][0]])
                except OSError:  # it died while it was idle
                    waiting.append(busy.pop(channel)[0])
                    self._lose(channel, None)
            wake = min(deadline, *(overdue for _, overdue in busy.values())) if busy else now
            ready: List[Any] = multiprocessing.connection.wait(list(busy), max(0.0, wake - now))
            for channel in ready:
                index, _ = busy.pop(channel)
                try:
                    failure = channel.recv()
                except (EOFError, OSError):
                    ran[index] = False
                    self._lose(channel, jobs[index])
                    continue
                self._done += 1
                self._lost = 0
                ran[index] = not failure
                if failure:
                    self.failures.append(failure)
            for channel, (index, overdue) in list(busy.items()):
                if time.monotonic() > overdue:
                    del busy[channel]
                    ran[index] = False
                    self._lose(channel, jobs[index])
        for channel in busy:  # what they do nobody waits for
            self._end(channel)
        return ran

    def _start(self) -> Any:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._work, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _lose(self, channel: Any, job: Optional[Any]) -> None:
        self._processes[channel].join(0.5)  # for its own exit code
        code = self._end(channel)
        self._lost += 1
        self.failures.append(f"a process ended with {code} at {job}")
        if not self._done and self._lost >= STILLBORN + self._count:
            raise RuntimeError(
                f"the processes that try tile sizes end before they have tried one (exit code {code}); run a script of "
                "your own under `if __name__ == '__main__':`, and see what they print"
            )

    def _end(self, channel: Any) -> Optional[int]:
        process = self._processes.pop(channel)
        channel.close()
        process.terminate()
        process.join(2)
        if process.exitcode is None:
            process.kill()
            process.join(2)
        return process.exitcode
