"""The end of a stream to which a producer adds samples while it is watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from distcl.distributed.runtime import Runtime
from distcl.types import Ids, Stream, info_of

_POLLS = 20  # looks for something new in the time that is waited


class LiveEnd:
    """Waits for more samples of a stream with ``live_seconds``; any other stream just ends.

    ``say`` takes what a person should know. Rank 0 looks; its word is every rank's, so that all
    take in the same samples.
    """

    def __init__(self, stream: Stream, runtime: Runtime, say: Callable[[str], None]) -> None:
        self._stream: Any = stream
        self._runtime = runtime
        self._say = say
        self._seconds = info_of(stream).live_seconds
        self.open = self._seconds > 0
        """Whether there may be more."""

    def wait(self, waits: Callable[[int], None]) -> Ids:
        """Return the ids of new training samples [M]; none when the stream has ended. Collective.

        Returns as soon as something has come, or after ``live_seconds`` in which nothing came.
        ``waits`` is told how many looks were in vain, at each of them.
        """
        until, looks = time.monotonic() + self._seconds, 0
        while self.open:
            more, late = self._runtime.broadcast(
                (self._stream.arrived(), time.monotonic() > until)
                if self._runtime.is_main
                else (0, False)
            )
            if more:
                new: Ids = self._stream.grow(more)
                self._say(f"[live] {len(new):,} more samples have come")
                return new
            if late:
                self.open = False
                self._say(f"[live] none came in {self._seconds:g} s: the stream has ended")
                break
            looks += 1
            if looks == 1:
                self._say(f"[live] waiting {self._seconds:g} s at most for more samples")
            waits(looks)
            time.sleep(self._seconds / _POLLS)
        return np.empty(0, dtype=np.int64)
