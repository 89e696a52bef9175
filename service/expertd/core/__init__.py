"""The vocabulary that every room shares; imports no torch.

Shape legend, used as suffixes and in docstrings:
T tokens · E experts of the model · L experts held here · K experts per token
H width of a row · I width of an expert · M rows of the first matrix: 2I (gated) or I
"""

from expertd.core.activation import Activation, ActivationKind
from expertd.core.call import CallForm, RoutingForm
from expertd.core.layer import LayerSpec, PlanMode
from expertd.core.quant import QuantScheme
from expertd.core.routing import RoutingMethod, RoutingSpec

__all__ = [
    "Activation",
    "ActivationKind",
    "CallForm",
    "LayerSpec",
    "PlanMode",
    "QuantScheme",
    "RoutingForm",
    "RoutingMethod",
    "RoutingSpec",
]
