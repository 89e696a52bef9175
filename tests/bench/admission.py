"""What a question to the capability table costs: python -m tests.bench.admission

Prints microseconds on this machine: the best of several rounds, as timeit advises.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from expertd.capability.device import simulated
from expertd.capability.explain import explain
from expertd.capability.plan import plan
from expertd.capability.spec import parse_spec
from expertd.core import CallForm, RoutingForm
from expertd.engine.choice import plans_of
from expertd.engine.resident import Resident

DEEPSEEK_V3 = {
    "num_experts": 256,
    "top_k": 8,
    "hidden": 7168,
    "intermediate": 2048,
    "routing": "DeepSeekV3",
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "bias": True,
    "quant": "fp8_block128",
}


def microseconds(question: Callable[[], object], number: int) -> float:
    question()
    return min(timeit.repeat(question, number=number, repeat=7)) / number * 1e6


def form() -> CallForm:
    """A new form each time, as a carrier makes one of each call."""
    return CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32")


def main() -> None:
    described = parse_spec(DEEPSEEK_V3)
    device = simulated("sm100")
    resident = Resident("model", 3, described.spec, device)
    questions = (
        ("cached admission, goal < 5", lambda: plans_of(resident, form()), 100_000),
        ("one plan() of the whole table", lambda: plan(described.spec, form(), device), 100),
        ("full explain, goal < 5000", lambda: explain(described.spec, form(), device), 100),
        ("reading a spec from JSON's dict", lambda: parse_spec(DEEPSEEK_V3), 1000),
    )
    for name, question, number in questions:
        print(f"{name:34} {microseconds(question, number):10.2f} us")


if __name__ == "__main__":
    main()
