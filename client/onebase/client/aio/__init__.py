"""The client for asyncio: the methods of `onebase.client`, awaited.

    import asyncio

    import onebase.client as onebase

    async def main():
        async with onebase.connect_async("127.0.0.1:7070") as client, client.open_session("policy_1") as session:
            prompts = ["The film was", "The plot was"]
            answers = await asyncio.gather(*[session.generate(prompt) for prompt in prompts])

            async with session.stream("The film was") as chunks:
                async for chunk in chunks:
                    print(chunk.text)

    asyncio.run(main())

`connect` here is `onebase.client.connect_async`. It and `open_session` may be awaited (`client = await connect()`) or
entered (`async with connect() as client`); `stream` is entered or iterated over, and everything else is awaited.
Cancelling a task cancels the call that it waits for, on the server too.

A client belongs to the event loop that it was made in. A program that holds up the loop keeps its sessions: they live
by a stream, whose connection answers the server meanwhile.
"""

from onebase.client.aio.client import AsyncClient, connect
from onebase.client.aio.opening import Opening
from onebase.client.aio.policy import AsyncPolicy
from onebase.client.aio.session import AsyncSession
from onebase.client.aio.transport import AsyncStream

__all__ = ["AsyncClient", "AsyncPolicy", "AsyncSession", "AsyncStream", "Opening", "connect"]
