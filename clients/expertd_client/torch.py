"""torch tensors on the wire, and a module whose experts are elsewhere; imported only with torch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expertd_wire.tensors import DTYPES, WireError, WireTensor


def to_wire(array: torch.Tensor) -> WireTensor:
    """A view of array's bytes on the host, copied only if it must be; raises WireError."""
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise WireError(f"dtype {dtype!r} cannot travel; use one of {', '.join(DTYPES)}")
    host = array.detach().cpu().contiguous()
    return WireTensor(dtype, tuple(array.shape), _bytes(host).data)


def from_wire(tensor: WireTensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with tensor's dtype and values, on the device of like."""
    host = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="cpu")
    _bytes(host)[:] = np.frombuffer(tensor.data, np.uint8)
    return host.to(like.device)


def adopt(array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory of array, or a copy of it on another device of like."""
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
    host = flat.view(getattr(torch, array.dtype.name)).reshape(array.shape)
    return host.to(like.device)


def _bytes(host: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a contiguous tensor on the host, as an array that shares them."""
    return host.reshape(-1).view(torch.uint8).numpy()


class Forwards(Protocol):
    """What RemoteExperts calls: a Client, an ExpertPool, or your own."""

    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: Tensor,
        *,
        timeout: float | None = ...,
        router_logits: Any | None = ...,
        topk_ids: Any | None = ...,
        topk_weights: Any | None = ...,
    ) -> Tensor:
        """As Client.forward."""


class RemoteExperts(nn.Module):
    """The routed experts of one layer, on servers; it holds no weights and has no gradient.

    Raises ExpertdError's family from forward, RuntimeError from backward.
    """

    def __init__(
        self, client: Forwards, model: str, layer: int, *, timeout: float | None = 30.0
    ) -> None:
        super().__init__()
        self.client, self.model, self.layer, self.timeout = client, model, layer, timeout

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        *,
        router_logits: Tensor | None = None,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> Tensor:
        """The output [..., H] for hidden_states [..., H].

        Routing is router_logits [..., E], or topk_ids and topk_weights [..., K]; id -1 is none.
        """
        named = {"router_logits": router_logits, "topk_ids": topk_ids, "topk_weights": topk_weights}
        routing = {name: tensor for name, tensor in named.items() if tensor is not None}
        output = self.client.forward(
            self.model,
            self.layer,
            _rows(hidden_states),
            timeout=self.timeout,
            **{name: _rows(tensor) for name, tensor in routing.items()},
        ).view(hidden_states.shape)
        inputs = (hidden_states, *routing.values())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            marked: Tensor = _Ungraded.apply(output, *inputs)  # type: ignore[no-untyped-call]
            return marked
        return output

    def extra_repr(self) -> str:
        return f"{self.model!r}, layer {self.layer}"


def _rows(tensor: Tensor) -> Tensor:
    """[..., N] as [T, N]."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


class _Ungraded(torch.autograd.Function):
    """Hands output on; whoever wants its gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *given: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("RemoteExperts has no gradient; call the model under torch.no_grad()")
