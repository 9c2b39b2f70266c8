"""WaitingLine: the claims that have no sandbox yet, in an order that is fair between their owners."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from kernelprovisioner.standing import Standing


@dataclass(frozen=True, slots=True, order=True)
class Waiter:
    """A claim without a settled sandbox; ordered by when it was asked."""

    claim: int
    owner: str
    own: bool
    standing: Standing = Standing.KEPT


class WaitingLine:
    """At most `bound` claims join; one that comes back (its sandbox failed) is let in beyond that."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._line: dict[str, list[Waiter]] = {}  # by owner, in the order of asking
        self._gave_up: Counter[str] = Counter()  # own sessions that an owner gave up for claims still in line

    def __len__(self) -> int:
        return sum(map(len, self._line.values()))

    def __iter__(self) -> Iterator[Waiter]:
        """All claims in the order of asking."""
        return iter(sorted(waiter for line in self._line.values() for waiter in line))

    def find(self, claim: int) -> Waiter | None:
        """The claim of that number, if it is in line."""
        return next((waiter for line in self._line.values() for waiter in line if waiter.claim == claim), None)

    def join(self, waiter: Waiter) -> Waiter | None:
        """Let a claim in; return the one that has to leave for it, if any: perhaps itself."""
        sent_away: Waiter | None = None
        if len(self) >= self.bound:
            # A flood of one owner does not keep the others out of the line: its own last one makes room.
            longest = max(self._line.values(), key=len)
            if len(longest) <= len(self._line.get(waiter.owner, ())) + 1:
                return waiter
            sent_away = longest[-1]
            self.leave(sent_away, served=False)
        self.come_back(waiter)
        return sent_away

    def come_back(self, waiter: Waiter) -> None:
        """By its number it comes before all of its owner that asked later; the bound counts newcomers only."""
        insort(self._line.setdefault(waiter.owner, []), waiter)

    def leave(self, waiter: Waiter, *, served: bool) -> None:
        """Take a claim out of the line: `served`, or because it waits no more."""
        line = self._line[waiter.owner]
        line.remove(waiter)
        self._gave_up[waiter.owner] = max(0, min(self._gave_up[waiter.owner] - served, len(line)))
        if not line:
            del self._line[waiter.owner], self._gave_up[waiter.owner]

    def gave_up_one(self, owner: str) -> None:
        """An owner that is in line lost a session of its own for that."""
        self._gave_up[owner] += 1

    def fair_order(self, held: Counter[str]) -> Iterator[Waiter]:
        """Yield the line: next is always the owner that holds fewest, counting what it got here; then who asked first.

        Between equals, an owner that gave up a session of its own goes first: else another's flood would get the place.
        """
        heap = [(held[owner], not self._gave_up[owner], line[0], 0) for owner, line in self._line.items()]
        heapq.heapify(heap)
        while heap:
            count, _, waiter, index = heapq.heappop(heap)
            yield waiter
            line, index = self._line[waiter.owner], index + 1
            if index < len(line):
                heapq.heappush(heap, (count + 1, index >= self._gave_up[waiter.owner], line[index], index))
