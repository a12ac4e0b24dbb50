"""What the seconds of an iteration were spent on."""

import time


class Clock:
    """Seconds by what they were spent on, from one `stop` to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, name: str) -> None:
        """What passed since the last `stop` was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
