"""Which of several processes stands still, and for how long it may."""

from dataclasses import dataclass, field
from typing import Final

# How long a process may stand still while others go on; and in stages whose length nobody knows,
# such as compiling and loading, how many times as long.
STALL_SECONDS: Final = 45.0
_OPEN_ENDED: Final = 40
# A step may take so many times as long as the longest before it.
_SLOWER: Final = 10


@dataclass(frozen=True)
class Beat:
    """How far a process is.

    Attributes:
        count: of what it has passed; processes that run one program pass the same.
        stage: that it is in.
        open_ended: whether nobody knows how long that takes.
    """

    count: int = 0
    stage: str = "opening"
    open_ended: bool = True


@dataclass
class Standstill:
    """Who stands still, judged by the beats of all processes as they come.

    Processes run the same program, so that one that hangs is behind those that wait for it. Its
    limit is longer in stages whose length nobody knows, and nobody is judged who has not begun one.

    Attributes:
        limit: seconds; 0 for none.
        longest: seconds that the longest step took here.
    """

    limit: float
    longest: float = 0.0
    _seen: dict[int, tuple[Beat, float]] = field(default_factory=dict)

    def judge(self, beats: dict[int, Beat], now: float) -> str | None:
        """What is wrong, if somebody stands still for too long."""
        for process, beat in beats.items():
            if self._seen.get(process, (None, 0.0))[0] != beat:
                self._seen[process] = beat, now
        if not self.limit or not self._seen:
            return None
        foremost = max(beat.count for beat, _ in self._seen.values())
        for process, (beat, since) in sorted(self._seen.items()):
            behind, stood = beat.count < foremost, now - since
            if beat.count and behind and stood > self._allowed(beat):
                return f"process {process} has stood still for {stood:.0f} s in {beat.stage!r}"
        stood = min(now - since for _, since in self._seen.values())
        beat = next(iter(self._seen.values()))[0]
        known = self.longest > 0 and not beat.open_ended
        allowed = self._allowed(beat) if known else self.limit * _OPEN_ENDED
        if beat.count and stood > allowed:
            return f"no process has gone on for {stood:.0f} s in {beat.stage!r}"
        return None

    def _allowed(self, beat: Beat) -> float:
        if beat.open_ended:
            return self.limit * _OPEN_ENDED
        return max(self.limit, _SLOWER * self.longest)
