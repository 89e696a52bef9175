"""A minute of kill -9, SIGSTOP, drain and restart under eight callers: every answer is right."""

from __future__ import annotations

import itertools
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.e2e.fleet import Replica, replicas
from tests.e2e.truth import block_output, state_of, tensors_of

from expertd.weights.demo import write_demo
from expertd_client import DeadlineExceeded, ExpertdError, ExpertPool, ExpertsUnavailable

SECONDS = 60
PATIENCE = 40.0
"""A timeout longer than a restart takes on a busy machine."""
FROZEN, PROMPT_SECONDS = 14.0, 12.0
"""A replica is stopped for longer than some calls may take: another one has to answer them."""
SCHEDULING = 2.0
"""How late a call may end: eight callers and up to four servers share a few cores."""
ROUNDING = 0.2
"""How early a call may end because its deadline has come."""
SETTLED = 2.0
"""After a replica is ready, the time that a pool may need to see it."""
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


@dataclass
class Windows:
    """When no replica of some range was alive."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    @contextmanager
    def marked(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((begin, time.monotonic()))

    def met(self, outcome: Outcome) -> bool:
        return any(outcome.begin < end and begin < outcome.end for begin, end in self.spans)


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


def kill(replica: Replica, dice: random.Random) -> None:
    replica.end()
    time.sleep(dice.uniform(0, 1))
    replica.start()


def freeze(replica: Replica, dice: random.Random) -> None:
    replica.send(signal.SIGSTOP)
    time.sleep(FROZEN)
    replica.send(signal.SIGCONT)


def freeze_and_kill(replica: Replica, dice: random.Random) -> None:
    replica.send(signal.SIGSTOP)
    time.sleep(dice.uniform(0.5, 3))
    kill(replica, dice)


def drain(replica: Replica, dice: random.Random) -> None:
    with grpc.insecure_channel(replica.grpc) as channel:
        channel.unary_unary("/expertd_wire.v1.Admin/Drain")(b"", timeout=PATIENCE)
    assert replica.wait() == 0
    replica.start()


def restart(replica: Replica, dice: random.Random) -> None:
    assert replica.end(signal.SIGTERM) == 0
    replica.start()


Fate = Callable[[Replica, random.Random], None]
FATES: tuple[Fate | None, ...] = (kill, freeze, drain, freeze_and_kill, None, restart)
"""What befalls one replica of a range; None: both are killed, in a marked window."""


@dataclass
class Storm:
    """Brings fate upon the two replicas of a range, one at a time, until its time is over."""

    pair: list[Replica]
    fates: list[Fate | None]
    windows: Windows
    dice: random.Random
    until: float
    alone: threading.Lock
    came: Counter[str] = field(default_factory=Counter)

    def rage(self) -> None:
        while time.monotonic() < self.until:
            for fate in self.fates:
                if time.monotonic() < self.until:
                    self.strike(fate)
            self.dice.shuffle(self.fates)

    def strike(self, fate: Fate | None) -> None:
        # A window in one range must not excuse calls that a frozen replica of the other loses.
        with self.alone if fate in (freeze, None) else nullcontext():
            if fate is None:
                self.outage()
            else:
                fate(self.dice.choice(self.pair), self.dice)
                time.sleep(SETTLED)
        self.came[getattr(fate, "__name__", "outage")] += 1

    def outage(self) -> None:
        """Kills both, in a marked window."""
        with self.windows.marked():
            both = [threading.Thread(target=kill, args=(r, self.dice)) for r in self.pair]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            time.sleep(SETTLED)


def storms(fleet: list[Replica], windows: Windows, dice: random.Random) -> list[Storm]:
    """One for each range; they begin at different fates."""
    until, half = time.monotonic() + SECONDS, len(FATES) // 2
    decks = [list(FATES), list(FATES[half:] + FATES[:half])]
    pairs, alone = [fleet[:2], fleet[2:]], threading.Lock()
    return [
        Storm(pair, deck, windows, random.Random(dice.random()), until, alone)
        for pair, deck in zip(pairs, decks, strict=True)
    ]


def allowed(outcome: Outcome, windows: Windows) -> bool:
    """Whether a call may have ended so."""
    error = outcome.error
    if outcome.seconds > outcome.timeout + SCHEDULING or outcome.wrong:
        return False
    if error is None:
        return not outcome.incomplete or windows.met(outcome)
    late = isinstance(error, DeadlineExceeded | ExpertsUnavailable)
    if late and outcome.seconds > outcome.timeout - ROUNDING:
        return outcome.kind is HASTY or windows.met(outcome)
    return isinstance(error, ExpertsUnavailable) and windows.met(outcome)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_call_is_right_whatever_dies(home: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice, windows, outcomes = random.Random(seed), Windows(), list[Outcome]()
    write_demo(home / "chaos", "deepseek_v3", "fp32", seed=seed)
    asked = cases(home / "chaos", np.random.default_rng(seed))
    over = threading.Event()

    def caller(kind: Kind, pool: ExpertPool, own: random.Random) -> None:
        while not over.is_set():
            outcomes.append(call(pool, kind, own.choice(asked), own))

    with replicas(home, "--model", f"m={home / 'chaos'}", "--drain-seconds", "20") as fleet:
        targets = [replica.grpc for replica in fleet]
        with (
            ExpertPool(targets, shard="experts") as waits,
            ExpertPool(targets, shard="experts", wait_for_experts=False) as gives_up,
        ):
            first = [call(pool, PATIENT, c, dice) for pool in (waits, gives_up) for c in asked]
            assert [o.error for o in first if o.error or o.wrong] == []
            callers = [
                threading.Thread(
                    target=caller,
                    args=(k, waits if k.waits else gives_up, random.Random(dice.random())),
                )
                for k in CALLERS
            ]
            raging = storms(fleet, windows, dice)
            threads = [threading.Thread(target=storm.rage) for storm in raging]
            for thread in [*callers, *threads]:
                thread.start()
            for thread in threads:
                thread.join()
            over.set()
            for thread in callers:
                thread.join(PATIENCE + SCHEDULING)
            assert not any(thread.is_alive() for thread in callers)

    came = sum((storm.came for storm in raging), Counter[str]())
    ended = Counter((o.kind.name, o.how) for o in outcomes)
    print(f"fates {dict(came)}; windows {len(windows.spans)}; calls {dict(ended)}")
    bad = [outcome for outcome in outcomes if not allowed(outcome, windows)]
    assert bad == [], f"{len(bad)} of {len(outcomes)} calls"
    assert all(ended[kind.name, "ok"] > 20 for kind in CALLERS)
    for kind, how in (("impatient", "ExpertsUnavailable"), ("partial", "incomplete")):
        assert ended[kind, how], "nobody noticed that a range was gone"
    assert len(came) == len(FATES), "the storm was too short for all that may happen"


def test_the_judge_sees_every_fault() -> None:
    windows = Windows([(10.0, 20.0)])
    gone, late = ExpertsUnavailable("gone"), DeadlineExceeded("late")
    fine = (
        Outcome(PATIENT, 5, 0, 1),
        Outcome(PATIENT, 5, 9, 11, error=gone),
        Outcome(PARTIAL, 5, 9, 11, incomplete=1),
        Outcome(PROMPT, 5, 9, 14, error=late),
        Outcome(HASTY, 1, 0, 1.1, error=late),
    )
    wrong = (
        Outcome(PATIENT, 5, 0, 1, wrong=1),
        Outcome(PATIENT, 5, 9, 11, wrong=1),
        Outcome(PATIENT, 5, 0, 1, error=gone),
        Outcome(PATIENT, 5, 9, 11, error=late),
        Outcome(PATIENT, 5, 0, 5, error=late),
        Outcome(PARTIAL, 5, 0, 1, incomplete=1),
        Outcome(HASTY, 1, 0, 0.5, error=late),
        Outcome(HASTY, 1, 0, 4.1),
        Outcome(PATIENT, 5, 9, 11, error=ExpertdError("what?")),
    )
    assert [allowed(outcome, windows) for outcome in fine] == [True] * len(fine)
    assert [allowed(outcome, windows) for outcome in wrong] == [False] * len(wrong)


def test_a_part_added_twice_or_left_out_is_seen() -> None:
    half = np.ones((3, 4), np.float32)
    case = Case(0, half, {}, 2 * half)
    assert not case.wrong_rows(half + half).any()
    assert case.wrong_rows(half).all() and case.wrong_rows(half * 3).all()
    assert case.wrong_rows(half * np.nan).all()
