"""Many clients at once: each answer is the one that the client would get alone, and each session's adapter its own."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from server.fakes import logprobs, token_scores, values
from server.harness import array, floats, pair, refused, tokens_of

from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2

THREADS, TURNS = 16, 25


class Client:
    """One client with a session and two policies of its own."""

    def __init__(self, live, number):
        self.live = live
        self.random = random.Random(number)
        request = sessions_pb2.OpenSessionRequest(label=f"client {number}")
        self.session = live.sessions.OpenSession(request).session_id
        self.names = [f"a{number}", f"b{number}"]
        for name in self.names:
            live.adapters.CreateAdapter(
                adapters_pb2.CreateAdapterRequest(session_id=self.session, name=name, value_head=True)
            )
        self.uids = {name: live.uid(name) for name in self.names}
        self.versions = dict.fromkeys(self.names, 0)
        self.active = self.names[0]
        self.set_active(self.active)

    def set_active(self, name):
        self.live.sessions.SetActiveAdapter(
            sessions_pb2.SetActiveAdapterRequest(session_id=self.session, ppo_adapter_name=name)
        )
        self.active = name

    def run(self):
        turns = (self.score, self.reward, self.generate, self.train, self.cancelled_score, self.refused_reward)
        for _ in range(TURNS):
            self.random.choice(turns)()
            now = self.live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=self.session))
            assert now.ppo_adapter_name == self.active
        return self.versions

    def row(self):
        length = self.random.randint(2, 20)
        tokens = np.array([self.random.randrange(1000) for _ in range(length)])
        start = self.random.randint(1, length - 1)
        return tokens, start, pair(tuple(tokens[:start]), tuple(tokens[start:]))

    def score_request(self):
        rows = [self.row() for _ in range(self.random.randint(1, 30))]
        self.active = self.random.choice(self.names)
        request = inference_pb2.ScoreRequest(
            session_id=self.session,
            ppo_adapter_name=self.active,
            rewards=[{"adapter": "r1"}],
            sequences=[sequence for *_, sequence in rows],
        )
        return rows, request

    def score(self):
        rows, request = self.score_request()
        response = self.live.inference.Score(request)
        uid, reward = self.uids[self.active], self.live.uid("r1")
        assert response.policy.version == self.versions[self.active]
        for (tokens, start, _), result in zip(rows, response.results, strict=True):
            np.testing.assert_array_equal(array(result.logprobs), logprobs(uid, tokens, start))
            np.testing.assert_array_equal(array(result.values), values(uid, tokens, start))
            np.testing.assert_array_equal(array(result.reference_logprobs), logprobs(0, tokens, start))
            assert result.reward == float(token_scores(reward, tokens)[-1])

    def cancelled_score(self):
        _, request = self.score_request()
        future = self.live.inference.Score.future(request, timeout=self.random.choice([None, 0.001]))
        if self.random.random() < 0.5:
            future.cancel()
        try:
            future.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            # Cancelled before it was ever received, it has said nothing: say it again.
            self.set_active(self.active)

    def refused_reward(self):
        name = self.random.choice(self.names)
        request = inference_pb2.RewardRequest(
            session_id=self.session, ppo_adapter_name=name, rewards=[{"adapter": "p1"}], sequences=[self.row()[2]]
        )
        assert refused(self.live.inference.Reward, request).reason == "WRONG_ADAPTER_KIND"
        self.active = name

    def reward(self):
        tokens, _, sequence = self.row()
        request = inference_pb2.RewardRequest(
            session_id=self.session, rewards=[{"adapter": "r2"}], sequences=[sequence]
        )
        response = self.live.inference.Reward(request)
        assert response.ppo_adapter_name == self.active
        assert response.results[0].scores[0] == token_scores(self.live.uid("r2"), tokens)[-1]

    def generate(self):
        prompt = self.random.randrange(1000)
        request = inference_pb2.GenerateRequest(
            session_id=self.session, prompts=[tokens_of(prompt)], sampling={"max_new_tokens": 5, "seed": 1}
        )
        messages = list(self.live.inference.Generate(request))
        assert [array(message.tokens)[0] for message in messages] == [(prompt + 1 + i) % 1000 for i in range(5)]
        assert {message.adapter.name for message in messages} == {self.active}

    def train(self):
        tokens, start, sequence = self.row()
        numbers = floats(*[0.5] * (len(tokens) - start))
        row = training_pb2.TrainingSequence(
            sequence=sequence, old_logprobs=numbers, old_values=numbers, advantages=numbers, returns=numbers
        )
        version = self.versions[self.active]
        passed = self.live.training.ForwardBackward(
            training_pb2.ForwardBackwardRequest(
                session_id=self.session, expected_version=version, sequences=[row], ppo={}
            )
        )
        np.testing.assert_array_equal(array(passed.logprobs[0]), logprobs(self.uids[self.active], tokens, start))
        stepped = self.live.training.OptimStep(
            training_pb2.OptimStepRequest(
                session_id=self.session, expected_version=version, adamw={"learning_rate": 1e-3}
            )
        )
        assert (stepped.adapter.name, stepped.adapter.version) == (self.active, version + 1)
        assert stepped.gradients_applied == 1
        self.versions[self.active] += 1


def test_sixteen_clients_at_once(live):
    clients = [Client(live, number) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        versions = list(pool.map(Client.run, clients))
    for expected in versions:
        for name, version in expected.items():
            assert live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name)).version == version
    assert {session.in_flight for session in live.on_loop(live.edge.sessions.live)} == {0}
