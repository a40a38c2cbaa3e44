"""What a type checker must refuse: every line that ends in a comment is a mistake."""

import onebase.client as onebase
from onebase.client import SamplingParams, Sequence


def sync(client: onebase.Client, session: onebase.Session) -> None:
    client.generate("a")  # no adapter
    session.generate("a", sampling={"n": 2})  # not SamplingParams
    session.reward("a")  # not a sequence
    session.score(Sequence("a", "b"), outputs=["logprob"])  # no such output
    client.load_adapter("a", "b", kind="judge")  # no such kind
    SamplingParams(n=1).n = 2  # frozen
    client.score(Sequence("a", "b"))  # only a session scores
    client.reward(Sequence("a", "b"))[0].score + "x"  # a number


async def asynchronous(client: onebase.AsyncClient, session: onebase.AsyncSession) -> None:
    session.optim_step(onebase.AdamW(1e-4))  # not awaited
    print((await session.generate("a")).text)  # a list
    for _ in session.stream("a"):  # not async
        pass
    with client.open_session("a"):  # not async
        pass
    await session.stream("a")  # nothing to await
