"""The clock of a device, without one."""

from collections.abc import Callable

import pytest

from bench.clocks import DeviceClock


class FakeCuda:
    """A device whose calls take `work` seconds after a wait; its queue holds `room` of them."""

    RATE = 1e9

    def __init__(self, work: float, room: int) -> None:
        self.work, self.room = work, room
        self.now = 0.0  # of the device, while the host takes no time
        self.queued, self.asleep, self.sleeps = 0, False, 0

    def Event(self, enable_timing: bool) -> "FakeEvent":  # noqa: N802  # torch's name
        return FakeEvent(self)

    def _sleep(self, cycles: int) -> None:
        self.now += cycles / self.RATE
        self.asleep = cycles > 0
        self.queued = 0
        self.sleeps += 1

    def synchronize(self) -> None:
        self.queued = 0

    def launch(self) -> None:
        self.now += self.work
        self.queued += 1


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self.at = self.cuda.now

    def query(self) -> bool:
        """Passed, where nothing held the device up, or where a full queue held the host up until it went on."""
        return not self.cuda.asleep or self.cuda.queued > self.cuda.room

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


def run_on(cuda: FakeCuda) -> Callable[[int], object]:
    def run(call: int) -> object:
        cuda.launch()
        return object()

    return run


def test_the_device_clock_measures_the_device() -> None:
    cuda = FakeCuda(work=3e-6, room=1000)
    clock = DeviceClock(5, cuda)
    run = run_on(cuda)
    assert clock.cycles_per_s == pytest.approx(cuda.RATE)
    assert clock.calls_for(run, 0.03) == clock.MAX_CALLS
    assert clock.calls_for(run, 10e-6) == 3
    sample = clock.time(run, 0, 8)
    assert sample.work == pytest.approx(cuda.work) and sample.host > 0.0
    # Results stay alive for as long as the inputs take to come round.
    assert len(clock.kept) == 5 and len(set(map(id, clock.kept))) == 5


def test_the_device_clock_never_fills_the_queue() -> None:
    cuda = FakeCuda(work=3e-6, room=10)
    clock = DeviceClock(2, cuda)
    run = run_on(cuda)
    assert clock.calls_for(run, 0.03) == 8
    assert clock.time(run, 0, 8).work == pytest.approx(cuda.work)
    with pytest.raises(RuntimeError, match="11 calls were not queued"):
        clock.time(run, 0, 11)
