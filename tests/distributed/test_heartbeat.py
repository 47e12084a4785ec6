"""Silence is noticed, neither an end nor a late start is taken for it, and NCCL is not in the way."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

import cap_hf.distributed.heartbeat as heartbeat_module
from cap_hf.distributed.heartbeat import DONE, MISSED, MISSED_AT_START, Heartbeat


@pytest.fixture
def pair():
    """A store, and the heartbeats of two processes that have begun."""
    store = dist.HashStore()
    first, second = Heartbeat(0, 2), Heartbeat(1, 2)
    for each in (second, first):
        each.beat(store)
        assert each.look() == []
    return store, first, second


def test_silence_is_noticed_and_signs_of_life_are(pair):
    store, first, second = pair
    for _ in range(3 * MISSED):
        second.beat(store)
        first.beat(store)
        assert first.look() == []
    found = []
    for _ in range(MISSED + 1):
        first.beat(store)
        found.append(first.look())
    assert found == [[]] * (MISSED - 1) + [[1]] * 2
    second.beat(store)
    first.beat(store)
    assert first.look() == []


def test_an_end_is_not_silence(pair):
    store, first, second = pair
    second.beat(store, DONE)
    for _ in range(3 * MISSED):
        first.beat(store)
        assert first.look() == []
    # Nor is the end of the launcher that has the store, once all others have finished.
    assert [first.look() for _ in range(2 * MISSED)] == [[]] * 2 * MISSED


def test_a_store_that_does_not_answer_is_noticed(pair):
    _, first, _ = pair
    assert [first.look() for _ in range(MISSED)] == [[]] * (MISSED - 1) + [[0, 1]]


def test_a_process_may_start_late_but_not_never():
    store, first = dist.HashStore(), Heartbeat(0, 2)
    found = []
    for _ in range(MISSED_AT_START):
        first.beat(store)
        found.append(first.look())
    assert found == [[]] * (MISSED_AT_START - 1) + [[1]]


def test_signs_of_life_do_not_wait_for_the_client_of_the_process_group(monkeypatch):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore(
        "127.0.0.1", host.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(host.port))
    monkeypatch.setattr(heartbeat_module, "INTERVAL", 0.05)
    # As NCCL does while it connects: it asks for a key that another process has yet to set.
    waiting = threading.Thread(target=client.get, args=("ncclUniqueId",), daemon=True)
    waiting.start()
    heartbeat = Heartbeat(0, 1)
    heartbeat.start()
    deadline = time.monotonic() + 20
    while heartbeat.counts[0] < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert waiting.is_alive()
    assert heartbeat.counts[0] >= 3
    heartbeat.finish()
    assert heartbeat.counts[0] >= DONE
    host.set("ncclUniqueId", "there")
    waiting.join(20)
