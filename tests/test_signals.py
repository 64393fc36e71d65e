"""Which signals are heard, and what a second one does; what a run makes of them is tested with the faults."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest

from pathline.training.signals import HEARD, Signals


@pytest.fixture(autouse=True)
def handlers():
    """Those of before, afterwards."""
    before = {number: signal.getsignal(number) for number in HEARD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HEARD)
def test_the_first_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.caught == 0
        os.kill(os.getpid(), number)
        assert signals.caught == number
    assert signal.getsignal(number) is before


def test_a_terminal_that_hangs_up_twice_is_one_signal():
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.caught == signal.SIGHUP


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.caught == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("stderr", ["open", "broken"])
def test_a_second_one_leaves_at_once(stderr):
    """In a forked process, whose standard error nobody may read any more."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.close(write)
        os.close(read)
        if stderr == "broken":
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        with Signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        os._exit(0)
    os.close(write)
    if stderr == "broken":
        os.close(read)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    if stderr == "open":
        assert b"a second signal" in os.read(read, 1000)
        os.close(read)


def test_a_second_one_is_heard_while_python_waits_for_something_else():
    """In a call that no signal ends, as a wait for another process may be."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with Signals():
            libc.pthread_mutex_lock(mutex)
            os.write(write, b"1")
            libc.pthread_mutex_lock(mutex)  # waits for itself
        os._exit(0)
    assert os.read(read, 1) == b"1"
    deadline = time.monotonic() + 20
    ended = 0
    while not ended and time.monotonic() < deadline:
        os.kill(child, signal.SIGTERM)
        time.sleep(0.3)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    os.close(read)
    os.close(write)
