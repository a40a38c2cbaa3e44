from __future__ import annotations

import asyncio
import threading

from server.fakes import FakeText

from onebase.server.identity import Caller, set_caller
from onebase.server.texts import Texts


class Watching(FakeText):
    def __init__(self):
        self.threads = set()
        self.order = []
        self.go = threading.Event()

    def _words(self, text):
        self.threads.add(threading.current_thread())
        if text == "wait":
            assert self.go.wait(20)
        self.order.append(text)
        return super()._words(text)


def test_texts_take_turns_on_one_thread_off_the_loop():
    watching = Watching()

    async def run():
        texts = Texts(watching)
        many = asyncio.create_task(encode(texts, ["wait", "a2", "a3"]))
        await asyncio.sleep(0)
        one = asyncio.create_task(encode(texts, ["b1"]))
        await asyncio.sleep(0)
        watching.go.set()
        await asyncio.gather(many, one)
        assert (await texts.prompt("#5")).tolist() == [1, 5]
        assert (await texts.completion("#5")).tolist() == [5]
        assert (await texts.joined("#5", "#6")).tolist() == [1, 5, 6]
        texts.close()

    async def encode(texts, all_):
        for text in all_:
            await texts.completion(text)

    asyncio.run(run())
    assert len(watching.threads) == 1
    assert threading.main_thread() not in watching.threads
    assert watching.order.index("b1") < watching.order.index("a2")  # the one does not wait for the many


def test_tenants_take_turns_however_many_texts_one_has():
    watching = Watching()

    async def encode_as(tenant, texts, words):
        set_caller(Caller(tenant))
        await asyncio.gather(*(texts.completion(word) for word in words))

    async def run():
        texts = Texts(watching)
        many = asyncio.create_task(encode_as("red", texts, ["wait", *(f"red{i}" for i in range(50))]))
        await asyncio.sleep(0.05)
        few = asyncio.create_task(encode_as("blue", texts, ["blue0", "blue1"]))
        await asyncio.sleep(0.05)
        watching.go.set()
        await asyncio.gather(many, few)
        texts.close()

    asyncio.run(run())
    assert max(watching.order.index(f"blue{i}") for i in range(2)) <= 3


def test_a_text_that_nobody_waits_for_any_more_is_not_encoded():
    watching = Watching()

    async def run():
        texts = Texts(watching)
        first = asyncio.create_task(texts.completion("wait"))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(texts.completion("gone"))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        watching.go.set()
        await first
        await texts.completion("last")
        texts.close()

    asyncio.run(run())
    assert watching.order == ["wait", "last"]
