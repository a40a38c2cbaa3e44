from __future__ import annotations

import threading
import time

from onebase.server.meter import Meter


def test_what_is_older_than_the_window_counts_no_more():
    now = [100.0]
    meter = Meter(10.0, lambda: now[0])
    meter.add(30)
    now[0] += 5
    meter.add(20)
    assert meter.rate() == 5
    now[0] += 6
    assert meter.rate() == 2
    now[0] += 5
    assert meter.rate() == 0


def test_counting_and_asking_from_several_threads_loses_nothing():
    meter, ended, errors = Meter(1e-4), threading.Event(), []

    def ask():
        while not ended.is_set():
            try:
                meter.rate()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        meter.add(1)
    ended.set()
    for thread in threads:
        thread.join()
    time.sleep(0.01)
    assert meter.rate() == 0
    assert errors == []
