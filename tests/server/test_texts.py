from __future__ import annotations

import asyncio
import threading

from server.fakes import FakeText

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
