"""Read the tensors of a TensorFlow checkpoint (V2 format) without TensorFlow.

    tensors = tf_checkpoint.read_checkpoint("folder/name")

The index is a leveldb table whose values are protocol buffers; the data are raw tensors.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TABLE_MAGIC = 0xDB4775248B80FB57
TABLE_FOOTER_BYTES = 48
TENSOR_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64}  # DataType of types.proto


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a little-endian number of 7 bits per byte: (value, position after it)."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of each field of a protocol buffer message; strings and inner messages are bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type in (1, 2, 5):
            size, position = _varint(message, position) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], position)
            value, position = message[position : position + size], position + size
        else:
            raise ValueError(f"unknown wire type {wire_type} in a protocol buffer")
        yield number, value


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of each entry of a block; a key is stored without the prefix of the previous key.

    After the entries come the offsets of those with a whole key and their number (uint32), after the block one byte
    for its compression and a checksum, which is not verified.
    """
    if table[offset + size] != 0:
        raise ValueError("the index of the checkpoint is compressed, which is not supported")
    block = table[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    key, position = b"", 0
    while position < size - 4 * (restarts + 1):
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def read_table(table: bytes) -> dict[bytes, bytes]:
    """Read all keys and values of a leveldb table. Source: leveldb, doc/table_format.md."""
    footer = table[-TABLE_FOOTER_BYTES:]
    if len(footer) < TABLE_FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != TABLE_MAGIC:
        raise ValueError("the index of the checkpoint is not a table of leveldb")
    position, entries = 0, {}
    for _ in range(2):  # skips the handle of the meta index
        _, position = _varint(footer, position)
    index_offset, position = _varint(footer, position)
    index_size, _ = _varint(footer, position)
    for _, handle in _block(table, index_offset, index_size):
        offset, behind = _varint(handle, 0)
        size, _ = _varint(handle, behind)
        entries.update(_block(table, offset, size))
    return entries


def _read_tensor(entry: bytes, data: bytes) -> np.ndarray:
    """Read the tensor of a BundleEntryProto. Source: tensorflow, core/protobuf/tensor_bundle.proto."""
    fields = dict(_fields(entry))
    if fields[1] not in TENSOR_TYPES or fields.get(3, 0) != 0:
        raise ValueError(f"only numbers in one data file are supported, got type {fields[1]}")
    dimensions = [dict(_fields(value)) for number, value in _fields(fields.get(2, b"")) if number == 2]
    shape = [dimension.get(1, 0) for dimension in dimensions]
    dtype, offset, size = np.dtype(TENSOR_TYPES[fields[1]]), fields.get(4, 0), fields.get(5, 0)
    if size != dtype.itemsize * np.prod(shape, dtype=int) or offset + size > len(data):
        raise ValueError(f"a tensor of shape {shape} doesn't fit its {size} bytes")
    return np.frombuffer(data, dtype.newbyteorder("<"), size // dtype.itemsize, offset).reshape(shape)


def read_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """Read all tensors of a TensorFlow checkpoint by name, those of the optimiser included.

    The files are `prefix`.index and `prefix`.data-00000-of-00001. Raises ValueError for unsupported files:
    compressed tables, several data files, tensors that are not numbers.
    """
    data = Path(f"{prefix}.data-00000-of-00001").read_bytes()
    entries = read_table(Path(f"{prefix}.index").read_bytes())
    return {key.decode(): _read_tensor(entry, data) for key, entry in entries.items() if key}  # "" is the header
