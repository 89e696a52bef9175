from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("model", "layer", "hidden_states", "router_logits", "topk_ids", "topk_weights", "hidden_states_format", "hidden_states_scale", "partial", "backend", "reply_dtype", "request_id", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ROUTER_LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FORMAT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    hidden_states: Tensor
    router_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    hidden_states_format: str
    hidden_states_scale: Tensor
    partial: bool
    backend: str
    reply_dtype: str
    request_id: str
    priority: int
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., hidden_states: _Optional[_Union[Tensor, _Mapping]] = ..., router_logits: _Optional[_Union[Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[Tensor, _Mapping]] = ..., topk_weights: _Optional[_Union[Tensor, _Mapping]] = ..., hidden_states_format: _Optional[str] = ..., hidden_states_scale: _Optional[_Union[Tensor, _Mapping]] = ..., partial: bool = ..., backend: _Optional[str] = ..., reply_dtype: _Optional[str] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("output", "backend", "mode", "entry", "queued_ns", "staged_ns", "computed_ns", "request_id", "status", "generation", "weights_digest")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_NS_FIELD_NUMBER: _ClassVar[int]
    STAGED_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_NS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    output: Tensor
    backend: str
    mode: str
    entry: str
    queued_ns: int
    staged_ns: int
    computed_ns: int
    request_id: str
    status: _status_pb2.Status
    generation: int
    weights_digest: str
    def __init__(self, output: _Optional[_Union[Tensor, _Mapping]] = ..., backend: _Optional[str] = ..., mode: _Optional[str] = ..., entry: _Optional[str] = ..., queued_ns: _Optional[int] = ..., staged_ns: _Optional[int] = ..., computed_ns: _Optional[int] = ..., request_id: _Optional[str] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., generation: _Optional[int] = ..., weights_digest: _Optional[str] = ...) -> None: ...

class ListLayersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListLayersReply(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerInfo]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerInfo, _Mapping]]] = ...) -> None: ...

class GetLayerRequest(_message.Message):
    __slots__ = ("model", "layer")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ...) -> None: ...

class RoutingInfo(_message.Message):
    __slots__ = ("method", "scoring", "renormalize", "n_group", "topk_group", "routed_scaling_factor", "scale_site", "weight_site", "eps", "correction_bias", "group_fill", "group_score")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    RENORMALIZE_FIELD_NUMBER: _ClassVar[int]
    N_GROUP_FIELD_NUMBER: _ClassVar[int]
    TOPK_GROUP_FIELD_NUMBER: _ClassVar[int]
    ROUTED_SCALING_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SCALE_SITE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SITE_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_BIAS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FILL_FIELD_NUMBER: _ClassVar[int]
    GROUP_SCORE_FIELD_NUMBER: _ClassVar[int]
    method: str
    scoring: str
    renormalize: bool
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    scale_site: str
    weight_site: str
    eps: float
    correction_bias: Tensor
    group_fill: str
    group_score: str
    def __init__(self, method: _Optional[str] = ..., scoring: _Optional[str] = ..., renormalize: bool = ..., n_group: _Optional[int] = ..., topk_group: _Optional[int] = ..., routed_scaling_factor: _Optional[float] = ..., scale_site: _Optional[str] = ..., weight_site: _Optional[str] = ..., eps: _Optional[float] = ..., correction_bias: _Optional[_Union[Tensor, _Mapping]] = ..., group_fill: _Optional[str] = ..., group_score: _Optional[str] = ...) -> None: ...

class ActivationInfo(_message.Message):
    __slots__ = ("name", "alpha", "beta", "limit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    alpha: float
    beta: float
    limit: float
    def __init__(self, name: _Optional[str] = ..., alpha: _Optional[float] = ..., beta: _Optional[float] = ..., limit: _Optional[float] = ...) -> None: ...

class PlanInfo(_message.Message):
    __slots__ = ("backend", "mode", "entry", "state", "microseconds")
    class MicrosecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    backend: str
    mode: str
    entry: str
    state: str
    microseconds: _containers.ScalarMap[int, float]
    def __init__(self, backend: _Optional[str] = ..., mode: _Optional[str] = ..., entry: _Optional[str] = ..., state: _Optional[str] = ..., microseconds: _Optional[_Mapping[int, float]] = ...) -> None: ...

class LayerInfo(_message.Message):
    __slots__ = ("model", "layer", "state", "hidden", "intermediate", "num_experts", "expert_begin", "expert_end", "top_k", "routing", "activation", "quant", "weights_digest", "generation", "queued_tokens", "plans", "detail", "expert_rows", "checkpoint_digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BEGIN_FIELD_NUMBER: _ClassVar[int]
    EXPERT_END_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    QUANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ROWS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    state: str
    hidden: int
    intermediate: int
    num_experts: int
    expert_begin: int
    expert_end: int
    top_k: int
    routing: RoutingInfo
    activation: ActivationInfo
    quant: str
    weights_digest: str
    generation: int
    queued_tokens: int
    plans: _containers.RepeatedCompositeFieldContainer[PlanInfo]
    detail: str
    expert_rows: _containers.RepeatedScalarFieldContainer[int]
    checkpoint_digest: str
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., state: _Optional[str] = ..., hidden: _Optional[int] = ..., intermediate: _Optional[int] = ..., num_experts: _Optional[int] = ..., expert_begin: _Optional[int] = ..., expert_end: _Optional[int] = ..., top_k: _Optional[int] = ..., routing: _Optional[_Union[RoutingInfo, _Mapping]] = ..., activation: _Optional[_Union[ActivationInfo, _Mapping]] = ..., quant: _Optional[str] = ..., weights_digest: _Optional[str] = ..., generation: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., plans: _Optional[_Iterable[_Union[PlanInfo, _Mapping]]] = ..., detail: _Optional[str] = ..., expert_rows: _Optional[_Iterable[int]] = ..., checkpoint_digest: _Optional[str] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cell(_message.Message):
    __slots__ = ("backend", "entry", "mode", "activation_quant", "quant", "state", "why")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_QUANT_FIELD_NUMBER: _ClassVar[int]
    QUANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    backend: str
    entry: str
    mode: str
    activation_quant: str
    quant: str
    state: str
    why: str
    def __init__(self, backend: _Optional[str] = ..., entry: _Optional[str] = ..., mode: _Optional[str] = ..., activation_quant: _Optional[str] = ..., quant: _Optional[str] = ..., state: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class GetCapabilitiesReply(_message.Message):
    __slots__ = ("device", "flashinfer", "cells", "drift")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FLASHINFER_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    device: str
    flashinfer: str
    cells: _containers.RepeatedCompositeFieldContainer[Cell]
    drift: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device: _Optional[str] = ..., flashinfer: _Optional[str] = ..., cells: _Optional[_Iterable[_Union[Cell, _Mapping]]] = ..., drift: _Optional[_Iterable[str]] = ...) -> None: ...

class LoadLayersRequest(_message.Message):
    __slots__ = ("model", "layers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class UnloadLayersRequest(_message.Message):
    __slots__ = ("model", "layers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerStatus(_message.Message):
    __slots__ = ("model", "layer", "state", "detail")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    state: str
    detail: str
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class LayerStatesReply(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerStatus]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerStatus, _Mapping]]] = ...) -> None: ...
