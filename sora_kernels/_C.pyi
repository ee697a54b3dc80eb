"""C++ and CUDA kernels: csrc/<op>/<op>.h documents each function's shapes and layouts.

Addresses are ``Tensor.data_ptr()``, 0 is the null pointer; ``threads`` is
``_native.num_threads()``; ``device`` is a CUDA index, -1 the CPU; ``stream`` a raw stream handle.
"""

from typing import Any

def build_info() -> dict[str, Any]: ...
def openmp_max_threads() -> int: ...
def openmp_team_size(threads: int) -> int: ...
def cuda_driver_version() -> int:
    """Only in a build with CUDA."""

def dropout(
    dtype: int,
    count: int,
    x: int,
    seed: int,
    p: float,
    y: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def lstm_cpu_isa() -> str: ...
def lstm_forward_cpu(
    dtype: int,
    shape: tuple[int, ...],
    input: int,
    input_stride: int,
    weights: tuple[int, ...],
    h0: int,
    c0: int,
    gates: int,
    y: int,
    cells: int,
    h_n: int,
    c_n: int,
    threads: int,
) -> None:
    """``shape``: LstmShape's nine. ``weights``: w_hh, b_ih, b_hh, w_hr, w_hh_int8, int8_scale, both
    directions of each."""

def lstm_backward_cpu(
    dtype: int,
    shape: tuple[int, ...],
    gates: int,
    cells: int,
    y: int,
    weights: tuple[int, ...],
    h0: int,
    c0: int,
    dy: int,
    dcells: int,
    dh_n: int,
    dc_n: int,
    dgates: int,
    dh: int,
    dh0: int,
    dc0: int,
    threads: int,
) -> None: ...
def lstm_previous_states_cpu(
    element_bytes: int,
    shape: tuple[int, ...],
    direction: int,
    y: int,
    h0: int,
    h_prev: int,
) -> None: ...
def lstm_int8_bytes_cpu(cell: int, H: int, O: int) -> int: ...  # noqa: E741
def lstm_pack_int8_cpu(cell: int, H: int, O: int, w: int, packed: int) -> None: ...  # noqa: E741

class LstmForwardSteps:
    """LstmStepForward: made once for all steps of a direction, called once a step."""

    def __init__(
        self,
        dtype: int,
        steps: tuple[int, ...],
        input: int,
        input_stride: int,
        b_ih: int,
        b_hh: int,
        h_prev: int,
        h: int,
        c: int,
        y: int,
        y_stride: int,
        cells: int,
        cells_stride: int,
        gates: int,
        device: int,
        stream: int,
    ) -> None:
        """``steps``: LstmSteps' eight."""

    def __call__(self, t: int, hidden: int) -> None: ...

class LstmBackwardSteps:
    """LstmStepBackward, likewise."""

    def __init__(
        self,
        dtype: int,
        steps: tuple[int, ...],
        gates: int,
        cells: int,
        cells_stride: int,
        c0: int,
        h: int,
        h_stride: int,
        dy: int,
        dy_stride: int,
        dcells: int,
        dcells_stride: int,
        dh: int,
        dc: int,
        dgates: int,
        device: int,
        stream: int,
    ) -> None: ...
    def __call__(self, t: int, dh_next: int) -> None: ...

def lstm_resident_forward(dtype: int, numbers: tuple[int, ...], device: int, stream: int) -> None:
    """Only in a build with CUDA. ``numbers``: LstmResidentShape's ten and the fields of
    LstmResidentForward, in their order."""

def lstm_resident_backward(dtype: int, numbers: tuple[int, ...], device: int, stream: int) -> None:
    """Only in a build with CUDA."""

def lstm_resident_plan(
    dtype: int, numbers: tuple[int, ...], backward: bool, device: int
) -> dict[str, int]:
    """Only in a build with CUDA. ``numbers``: LstmResidentShape's. The fields of LstmResidentPlan."""

def pyramid_pool_cpu_isa() -> str: ...
def pyramid_pool_forward_cpu(
    dtype: int,
    pool: tuple[int, ...],
    x: int,
    strides: tuple[int, ...],
    results: list[int],
    indices: int,
    threads: int,
) -> None:
    """``pool``: B, C, T, H, W, valid_size, levels, number of levels, columns, inner, as PyramidPool.
    ``levels`` is the address of PyramidLevel's fifteen of each."""

def pyramid_pool_backward_cpu(
    dtype: int,
    pool: tuple[int, ...],
    results: list[int],
    indices: int,
    dx: int,
    threads: int,
) -> None: ...
