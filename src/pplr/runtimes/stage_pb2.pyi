from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Wire(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WIRE_UNSPECIFIED: _ClassVar[Wire]
    WIRE_FLOAT32: _ClassVar[Wire]
    WIRE_BFLOAT16: _ClassVar[Wire]
    WIRE_INT8: _ClassVar[Wire]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
WIRE_UNSPECIFIED: Wire
WIRE_FLOAT32: Wire
WIRE_BFLOAT16: Wire
WIRE_INT8: Wire
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_INT64: DType

class States(_message.Message):
    __slots__ = ("rows", "tokens", "width", "wire", "padded_left", "lengths", "data", "scales", "prefix")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    PADDED_LEFT_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    rows: int
    tokens: int
    width: int
    wire: Wire
    padded_left: bool
    lengths: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    scales: bytes
    prefix: int
    def __init__(self, rows: _Optional[int] = ..., tokens: _Optional[int] = ..., width: _Optional[int] = ..., wire: _Optional[_Union[Wire, str]] = ..., padded_left: bool = ..., lengths: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., prefix: _Optional[int] = ...) -> None: ...

class NamedTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("session", "sequence")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    session: int
    sequence: int
    def __init__(self, session: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("version", "base_sha256", "input_layers", "output_layers", "total_layers", "wires", "adapter_json", "training_json", "tenant", "attempt", "keep")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    INPUT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    WIRES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_JSON_FIELD_NUMBER: _ClassVar[int]
    TRAINING_JSON_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    version: str
    base_sha256: str
    input_layers: int
    output_layers: int
    total_layers: int
    wires: _containers.RepeatedScalarFieldContainer[Wire]
    adapter_json: str
    training_json: str
    tenant: str
    attempt: int
    keep: bool
    def __init__(self, version: _Optional[str] = ..., base_sha256: _Optional[str] = ..., input_layers: _Optional[int] = ..., output_layers: _Optional[int] = ..., total_layers: _Optional[int] = ..., wires: _Optional[_Iterable[_Union[Wire, str]]] = ..., adapter_json: _Optional[str] = ..., training_json: _Optional[str] = ..., tenant: _Optional[str] = ..., attempt: _Optional[int] = ..., keep: bool = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("session", "wire", "max_message_bytes", "max_batch", "max_tokens", "kept")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    session: int
    wire: Wire
    max_message_bytes: int
    max_batch: int
    max_tokens: int
    kept: bool
    def __init__(self, session: _Optional[int] = ..., wire: _Optional[_Union[Wire, str]] = ..., max_message_bytes: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_tokens: _Optional[int] = ..., kept: bool = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("header", "states", "step", "keep", "adapter", "has_dropout_seed", "dropout_seed", "gradient_unwanted")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HAS_DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_UNWANTED_FIELD_NUMBER: _ClassVar[int]
    header: Header
    states: States
    step: int
    keep: bool
    adapter: bool
    has_dropout_seed: bool
    dropout_seed: int
    gradient_unwanted: bool
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., states: _Optional[_Union[States, _Mapping]] = ..., step: _Optional[int] = ..., keep: bool = ..., adapter: bool = ..., has_dropout_seed: bool = ..., dropout_seed: _Optional[int] = ..., gradient_unwanted: bool = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("header", "step", "states")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    header: Header
    step: int
    states: States
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., step: _Optional[int] = ..., states: _Optional[_Union[States, _Mapping]] = ...) -> None: ...

class StatesReply(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: States
    def __init__(self, states: _Optional[_Union[States, _Mapping]] = ...) -> None: ...

class BeginRoundRequest(_message.Message):
    __slots__ = ("header", "total_steps", "proximal_mu", "train_a", "has_anchor", "anchor")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    TRAIN_A_FIELD_NUMBER: _ClassVar[int]
    HAS_ANCHOR_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    header: Header
    total_steps: int
    proximal_mu: float
    train_a: bool
    has_anchor: bool
    anchor: Tensors
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., total_steps: _Optional[int] = ..., proximal_mu: _Optional[float] = ..., train_a: bool = ..., has_anchor: bool = ..., anchor: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class NormRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: Header
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ...) -> None: ...

class NormReply(_message.Message):
    __slots__ = ("squared",)
    SQUARED_FIELD_NUMBER: _ClassVar[int]
    squared: float
    def __init__(self, squared: _Optional[float] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("header", "scale")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    header: Header
    scale: float
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class SimpleRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: Header
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheRequest(_message.Message):
    __slots__ = ("header", "cache")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    header: Header
    cache: int
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., cache: _Optional[int] = ...) -> None: ...

class CacheReply(_message.Message):
    __slots__ = ("cache",)
    CACHE_FIELD_NUMBER: _ClassVar[int]
    cache: int
    def __init__(self, cache: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("header", "cache", "states", "total_tokens", "total_lengths", "rows", "sees")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEES_FIELD_NUMBER: _ClassVar[int]
    header: Header
    cache: int
    states: States
    total_tokens: int
    total_lengths: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    sees: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., cache: _Optional[int] = ..., states: _Optional[_Union[States, _Mapping]] = ..., total_tokens: _Optional[int] = ..., total_lengths: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., sees: _Optional[bytes] = ...) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("header", "cache", "other", "rows", "keep", "skip")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    header: Header
    cache: int
    other: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    keep: _containers.RepeatedScalarFieldContainer[int]
    skip: int
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., cache: _Optional[int] = ..., other: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., keep: _Optional[_Iterable[int]] = ..., skip: _Optional[int] = ...) -> None: ...

class TensorsRequest(_message.Message):
    __slots__ = ("header", "tensors")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    header: Header
    tensors: Tensors
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class TensorsReply(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: Tensors
    def __init__(self, tensors: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class TakeRequest(_message.Message):
    __slots__ = ("header", "label")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    header: Header
    label: str
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., label: _Optional[str] = ...) -> None: ...

class TenancyRequest(_message.Message):
    __slots__ = ("client", "tenant", "tensors", "label")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    client: str
    tenant: str
    tensors: Tensors
    label: str
    def __init__(self, client: _Optional[str] = ..., tenant: _Optional[str] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ..., label: _Optional[str] = ...) -> None: ...

class Tenancy(_message.Message):
    __slots__ = ("client", "tenant", "input_layers", "output_layers", "rank", "steps", "in_memory", "on_disk", "idle_s")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    INPUT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    client: str
    tenant: str
    input_layers: int
    output_layers: int
    rank: int
    steps: int
    in_memory: bool
    on_disk: bool
    idle_s: float
    def __init__(self, client: _Optional[str] = ..., tenant: _Optional[str] = ..., input_layers: _Optional[int] = ..., output_layers: _Optional[int] = ..., rank: _Optional[int] = ..., steps: _Optional[int] = ..., in_memory: bool = ..., on_disk: bool = ..., idle_s: _Optional[float] = ...) -> None: ...

class TenancyList(_message.Message):
    __slots__ = ("tenancies",)
    TENANCIES_FIELD_NUMBER: _ClassVar[int]
    tenancies: _containers.RepeatedCompositeFieldContainer[Tenancy]
    def __init__(self, tenancies: _Optional[_Iterable[_Union[Tenancy, _Mapping]]] = ...) -> None: ...

class TextReply(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...
