"""The lines of `surf.check`."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from surf.errors import SurfError


class Report:
    """Lines as they are found: `ok`, `warning` or `WRONG`, the topic, what was seen."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def say(self, verdict: str, topic: str, text: str) -> None:
        """Print one line, at once."""
        self.counts[verdict] += 1
        print(f"{verdict:8} {topic:14} {text}", flush=True)

    def ok(self, topic: str, text: str) -> None:
        """It is as it should be."""
        self.say("ok", topic, text)

    def warning(self, topic: str, text: str) -> None:
        """The run would work, but the user should know."""
        self.say("warning", topic, text)

    def wrong(self, topic: str, text: str) -> None:
        """The run would fail."""
        self.say("WRONG", topic, text)

    def attempt(self, topic: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None, and a line, if it raises a SurfError."""
        try:
            return work()
        except SurfError as error:
            self.wrong(topic, str(error))
            return None
