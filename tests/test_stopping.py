"""Signals that end work: kept, raised where all agree, and left alone where they are somebody else's."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from dancegrpo_fast import stopping
from dancegrpo_fast.stopping import SIGNALS, Stop, Stopped


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the tests, whoever started them."""
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_all_agree(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def largest(own: int) -> int:
        asked.append(own)
        return own

    with Stop(largest=largest, notice="soon") as stop:
        assert stop.leave_when_asked(lambda: "whole") == "whole"
        stop.agree()
        send(number)
        send(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stop.agree()
    assert asked == [0, 0, number]
    assert stopped.value.code == stopped.value.status == 128 + number and stopped.value.name == number.name
    assert capfd.readouterr().err == f"{number.name}: soon\n"
    assert all(signal.getsignal(one) is signal.default_int_handler for one in SIGNALS)


def test_work_that_may_be_left_is_left_at_once() -> None:
    reached = []

    def work() -> None:
        reached.append("started")
        try:
            send(signal.SIGTERM)
        except Exception:
            reached.append("swallowed")
        reached.append("went on")

    for leaves, wanted in ((True, ["started"]), (False, ["started", "went on"])):
        with Stop(leaves=leaves) as stop, pytest.raises(Stopped):
            stop.leave_when_asked(work)
        assert reached == wanted
        reached.clear()
    # One that came before, and one that another process has.
    with Stop() as stop:
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.leave_when_asked(work)
        assert reached == []
    with Stop(largest=lambda own: max(own, signal.SIGUSR1)) as stop, pytest.raises(Stopped) as stopped:
        stop.leave_when_asked(lambda: None)
    assert stopped.value.name == "SIGUSR1"
    # After an error of the work nothing is raised at once.
    with Stop() as stop:
        with pytest.raises(ZeroDivisionError):
            stop.leave_when_asked(lambda: 1 // 0)
        send(signal.SIGTERM)


def test_commands_stop_at_once_and_their_runs_do_not() -> None:
    with pytest.raises(Stopped), Stop(at_once=True):
        send(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, Stop(at_once=True):
        with Stop():
            send(signal.SIGTERM)
        # A loop that was not entered passes on what ends its command.
        Stop().leave_when_asked(lambda: send(signal.SIGHUP))
    assert stopped.value.name == "SIGHUP"


def test_another_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop() as stop:
        # Launchers may send it twice.
        send(signal.SIGINT)
        send(signal.SIGINT)
        monkeypatch.setattr(stopping, "TWICE", 0.0)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(Stopped):
            stop.agree()


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        send(signal.SIGHUP)
        stop.agree()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    entered = []

    def elsewhere() -> None:
        with Stop():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


def test_processes_that_are_forked_inside_end_by_a_signal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Stop() as stop:
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            time.sleep(60)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        stop.agree()
