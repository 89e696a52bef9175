"""A minute of kill -9, SIGSTOP, drain and restart under eight callers: every answer is right."""

from __future__ import annotations

import itertools
import random
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.e2e.fleet import replicas
from tests.e2e.storm import FATES, FROZEN, Storm, Windows, storms
from tests.e2e.truth import block_output, state_of, tensors_of

from expertd.weights.demo import write_demo
from expertd_client import DeadlineExceeded, ExpertdError, ExpertPool, ExpertsUnavailable

PATIENCE = 40.0
"""A timeout longer than a restart takes on a busy machine."""
PROMPT_SECONDS = FROZEN - 2
"""A replica is stopped for longer than some calls may take: another one has to answer them."""
LATE = 1.0
"""How late a call may end, beyond what a thread that only sleeps woke up late in that time."""
BEAT, PAUSE = 0.05, 0.02
"""How long that thread sleeps, and a caller after an error."""
ROUNDING = 0.2
"""How early a call may end because its deadline has come."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A call's arguments and the answer that transformers' own block gives."""

    layer: int
    rows: NDArray[Any]
    routing: dict[str, NDArray[Any]]
    expected: NDArray[Any]

    def wrong_rows(self, output: NDArray[Any]) -> NDArray[np.bool_]:
        error = np.linalg.norm(output - self.expected, axis=1)
        return ~(error <= TOLERANCE * np.linalg.norm(self.expected, axis=1))


def cases(path: Path, random: np.random.Generator) -> list[Case]:
    """Calls of several sizes for both layers, with router logits and with top-k ids."""
    made = []
    for layer, count in itertools.product((0, 1), (1, 3, 17, 70)):
        rows = random.standard_normal((count, 256)).astype(np.float32)
        output, logits = block_output(path, layer, torch.from_numpy(rows))
        made.append(Case(layer, rows, {"router_logits": logits.numpy()}, output.numpy()))
        ids = np.argsort(random.random((count, 32)), axis=1)[:, :5]
        ids[random.random(ids.shape) < 0.2] = -1
        weights = random.random(ids.shape).astype(np.float32)
        routing = {"topk_ids": ids, "topk_weights": weights}
        made.append(Case(layer, rows, routing, weighted_sum(path, layer, rows, ids, weights)))
    return made


def weighted_sum(
    path: Path, layer: int, rows: NDArray[Any], ids: NDArray[Any], weights: NDArray[Any]
) -> NDArray[Any]:
    """The published formula: each row's weighted sum of down(silu(gate) * up) of its experts."""
    state = state_of(tensors_of(path), f"model.layers.{layer}.mlp.")
    both = torch.einsum("th,enh->ten", torch.from_numpy(rows), state["experts.gate_up_proj"])
    gate, up = both.chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    each = torch.einsum("tei,ehi->teh", inner, state["experts.down_proj"]).numpy()
    dense = np.zeros(each.shape[:2], np.float32)
    at = np.nonzero(ids >= 0)
    dense[at[0], ids[at]] = weights[at]
    return np.asarray(np.einsum("te,teh->th", dense, each))


@dataclass(frozen=True)
class Kind:
    """How a caller calls: with which pool, how long it waits, what it takes for an answer."""

    name: str
    waits: bool = True
    timeout: tuple[float, float] = (PATIENCE, PATIENCE)
    partial: bool = False


PATIENT = Kind("patient")
PROMPT = Kind("prompt", timeout=(PROMPT_SECONDS, PROMPT_SECONDS))
IMPATIENT = Kind("impatient", waits=False)
PARTIAL = Kind("partial", waits=False, partial=True)
HASTY = Kind("hasty", timeout=(0.2, 2.0))
CALLERS = (PATIENT, PATIENT, PROMPT, PROMPT, IMPATIENT, IMPATIENT, PARTIAL, HASTY)


@dataclass(frozen=True)
class Outcome:
    """A call that ended: with an answer, of which rows may be incomplete or wrong, or an error."""

    kind: Kind
    timeout: float
    begin: float
    end: float
    wrong: int = 0
    incomplete: int = 0
    error: BaseException | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def how(self) -> str:
        if self.error is not None:
            return type(self.error).__name__
        return "incomplete" if self.incomplete else "ok"

    def __str__(self) -> str:
        took = f"{self.seconds:.2f} of {self.timeout:.2f} s from {self.begin:.2f}"
        return f"{self.kind.name}: {took}: {self.how}, {self.wrong} wrong rows: {self.error}"


@dataclass
class Pulse:
    """How late the threads of this process run: a few cores bear eight callers and four servers."""

    missed: list[tuple[float, float]] = field(default_factory=list)

    def beat(self, over: threading.Event) -> None:
        while not over.is_set():
            due = time.monotonic() + BEAT
            time.sleep(BEAT)
            self.missed.append((due, time.monotonic()))

    def lateness(self, begin: float, end: float) -> float:
        """Seconds between begin and end in which the thread should have run and did not."""
        spans = (min(woke, end) - max(due, begin) for due, woke in self.missed)
        return sum(span for span in spans if span > 0)


def call(pool: ExpertPool, kind: Kind, case: Case, dice: random.Random) -> Outcome:
    timeout = dice.uniform(*kind.timeout)
    options: dict[str, Any] = {**case.routing, "timeout": timeout}
    begin = time.monotonic()
    try:
        if kind.partial:
            output, complete = pool.forward("m", case.layer, case.rows, partial="allow", **options)
        else:
            output = pool.forward("m", case.layer, case.rows, **options)
            complete = np.ones(len(output), bool)
    except Exception as error:
        return Outcome(kind, timeout, begin, time.monotonic(), error=error)
    end = time.monotonic()
    wrong = int((case.wrong_rows(output) & complete).sum())
    return Outcome(kind, timeout, begin, end, wrong, int((~complete).sum()))


def allowed(outcome: Outcome, windows: Windows, pulse: Pulse) -> bool:
    """Whether a call may have ended so."""
    error, deadline = outcome.error, outcome.begin + outcome.timeout
    late = outcome.end - deadline - pulse.lateness(deadline, outcome.end)
    if late > LATE or outcome.wrong:
        return False
    if error is None:
        return not outcome.incomplete or windows.meet(outcome.begin, outcome.end)
    waited = isinstance(error, DeadlineExceeded | ExpertsUnavailable)
    if waited and outcome.seconds > outcome.timeout - ROUNDING:
        return outcome.kind is HASTY or windows.meet(outcome.begin, outcome.end)
    return isinstance(error, ExpertsUnavailable) and windows.meet(outcome.begin, outcome.end)


@dataclass
class Trial:
    """Callers, and what came of their calls."""

    asked: list[Case]
    dice: random.Random
    windows: Windows = field(default_factory=Windows)
    pulse: Pulse = field(default_factory=Pulse)
    outcomes: list[Outcome] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def caller(self, kind: Kind, pool: ExpertPool, dice: random.Random) -> None:
        while not self.over.is_set():
            outcome = call(pool, kind, dice.choice(self.asked), dice)
            self.outcomes.append(outcome)
            if outcome.error is not None:
                time.sleep(PAUSE)

    def run(self, storms: list[Storm], waits: ExpertPool, gives_up: ExpertPool) -> None:
        """Callers call until the storms are over."""
        raging = [threading.Thread(target=storm.rage) for storm in storms]
        others = [threading.Thread(target=self.pulse.beat, args=(self.over,))]
        for kind in CALLERS:
            own = kind, waits if kind.waits else gives_up, random.Random(self.dice.random())
            others.append(threading.Thread(target=self.caller, args=own))
        for thread in [*others, *raging]:
            thread.start()
        for thread in raging:
            thread.join()
        self.over.set()
        for thread in others:
            thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in others)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_call_is_right_whatever_dies(home: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    write_demo(home / "chaos", "deepseek_v3", "fp32", seed=seed)
    asked = cases(home / "chaos", np.random.default_rng(seed))
    trial = Trial(asked, random.Random(seed))
    with replicas(home, "--model", f"m={home / 'chaos'}", "--drain-seconds", "20") as fleet:
        targets = [replica.grpc for replica in fleet]
        with (
            ExpertPool(targets, shard="experts") as waits,
            ExpertPool(targets, shard="experts", wait_for_experts=False) as gives_up,
        ):
            calm = [call(pool, PATIENT, c, trial.dice) for pool in (waits, gives_up) for c in asked]
            assert [str(o) for o in calm if o.error or o.wrong] == []
            raging = storms(fleet, trial.windows, trial.dice)
            trial.run(raging, waits, gives_up)

    came = sum((storm.came for storm in raging), Counter[str]())
    ended = Counter((o.kind.name, o.how) for o in trial.outcomes)
    print(f"fates {dict(came)}; {trial.windows}; calls {dict(ended)}")
    bad = [str(o) for o in trial.outcomes if not allowed(o, trial.windows, trial.pulse)]
    assert not bad, "\n".join([f"{len(bad)} of {len(trial.outcomes)}", *bad[:9]])
    assert all(ended[kind.name, "ok"] > 20 for kind in CALLERS)
    for kind, how in (("impatient", "ExpertsUnavailable"), ("partial", "incomplete")):
        assert ended[kind, how], "nobody noticed that a range was gone"
    assert len(came) == len(FATES), "the storm was too short for all that may happen"


def test_the_judge_sees_every_fault() -> None:
    windows, pulse = Windows([(10.0, 20.0)]), Pulse([(0.5, 0.6), (30.0, 33.0)])
    gone, late = ExpertsUnavailable("gone"), DeadlineExceeded("late")
    fine = (
        Outcome(PATIENT, 5, 0, 1),
        Outcome(PATIENT, 5, 9, 11, error=gone),
        Outcome(PARTIAL, 5, 9, 11, incomplete=1),
        Outcome(PROMPT, 5, 9, 14, error=late),
        Outcome(HASTY, 1, 0, 1.1, error=late),
        Outcome(HASTY, 1, 29, 33.5, error=late),
    )
    wrong = (
        Outcome(PATIENT, 5, 0, 1, wrong=1),
        Outcome(PATIENT, 5, 9, 11, wrong=1),
        Outcome(PATIENT, 5, 0, 1, error=gone),
        Outcome(PATIENT, 5, 9, 11, error=late),
        Outcome(PATIENT, 5, 0, 5, error=late),
        Outcome(PARTIAL, 5, 0, 1, incomplete=1),
        Outcome(HASTY, 1, 0, 0.5, error=late),
        Outcome(HASTY, 1, 0, 2.2),
        Outcome(HASTY, 1, 29, 34.5, error=late),
        Outcome(PATIENT, 5, 9, 11, error=ExpertdError("what?")),
    )
    assert [allowed(outcome, windows, pulse) for outcome in fine] == [True] * len(fine)
    assert [allowed(outcome, windows, pulse) for outcome in wrong] == [False] * len(wrong)


def test_a_part_added_twice_or_left_out_is_seen() -> None:
    half = np.ones((3, 4), np.float32)
    case = Case(0, half, {}, 2 * half)
    assert not case.wrong_rows(half + half).any()
    assert case.wrong_rows(half).all() and case.wrong_rows(half * 3).all()
    assert case.wrong_rows(half * np.nan).all()
