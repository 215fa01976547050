"""Number formats of PyTorch and safetensors files as NumPy dtypes (ml_dtypes adds what NumPy lacks)."""

import ml_dtypes
import numpy as np

_BY_TORCH_NAME = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
TORCH = {name: np.dtype(dtype) for name, dtype in _BY_TORCH_NAME.items()}

# torch/storage.py: the typed storages that pickles of state dicts name.
TORCH_STORAGE = {
    "DoubleStorage": TORCH["float64"],
    "FloatStorage": TORCH["float32"],
    "HalfStorage": TORCH["float16"],
    "BFloat16Storage": TORCH["bfloat16"],
    "LongStorage": TORCH["int64"],
    "IntStorage": TORCH["int32"],
    "ShortStorage": TORCH["int16"],
    "CharStorage": TORCH["int8"],
    "ByteStorage": TORCH["uint8"],
    "BoolStorage": TORCH["bool"],
    "ComplexFloatStorage": TORCH["complex64"],
    "ComplexDoubleStorage": TORCH["complex128"],
}

SAFETENSORS = {
    "F64": TORCH["float64"],
    "F32": TORCH["float32"],
    "F16": TORCH["float16"],
    "BF16": TORCH["bfloat16"],
    "F8_E4M3": TORCH["float8_e4m3fn"],
    "F8_E5M2": TORCH["float8_e5m2"],
    "I64": TORCH["int64"],
    "I32": TORCH["int32"],
    "I16": TORCH["int16"],
    "I8": TORCH["int8"],
    "U64": TORCH["uint64"],
    "U32": TORCH["uint32"],
    "U16": TORCH["uint16"],
    "U8": TORCH["uint8"],
    "BOOL": TORCH["bool"],
    "C64": TORCH["complex64"],
}


def is_floating(dtype: np.dtype) -> bool:
    """True for every floating format, bfloat16 and float8 included (NumPy calls those kind 'V')."""
    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat", "float8"))
