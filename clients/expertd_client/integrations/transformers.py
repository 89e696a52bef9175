"""Models of transformers with their experts on servers: the experts implementation "expertd".

    remote = register(pool)
    remote.attach(model, "the name under which its experts are served")
    model.generate(...)

attach refuses a model whose experts would stay here. Where the pool serves one model only,
model.set_experts_implementation("expertd") alone is enough; but transformers takes that from every
model, and classes that do not know the setting ignore it in silence. transformers 5.17 and later
take the names of registered implementations; 5.0 took its own only, and says so.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import finegrained_fp8  # noqa: F401  it adds a registry of its own
from transformers.integrations.moe import ExpertsInterface

from expertd_client.errors import InvalidArgument, NotFound
from expertd_client.torch import Forwards, RemoteExperts
from expertd_wire.v1 import experts_pb2 as pb

NAME = "expertd"


class Pool(Forwards, Protocol):
    """An ExpertPool or a Client."""

    def layers(self, model: str | None = None) -> list[pb.LayerInfo]:
        """What is served."""


def register(pool: Pool, *, timeout: float | None = 30.0) -> Remote:
    """Makes "expertd" an experts implementation that asks pool; the last registration counts."""
    remote = Remote(pool, timeout)
    for registry in (ExpertsInterface, *ExpertsInterface.__subclasses__()):
        registry.register(NAME, remote)
    return remote


class Remote:
    """The function that transformers calls for an experts module, and who each module is."""

    def __init__(self, pool: Pool, timeout: float | None) -> None:
        self._pool, self._timeout = pool, timeout
        self._experts: WeakKeyDictionary[nn.Module, RemoteExperts] = WeakKeyDictionary()

    def __call__(
        self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The output [T, H] of rows [T, H] for ids and weights [T, K]; id num_experts is none."""
        if module not in self._experts:
            self._name(_model_of(module), None)
        output: Tensor = self._experts[module](
            hidden_states,
            topk_ids=top_k_index.masked_fill(top_k_index == module.num_experts, -1),
            topk_weights=top_k_weights.float(),
        )
        return output

    def attach(self, model: PreTrainedModel, served: str | None = None) -> None:
        """Lets model's experts be those that the pool serves as served (None: its only model).

        Raises InvalidArgument for a class that ignores experts implementations or for experts that
        differ from those served, NotFound for layers that nobody serves.
        """
        self._name(model, served)
        configs = [module.config for _, module in _obeying(model)]
        before = [config._experts_implementation for config in configs]
        model.set_experts_implementation(NAME)
        if any(config._experts_implementation != NAME for config in configs):
            for config, implementation in zip(configs, before, strict=True):
                config._experts_implementation = implementation
            raise InvalidArgument(_ignores(model, "its experts have a config of their own"))

    def release(self, model: PreTrainedModel) -> None:
        """Frees the memory of the weights of model's experts; they cannot run here any more."""
        experts = [module for _, module in _obeying(model)]
        if not all(module in self._experts for module in experts):
            raise InvalidArgument("attach the model first: its experts still run here")
        for module in experts:
            module.to("meta")

    def _name(self, model: PreTrainedModel, served: str | None) -> None:
        """Finds the layer served for every experts module of model; raises as attach does."""
        if local := {type(m).__name__ for m in _ignoring(model)}:
            raise InvalidArgument(_ignores(model, f"{', '.join(sorted(local))} would run here"))
        served = served or self._only_model()
        layers = {info.layer: info for info in self._pool.layers(served)}
        remote = {}
        for name, module in _obeying(model):
            number = _layer_number(name)
            _check(f"{served!r}, layer {number}", layers.get(number), module)
            remote[module] = RemoteExperts(self._pool, served, number, timeout=self._timeout)
        self._experts.update(remote)

    def _only_model(self) -> str:
        models = sorted({info.model for info in self._pool.layers()})
        if len(models) != 1:
            raise InvalidArgument(
                f"the pool serves {', '.join(models) or 'nothing'}; say which model's experts "
                "these are: attach(model, NAME)"
            )
        return models[0]


def _obeying(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The experts modules that ask for an implementation: their class has been decorated so."""
    return ((name, m) for name, m in model.named_modules() if hasattr(m, "is_transposed"))


def _ignoring(model: PreTrainedModel) -> list[nn.Module]:
    """What runs experts by itself; the model as a whole when nothing in it obeys."""
    obeying = {module for _, module in _obeying(model)}
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "experts"]
    ignoring = [module for module in named if module not in obeying]
    return ignoring if ignoring or obeying else [model]


def _ignores(model: PreTrainedModel, why: str) -> str:
    return f"{type(model).__name__} ignores set_experts_implementation: {why}"


def _layer_number(name: str) -> int:
    """The 3 of model.layers.3.mlp.experts."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
    if len(numbers) != 1:
        raise InvalidArgument(f"{name}: experts of one numbered layer are accepted")
    return int(numbers[0])


def _check(name: str, info: pb.LayerInfo | None, module: Any) -> None:
    if info is None:
        raise NotFound(f"{name}: no replica serves it")
    if info.num_experts != module.num_experts:
        raise InvalidArgument(
            f"{name}: {info.num_experts} experts are served, the model has {module.num_experts}; "
            "experts spread over processes (expert parallel) cannot be remote as well"
        )


def _model_of(module: nn.Module) -> PreTrainedModel:
    """The model in memory that has module: transformers hands the module alone to its function."""
    for candidate in gc.get_objects():
        if issubclass(type(candidate), PreTrainedModel) and module in set(candidate.modules()):
            found: PreTrainedModel = candidate
            return found
    raise InvalidArgument(f"{type(module).__name__} belongs to no model; attach(model, NAME) first")
