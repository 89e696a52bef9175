"""The queue: budgets, deadlines, callers who leave, closing; no waiter is ever left alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from tests.service.engine.parts import resident
from tests.strategies import generator, layer_spec, wire_call

from expertd.core import CallForm, RoutingForm
from expertd.engine.batcher import Batcher
from expertd.engine.ledger import Budget
from expertd.engine.policy import Rules
from expertd.engine.ticket import Ticket
from expertd.errors import Cancelled, DeadlineExceeded, Overloaded, Unavailable

LAYER = resident(layer_spec(), generator(1))
FORM = CallForm(RoutingForm.NONE, "float32")


def ticket(tokens: int = 1, nbytes: int = 1, deadline: float | None = None, **form: Any) -> Ticket:
    call = wire_call(hidden_states=torch.zeros(tokens, 1), priority=form.pop("priority", 0))
    client = form.pop("client", "")
    form_ = CallForm(RoutingForm.NONE, "float32", **form)
    return Ticket(call, LAYER, form_, tokens, nbytes, deadline, "test", client)


def queued() -> int:
    return LAYER.queued_tokens


def test_calls_of_one_form_share_a_batch_and_others_wait() -> None:
    batcher = Batcher(Budget(), Rules(max_batch_tokens=10))
    first, other, second = ticket(4), ticket(1, partial=True), ticket(5)
    for each in (first, other, second):
        batcher.submit(each)
    assert queued() == 10
    assert batcher.next_batch() == [first, second]
    assert batcher.next_batch() == [other]
    assert queued() == 0


@pytest.mark.parametrize(
    ("budget", "flag"),
    [
        (Budget(max_queued_tokens=7), "--max-queued-tokens"),
        (Budget(max_queued_bytes=7), "--max-queued-bytes"),
    ],
)
def test_a_full_queue_refuses_and_says_which_limit(budget: Budget, flag: str) -> None:
    batcher = Batcher(budget, Rules())
    held = [ticket(4, 4), ticket(3, 3)]
    for each in held:
        batcher.submit(each)
    with pytest.raises(Overloaded, match=flag):
        batcher.submit(ticket(1, 1))
    assert queued() == 7
    assert batcher.next_batch() == held
    batcher.submit(late := ticket(7, 7))
    assert batcher.next_batch() == [late] and queued() == 0


def test_an_empty_queue_takes_a_call_of_any_size() -> None:
    batcher = Batcher(Budget(1, 1), Rules(max_batch_tokens=1))
    batcher.submit(big := ticket(100, 100))
    assert batcher.next_batch() == [big]


def test_a_call_whose_deadline_passed_is_dropped_not_run() -> None:
    batcher = Batcher(Budget(), Rules())
    batcher.submit(late := ticket(deadline=time.monotonic() - 1))
    batcher.submit(good := ticket(deadline=time.monotonic() + 60))
    assert batcher.next_batch() == [good]
    with pytest.raises(DeadlineExceeded, match="in the queue"):
        late.future.result(0)
    assert queued() == 0


def test_a_caller_who_leaves_the_queue_is_forgotten() -> None:
    batcher = Batcher(Budget(), Rules())
    gone, stays = ticket(), ticket()
    batcher.submit(gone)
    batcher.submit(stays)
    batcher.cancel(gone)
    batcher.cancel(gone)
    with pytest.raises(Cancelled):
        gone.future.result(0)
    assert batcher.next_batch() == [stays]


def test_leaving_after_the_deadline_is_told_as_the_deadline() -> None:
    batcher = Batcher(Budget(), Rules())
    batcher.submit(late := ticket(deadline=time.monotonic() - 1))
    batcher.cancel(late)
    with pytest.raises(DeadlineExceeded):
        late.future.result(0)


def test_leaving_a_running_call_changes_nothing() -> None:
    batcher = Batcher(Budget(), Rules())
    batcher.submit(running := ticket())
    assert batcher.next_batch() == [running]
    batcher.cancel(running)
    assert not running.future.cancel(), "nobody can cancel what the executor will answer"
    assert not running.future.done()


def test_a_future_cancelled_by_its_carrier_is_never_answered() -> None:
    # asyncio.wrap_future cancels the future itself; an answer to it would raise in the executor.
    batcher = Batcher(Budget(), Rules())
    gone, forgotten, stays = ticket(), ticket(), ticket()
    for each in (gone, forgotten, stays):
        batcher.submit(each)
    assert gone.future.cancel() and forgotten.future.cancel()
    batcher.cancel(gone)
    assert batcher.next_batch() == [stays]
    assert queued() == 0


def test_a_batch_of_nobody_is_not_the_end() -> None:
    batcher = Batcher(Budget(), Rules())
    batcher.submit(gone := ticket())
    gone.future.cancel()
    got: list[list[Ticket]] = []
    waiter = threading.Thread(target=lambda: got.append(batcher.next_batch()))
    waiter.start()
    batcher.submit(stays := ticket())
    waiter.join(10)
    assert got == [[stays]]


def test_closing_refuses_new_calls_and_still_runs_the_old() -> None:
    batcher = Batcher(Budget(), Rules(max_batch_tokens=1))
    held = [ticket(), ticket()]
    for each in held:
        batcher.submit(each)
    batcher.close("draining")
    with pytest.raises(Unavailable, match="draining"):
        batcher.submit(ticket())
    assert [batcher.next_batch(), batcher.next_batch(), batcher.next_batch()] == [
        [held[0]],
        [held[1]],
        [],
    ]


def test_closing_wakes_a_waiting_executor() -> None:
    batcher = Batcher(Budget(), Rules())
    got: list[list[Ticket]] = []
    waiter = threading.Thread(target=lambda: got.append(batcher.next_batch()))
    waiter.start()
    batcher.close("draining")
    waiter.join(10)
    assert got == [[]]


def test_failing_all_answers_everyone_who_waits() -> None:
    batcher = Batcher(Budget(), Rules())
    held = [ticket(), ticket(2, partial=True)]
    for each in held:
        batcher.submit(each)
    batcher.submit(gone := ticket())
    gone.future.cancel()
    batcher.fail_all("broken")
    for each in held:
        with pytest.raises(Unavailable, match="broken"):
            each.future.result(0)
    assert queued() == 0
    with pytest.raises(Unavailable, match="broken"):
        batcher.submit(ticket())


def test_priority_goes_first_and_does_not_split_a_key() -> None:
    batcher = Batcher(Budget(), Rules())
    low, high = ticket(priority=-5), ticket(priority=5)
    batcher.submit(low)
    batcher.submit(high)
    assert batcher.next_batch() == [high, low]


def test_many_threads_lose_and_repeat_nothing() -> None:
    batcher = Batcher(Budget(max_queued_tokens=1 << 30), Rules(max_batch_tokens=7))
    sent = [[ticket(n % 5 + 1, partial=n % 2 == 0) for n in range(100)] for _ in range(4)]
    threads = [
        threading.Thread(target=lambda mine=mine: [batcher.submit(t) for t in mine])
        for mine in sent
    ]
    for thread in threads:
        thread.start()
    got: list[Ticket] = []
    while len(got) < 400:
        batch = batcher.next_batch()
        assert len({t.key for t in batch}) == 1
        assert sum(t.tokens for t in batch) <= 7 or len(batch) == 1
        got += batch
    for thread in threads:
        thread.join()
    assert {id(t) for t in got} == {id(t) for mine in sent for t in mine} and queued() == 0


def test_a_call_cancelled_by_its_carrier_leaves_the_budget_at_once() -> None:
    batcher = Batcher(Budget(max_queued_tokens=2), Rules())
    batcher.submit(ticket())
    batcher.submit(gone := ticket())
    gone.future.cancel()
    batcher.cancel(gone)
    assert queued() == 1
    batcher.submit(ticket())
    batcher.fail_all("over")


def test_a_full_queue_makes_room_for_a_client_with_less() -> None:
    batcher = Batcher(Budget(max_queued_tokens=10), Rules())
    held = [ticket(5, client="much"), ticket(3, client="much"), ticket(2, client="much")]
    for each in held:
        batcher.submit(each)
    batcher.submit(newcomer := ticket(4, client="little"))
    for gone in held[1:]:
        with pytest.raises(Overloaded, match="beyond its client's share") as caught:
            gone.future.result(0)
        assert caught.value.retry_seconds is not None
    assert queued() == 9
    with pytest.raises(Overloaded, match="whose share is 5"):
        batcher.submit(ticket(1, client="much"))
    assert batcher.next_batch() == [held[0], newcomer] and queued() == 0


def test_what_a_refused_caller_is_told_comes_from_the_queues_own_speed() -> None:
    batcher = Batcher(Budget(max_queued_tokens=10), Rules(max_batch_tokens=1))
    for _ in range(10):
        batcher.submit(ticket())
    for _ in range(3):
        batcher.next_batch()
    with pytest.raises(Overloaded) as caught:
        batcher.submit(ticket(1000))
    told = caught.value.retry_seconds
    assert told is not None and f"retry in {told:.3g} s" in str(caught.value)
    assert told == batcher._rate.seconds(997)
    batcher.fail_all("over")


def test_a_delayed_batch_forms_and_a_drain_waits_for_no_delay() -> None:
    batcher = Batcher(Budget(), Rules(max_batch_tokens=3, delay_ns=3600 * 10**9))
    calls = [ticket() for _ in range(3)]
    got: list[list[Ticket]] = []
    waiter = threading.Thread(target=lambda: got.append(batcher.next_batch()))
    waiter.start()
    for each in calls:
        batcher.submit(each)
    waiter.join(10)
    assert got == [calls], "full: it need not wait for an hour"
    batcher.submit(last := ticket())
    batcher.close("draining")
    assert batcher.next_batch() == [last]
