import os
import signal

import pytest

from jaxheads.training.signals import stop_on_signals


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_sets_the_request(number):
  before = signal.getsignal(number)
  with stop_on_signals() as stop:
    assert not stop
    send(number)
    assert stop
    assert stop.name == signal.Signals(number).name
  assert signal.getsignal(number) is before


def test_a_second_sigterm_changes_nothing():
  with stop_on_signals() as stop:
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert stop.name == "SIGINT"


def test_a_second_ctrl_c_does_not_wait():
  with stop_on_signals():
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
