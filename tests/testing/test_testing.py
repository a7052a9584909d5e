"""What the library offers to other people's tests: emulated devices, several hosts, tiny models."""

import signal
import sys

import numpy as np
import pytest

from qcn_jax import hub, testing
from qcn_jax.chat.tokenizer import Tokenizer

HOST = """
import sys, time
from qcn_jax.sharding import distributed
coordinator, number, then = sys.argv[1:]
distributed.start(coordinator, 2, int(number))
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.asarray(int(number) + 1)).sum()
print("devices", len(jax.devices()), "of them here", len(jax.local_devices()), "sum", total, flush=True)
time.sleep(int(then))
"""


def _child():
    import jax

    print(len(jax.devices()), jax.devices()[0].platform)


@pytest.mark.parametrize("code", [_child, "import jax; print(len(jax.devices()), jax.devices()[0].platform)"])
def test_emulated_devices(code, run_with_devices):
    assert run_with_devices(code, 4) == "4 cpu\n"


def test_a_failing_child_shows_its_error(run_with_devices):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_with_devices("1 / 0", 1)


def test_two_hosts_of_four_devices(hosts):
    def command(then):
        return lambda coordinator, number: [sys.executable, "-c", HOST, coordinator, str(number), str(then)]

    for output in hosts(command(0)).finish():
        assert "devices 8 of them here 4 sum 3" in output
    lasting = hosts(command(3600))
    for number in (0, 1):
        lasting.until(number, "sum 3")
    lasting.kill(1)
    assert lasting.wait(1) == -signal.SIGKILL


def test_a_host_that_fails_shows_what_it_said(hosts):
    with pytest.raises(AssertionError, match="process 0 ended with 3:\nthe reason"):
        hosts(lambda *_: [sys.executable, "-c", "print('the reason', flush=True); raise SystemExit(3)"]).finish()
    with pytest.raises(AssertionError, match="has not printed 'never'"):
        hosts(lambda *_: [sys.executable, "-c", "print('once')"]).until(0, "never")


def test_a_tiny_checkpoint_is_a_whole_one(tiny_checkpoint):
    config, params = hub.load(tiny_checkpoint)
    assert config.vocab_size == testing.TINY.vocab_size and config.num_hidden_layers == testing.TINY.num_hidden_layers
    expected = testing.random_params(testing.TINY)["embed_tokens"]["embedding"] * testing.TINY.initializer_range
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], expected)
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    assert tokenizer.vocab_size <= config.vocab_size and tokenizer.decode(tokenizer.encode("a β c")) == "a β c"
