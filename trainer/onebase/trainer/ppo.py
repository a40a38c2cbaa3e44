"""The training loop: draw completions, judge them, make a PPO step; evaluations and checkpoints on the way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onebase.client.errors import FailedPreconditionError
from onebase.trainer.attach import attach, find
from onebase.trainer.checkpoint import STATE_FILE, TrainerState, load_state, save_state, write_json
from onebase.trainer.config import TrainConfig
from onebase.trainer.display import Display, make_display
from onebase.trainer.evaluation import Evaluation, evaluate
from onebase.trainer.interrupt import Interrupt
from onebase.trainer.logs import SUMMARY_FILE, RunLog
from onebase.trainer.parsing import ConfigError
from onebase.trainer.prompts import PromptOrder, PromptRow, load_prompts
from onebase.trainer.reporting import Reporter, StepResult, summarize
from onebase.trainer.rewards import Judge
from onebase.trainer.rollout import roll_out
from onebase.trainer.stepper import PPO_OUTPUTS, REFERENCE_OUTPUTS, PpoStepper
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
        interrupt = stack.enter_context(Interrupt())
        shown = stack.enter_context(display or make_display(f"onebase train {config.policy.name}"))
        client = client or stack.enter_context(_connect(config))
        session, origin = attach(client, config.policy, state)
        stack.enter_context(session)
        shown.note(origin)
        for name in (SUMMARY_FILE,) if state else (SUMMARY_FILE, STATE_FILE):  # of a run that this one replaces
            (config.output_path / name).unlink(missing_ok=True)
        log = RunLog(config.output_path, last_step=state.step if state else None, tensorboard=config.log.tensorboard)
        reporter = Reporter(stack.enter_context(log), shown, config.steps, config.log.samples)
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
        self._exact = client.info().base.exact  # then a completion's numbers are those that Score would give
        self._judge = judge
        self._reporter = reporter
        self._prompts = PromptOrder(rows, config.seed)
        self._eval_rows = eval_rows
        self._rng = np.random.default_rng(config.seed)
        self._stepper = PpoStepper(session, config.ppo, reference=config.reference, rng=self._rng)
        self._steps_done = 0
        self._prompts_taken = 0
        self._kl: float | None = None  # objective/kl of the last step
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
        while self._steps_done < config.steps and not stop():
            self._step()
            if _due(self._steps_done, config.save_every):
                self._checkpoint(must=True)
        if self._saved_step < self._steps_done:
            self._checkpoint(must=config.save_every > 0)
        if self._steps_done < config.steps:
            self._reporter.note(f"interrupted after step {self._steps_done}; resume: auto goes on from there")
            return None
        summary = summarize(
            self._before,
            self._latest,
            kl=self._kl,
            steps=self._steps_done,
            adapter_version=self._stepper.version or 0,
            path=self._saved_path,
        )
        write_json(config.output_path / SUMMARY_FILE, summary)
        return summary

    def _step(self) -> None:
        """One batch: completions drawn, judged, trained on and reported."""
        config = self._config
        watch = Stopwatch()
        rows = self._prompts.take(self._prompts_taken, config.ppo.batch_size)
        seed = int(self._rng.integers(2**63))
        rollout = roll_out(self._session, rows, config.generation, seed, numbers=self._exact)
        generated = watch.lap()
        judged = self._judge(self._session, rollout, REFERENCE_OUTPUTS if self._exact else PPO_OUTPUTS)
        forward = watch.lap()
        stats = self._stepper.update(
            rollout.prompts,
            rollout.responses,
            rollout.completed(judged.scored) if self._exact else judged.scored,
            judged.rewards,
            query_lengths=[completion.prompt_tokens for completion in rollout.completions],
        )
        updated = watch.lap()
        stats |= {"time/generate": generated, "time/ppo/forward_pass": forward, "time/ppo/total": forward + updated}
        self._steps_done += 1
        self._prompts_taken += len(rows)
        self._kl = cast("float", stats["objective/kl"])
        evaluation = None
        if self._steps_done == config.steps or _due(self._steps_done, config.eval.every):
            evaluation = self._latest = self._evaluate()
        version = self._stepper.version or 0
        result = StepResult(rollout, judged, stats, evaluation, generated + forward + updated, version)
        self._reporter.step(self._steps_done, result)

    def _evaluate(self) -> Evaluation | None:
        return evaluate(self._session, self._judge, self._eval_rows, self._config)

    def _checkpoint(self, *, must: bool) -> None:
        """Saves the adapter with its optimizer, then this run's state.

        Without `must`, a server that has no place to save to is put up with: the state alone can go on while the
        adapter stays on the server as it is.
        """
        config = self._config
        self._saved_path = ""
        try:
            self._saved_path = self._session.save_adapter(
                f"{config.run_name}/checkpoint-{self._steps_done:06d}",
                name=config.policy.name,
                with_optimizer=True,
                overwrite=True,
            ).path
        except FailedPreconditionError as error:
            if must:
                raise
            self._reporter.note(f"the adapter stays on the server, unsaved: {error}")
        adapter = find(self._client, config.policy.name)
        save_state(
            config.output_path,
            TrainerState(
                policy=config.policy.name,
                step=self._steps_done,
                prompts_taken=self._prompts_taken,
                rng=self._rng.bit_generator.state,
                kl_coef=self._stepper.kl_coef,
                moments=self._stepper.moments,
                kl=self._kl,
                before=self._before,
                latest=self._latest,
                session_id=self._session.id,
                adapter_path=self._saved_path,
                adapter_version=self._stepper.version or 0,
                adapter_create_time=adapter.create_time if adapter else 0.0,
            ),
        )
        self._saved_step = self._steps_done

    def restore(self, state: TrainerState) -> None:
        """Stands where `state` was saved."""
        self._rng.bit_generator.state = dict(state.rng)
        self._stepper.kl_coef = state.kl_coef
        self._stepper.moments = state.moments
        self._stepper.version = state.adapter_version
        self._steps_done = self._saved_step = state.step
        self._prompts_taken = state.prompts_taken
        self._kl = state.kl
        self._before = state.before
        self._latest = state.latest
        self._saved_path = state.adapter_path


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
    return state


def _connect(config: TrainConfig) -> Client:
    from onebase.client import connect
    from onebase.client.channel import tls_of

    try:  # the token is no setting: settings are logged, and kept with checkpoints
        return connect(
            config.server,
            token=os.environ.get("ONEBASE_TOKEN", ""),
            tls=tls_of(config.tls_ca or os.environ.get("ONEBASE_TLS_CA", "")),
        )
    except ValueError as error:
        raise ConfigError("server", str(error)) from error
