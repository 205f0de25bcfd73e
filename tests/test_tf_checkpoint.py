"""The reader of TensorFlow checkpoints reads back what a writer of our own wrote, and refuses the rest."""

import struct

import numpy as np
import pytest

from continuation.tf_checkpoint import read_checkpoint


def varint(value: int) -> bytes:
    low = bytes([value & 0x7F | (0x80 if value > 0x7F else 0)])
    return low + varint(value >> 7) if value > 0x7F else low


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(x: np.ndarray, dtype: int, offset: int) -> bytes:
    """A BundleEntryProto, with a checksum as a fixed32 field."""
    shape = b"".join(field(2, field(1, size)) for size in x.shape)
    checksum = varint(6 << 3 | 5) + b"\1\2\3\4"
    return field(1, dtype) + field(2, shape) + field(4, offset) + field(5, x.nbytes) + checksum


def block(entries: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    """A block with keys that share what they can with the one before, and its trailer of 5 bytes."""
    data, last = b"", b""
    for key, value in entries:
        shared = next(
            (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last))
        )
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return data + struct.pack("<II", 0, 1) + bytes([compression]) + b"sum!"


def table(blocks: list[list[tuple[bytes, bytes]]], compression: int = 0) -> bytes:
    data, handles = b"", []
    for entries in blocks:
        content = block(entries, compression)
        handles.append((entries[-1][0], varint(len(data)) + varint(len(content) - 5)))
        data += content
    meta, index = block([]), block(handles)
    footer = varint(len(data)) + varint(len(meta) - 5) + varint(len(data + meta)) + varint(len(index) - 5)
    return data + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


TENSORS = {
    "conv/bias": (np.arange(3, dtype=np.float32), 1),
    "conv/bias/Adam": (np.arange(300, dtype=np.float64).reshape(3, 4, 25) / 7, 2),
    "conv/kernel": (np.array([[-1], [2]], dtype=np.int32), 3),
    "step": (np.array(12345678901, dtype=np.int64), 9),
}


def write_checkpoint(prefix: str, compression: int = 0, missing_bytes: int = 0) -> None:
    data, entries = b"", [(b"", field(1, 1))]
    for name, (x, dtype) in TENSORS.items():
        entries.append((name.encode(), entry(x, dtype, len(data))))
        data += x.tobytes()
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        file.write(data[: len(data) - missing_bytes])
    with open(f"{prefix}.index", "wb") as file:
        file.write(table([entries[:3], entries[3:]], compression))


def test_every_tensor_of_a_checkpoint_is_read_back(tmp_path):
    write_checkpoint(f"{tmp_path}/")
    tensors = read_checkpoint(f"{tmp_path}/")
    assert list(tensors) == list(TENSORS)
    for name, (x, _) in TENSORS.items():
        assert tensors[name].dtype == x.dtype and tensors[name].shape == x.shape
        np.testing.assert_array_equal(tensors[name], x)


def test_a_checkpoint_that_is_compressed_or_cut_short_is_refused(tmp_path):
    write_checkpoint(f"{tmp_path}/", compression=1)
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(f"{tmp_path}/")
    write_checkpoint(f"{tmp_path}/", missing_bytes=1)
    with pytest.raises(ValueError, match="doesn't fit"):
        read_checkpoint(f"{tmp_path}/")
    (tmp_path / ".index").write_bytes(b"no table" * 10)
    with pytest.raises(ValueError, match="not a table"):
        read_checkpoint(f"{tmp_path}/")
