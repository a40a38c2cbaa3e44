"""The training loop, the same for every algorithm: take rows, learn from them; evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onebase.client.errors import FailedPreconditionError
from onebase.trainer.attach import attach, attach_critic, find
from onebase.trainer.checkpoint import (
    STATE_FILE,
    AdapterMark,
    TrainerState,
    load_session,
    load_state,
    save_session,
    save_state,
    sole_run,
    write_json,
)
from onebase.trainer.config import TrainConfig
from onebase.trainer.display import Display, make_display
from onebase.trainer.evaluation import Evaluation, evaluate
from onebase.trainer.interrupt import Interrupt
from onebase.trainer.learners import make_learner
from onebase.trainer.logs import SUMMARY_FILE, RunLog
from onebase.trainer.parsing import ConfigError
from onebase.trainer.prompts import PromptOrder, PromptRow, load_prompts
from onebase.trainer.reporting import Reporter, StepResult, summarize
from onebase.trainer.rewards import Judge
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Client, Session


def train(
    config: TrainConfig,
    client: Client | None = None,
    *,
    display: Display | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """Trains a policy as the configuration says.

    Args:
        config: the run.
        client: connected to the server; without one, a connection to config.server is made and closed.
        display: where to show the run; without one, the terminal.
        stop: asked before every step; True ends the run as SIGTERM does. SIGINT and SIGTERM are heeded besides.

    Returns:
        What is in summary.json; None if the run was interrupted. `resume: auto` goes on from there.

    Raises:
        ConfigError: a setting cannot be used.
        onebase.client.errors.OnebaseError: the server refused something.
    """
    rows = load_prompts(config.prompts)
    eval_rows = load_prompts(config.eval_prompts, "eval_prompts") if config.eval_prompts else rows
    judge = Judge(config)
    state = _state_to_resume(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_run(config.output_path))
        interrupt = stack.enter_context(Interrupt())
        shown = stack.enter_context(display or make_display(f"onebase train {config.policy.name}"))
        client = client or stack.enter_context(_connect(config, shown))
        session, origin = attach(
            client,
            config.policy,
            state,
            last_session=load_session(config.output_path),
            value_head=config.algorithm == "ppo" and config.critic is None,
        )
        stack.enter_context(session)
        save_session(config.output_path, session.id)
        shown.note(origin)
        if config.critic is not None:
            shown.note(attach_critic(client, session, config.critic, state))
        for name in (SUMMARY_FILE,) if state else (SUMMARY_FILE, STATE_FILE):  # of a run that this one replaces
            (config.output_path / name).unlink(missing_ok=True)
        log = RunLog(config.output_path, last_step=state.step if state else None, tensorboard=config.log.tensorboard)
        steps = config.total_steps(len(rows))
        reporter = Reporter(stack.enter_context(log), shown, config.algorithm, steps, config.log.samples)
        run = Run(config, client, session, judge, reporter, rows, eval_rows)
        if state is not None:
            run.restore(state)
        return run.go(lambda: interrupt.requested or (stop is not None and stop()))


class Run:
    """A training run on an open session. Its state is what `_checkpoint` saves and `restore` sets."""

    def __init__(
        self,
        config: TrainConfig,
        client: Client,
        session: Session,
        judge: Judge,
        reporter: Reporter,
        rows: Sequence[PromptRow],
        eval_rows: Sequence[PromptRow],
    ) -> None:
        """Stands before the first step."""
        self._config = config
        self._client = client
        self._session = session
        self._judge = judge
        self._reporter = reporter
        self._prompts = PromptOrder(rows, config.seed)
        self._eval_rows = eval_rows
        self._steps = config.total_steps(len(rows))
        self._rng = np.random.default_rng(config.seed)
        self._learner = make_learner(config, session, client.info().base, judge, self._rng)
        self._steps_done = 0
        self._prompts_taken = 0
        self._kl: float | None = None  # objective/kl of the last step, if it had one
        self._before: Evaluation | None = None
        self._latest: Evaluation | None = None
        self._saved_step = 0  # the step of the newest checkpoint
        self._saved_path = ""

    def go(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Trains until the last step or until `stop`; returns the summary, or None after `stop`."""
        config = self._config
        if self._steps_done == 0:
            self._before = self._latest = self._evaluate()
            if self._before is not None:
                self._reporter.before(self._before)
        while self._steps_done < self._steps and not stop():
            self._step()
            if _due(self._steps_done, config.save_every):
                self._checkpoint(must=True)
        if self._saved_step < self._steps_done:
            self._checkpoint(must=config.save_every > 0)
        if self._steps_done < self._steps:
            self._reporter.note(f"interrupted after step {self._steps_done}; resume: auto goes on from there")
            return None
        summary = summarize(
            self._before,
            self._latest,
            kl=self._kl,
            steps=self._steps_done,
            adapter_version=self._learner.version or 0,
            path=self._saved_path,
        )
        write_json(config.output_path / SUMMARY_FILE, summary)
        return summary

    def _step(self) -> None:
        """One batch: learned from, and reported."""
        config, watch = self._config, Stopwatch()
        rows = self._prompts.take(self._prompts_taken, self._learner.rows_per_step)
        learned = self._learner.learn(rows, int(self._rng.integers(2**63)))
        seconds = watch.lap()
        self._steps_done += 1
        self._prompts_taken += len(rows)
        self._kl = cast("float | None", learned.stats.get("objective/kl"))
        evaluation = None
        if self._steps_done == self._steps or _due(self._steps_done, config.eval.every):
            evaluation = self._latest = self._evaluate()
        result = StepResult(learned, evaluation, seconds, self._learner.version or 0)
        self._reporter.step(self._steps_done, result)

    def _evaluate(self) -> Evaluation | None:
        return evaluate(self._session, self._judge, self._eval_rows, self._config)

    def _checkpoint(self, *, must: bool) -> None:
        """Saves the policy, and the critic if there is one, with their optimizers, then this run's state.

        Without `must`, a server that has no place to save to is put up with: the state alone can go on while the
        adapters stay on the server as they are.
        """
        config = self._config
        policy = self._mark(config.policy.name, "", must=must)
        critic = self._mark(config.critic.name, "-critic", must=must) if config.critic else None
        self._saved_path = policy.path
        save_state(
            config.output_path,
            TrainerState(
                policy=config.policy.name,
                step=self._steps_done,
                prompts_taken=self._prompts_taken,
                rng=self._rng.bit_generator.state,
                algorithm=config.algorithm,
                learner=self._learner.state(),
                kl=self._kl,
                before=self._before,
                latest=self._latest,
                adapter=replace(policy, version=self._learner.version or 0),
                critic=critic,
            ),
        )
        self._saved_step = self._steps_done

    def _mark(self, name: str, suffix: str, *, must: bool) -> AdapterMark:
        """Saves an adapter; its mark."""
        path = ""
        try:
            path = self._session.save_adapter(
                f"{self._config.run_name}/checkpoint-{self._steps_done:06d}{suffix}",
                name=name,
                with_optimizer=True,
                overwrite=True,
            ).path
        except FailedPreconditionError as error:
            if must:
                raise
            self._reporter.note(f"the adapter stays on the server, unsaved: {error}")
        adapter = find(self._client, name)
        return AdapterMark(path, adapter.version if adapter else 0, adapter.create_time if adapter else 0.0)

    def restore(self, state: TrainerState) -> None:
        """Stands where `state` was saved."""
        self._rng.bit_generator.state = dict(state.rng)
        self._learner.restore(state.learner, state.adapter.version)
        self._steps_done = self._saved_step = state.step
        self._prompts_taken = state.prompts_taken
        self._kl = state.kl
        self._before = state.before
        self._latest = state.latest
        self._saved_path = state.adapter.path


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _state_to_resume(config: TrainConfig) -> TrainerState | None:
    """The state to go on from, as `resume` says; makes output_dir if it is not there."""
    directory = config.output_path
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output_dir", f"{directory} cannot be made: {error.strerror}") from error
    state = None if config.resume == "never" else load_state(directory)
    if state is None and config.resume == "must":
        raise ConfigError("resume", f"{directory} holds no {STATE_FILE} to go on from; use auto to begin")
    if state is not None and state.policy != config.policy.name:
        raise ConfigError(
            "policy.name",
            f"{directory} holds a run of {state.policy!r}, not of {config.policy.name!r}; "
            "set another output_dir, or resume: never",
        )
    if state is not None and state.algorithm != config.algorithm:
        raise ConfigError(
            "algorithm",
            f"{directory} holds a run of {state.algorithm}, not of {config.algorithm}; "
            "set another output_dir, or resume: never",
        )
    if state is not None and (state.critic is None) != (config.critic is None):
        raise ConfigError(
            "critic",
            f"{directory} holds a run {'without' if state.critic is None else 'with'} one; "
            "set another output_dir, or resume: never",
        )
    return state


def _connect(config: TrainConfig, shown: Display) -> Client:
    from onebase.client import connect
    from onebase.client.channel import TlsFileError, tls_of

    try:  # the token is no setting: settings are logged, and kept with checkpoints
        return connect(
            config.server,
            token=os.environ.get("ONEBASE_TOKEN", ""),
            tls=tls_of(config.tls_ca or os.environ.get("ONEBASE_TLS_CA", "")),
            on_wait=lambda wait: shown.note(str(wait)),
        )
    except TlsFileError as error:
        raise ConfigError("tls_ca", str(error).removeprefix("tls is ")) from error
    except ValueError as error:
        raise ConfigError("server", str(error)) from error
