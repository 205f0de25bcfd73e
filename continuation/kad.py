"""A measure of what a set of sounds is like: the Kernel Audio Distance (KAD) on embeddings of musicnn.

The embedding is the penultimate layer of MTT_musicnn, a small tagger of music trained on MagnaTagATune: 200 numbers
per patch of 3 s. Source: Pons and Serra, "musicnn: Pre-trained convolutional neural networks for music audio
tagging", 2019. Its weights are an optional extra, the PyPI package (ISC licence), which is only read here: neither
TensorFlow nor the code of the package is needed.

    pip install --no-deps musicnn==0.1.0

Shapes: patches (batch, frames, mels), feature maps (batch, channels, frames[, mels]), embeddings (patches, dims).
What is undefined (the distance to a single patch) is nan.
"""

import struct
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PACKAGE = "musicnn"
MODEL = "MTT_musicnn"
SAMPLE_RATE = 16000
FFT_SIZE = 512
HOP = 256
MELS = 96
PATCH_FRAMES = 187  # 3 s
PATCHES_AT_ONCE = 8
BATCH_NORM_EPSILON = 1e-3  # the default of tf.layers
DIMENSIONS = 200  # of an embedding
KAD_SCALE = 1000.0
BANDWIDTH_ROWS = 2000

TABLE_MAGIC = 0xDB4775248B80FB57
TABLE_FOOTER_BYTES = 48
TENSOR_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64}  # DataType of types.proto


# The checkpoint of TensorFlow (V2 format): an index of protocol buffers in a table of leveldb, and raw tensors


def find_weights() -> Path | None:
    """Folder of the MTT_musicnn checkpoint in the installed package, which is not imported; None without it."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / MODEL
    return folder if (folder / ".index").is_file() else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it) of a little-endian number of 7 bits per byte."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer message; texts and inner messages are bytes."""
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
    """(key, value) of each entry of a block; a key is stored as what it doesn't share with the one before it.

    Behind the entries lie the offsets of those with a whole key and their count (uint32), behind the block one
    byte for its compression and a checksum, which is not verified.
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
    """Every key and value of a table of leveldb. Source: leveldb, doc/table_format.md."""
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
    """The tensor that a BundleEntryProto describes. Source: tensorflow, core/protobuf/tensor_bundle.proto."""
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
    """Every tensor of a TensorFlow checkpoint by its name; those of the optimiser are among them.

    The files are `prefix`.index and `prefix`.data-00000-of-00001. Raises ValueError for what is not supported:
    compressed tables, several data files, tensors that are not numbers.
    """
    data = Path(f"{prefix}.data-00000-of-00001").read_bytes()
    entries = read_table(Path(f"{prefix}.index").read_bytes())
    return {key.decode(): _read_tensor(entry, data) for key, entry in entries.items() if key}  # "" is the header


# The network: musicnn/models.py, build_musicnn in inference mode. Names are numbered in the order of creation.


def _name(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind


def variable_names() -> set[str]:
    """The tensors that the network uses; the rest of the checkpoint is the layer of the tags, and the optimiser's."""
    names = {f"{_name('conv2d', i)}/{part}" for i in range(8) for part in ("kernel", "bias")}
    names |= {"dense/kernel", "dense/bias"}
    parts = ("beta", "gamma", "moving_mean", "moving_variance")
    return names | {f"{_name('batch_normalization', i)}/{part}" for i in range(11) for part in parts}


def _batch_norm(x, weights: dict, number: int):
    """Normalise dimension 1 by the statistics of the training."""
    from torch.nn import functional

    name = _name("batch_normalization", number)
    parts = [weights[f"{name}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")]
    return functional.batch_norm(x, *parts, training=False, eps=BATCH_NORM_EPSILON)


def _front_end(x, weights: dict, number: int):
    """Convolution over time and mels, then the largest over mels: (batch, 1, frames, mels) -> (batch, C, frames).

    Time is padded such that its length remains, with one zero more at the end where the kernel is even; mels are
    not padded, a kernel of one mel doesn't need it.
    """
    from torch.nn import functional

    name = _name("conv2d", number)
    kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)  # (time, mels, 1, C) -> (C, 1, time, mels)
    before = (kernel.shape[2] - 1) // 2
    x = functional.pad(x, (0, 0, before, kernel.shape[2] - 1 - before))
    x = functional.conv2d(x, kernel, weights[f"{name}/bias"]).relu()
    return _batch_norm(x, weights, number + 1).amax(dim=3)


def _mid_end(x, weights: dict, number: int):
    """Convolution over 7 frames and all channels: (batch, any, frames) -> (batch, C, frames)."""
    from torch.nn import functional

    name = _name("conv2d", number)
    kernel = weights[f"{name}/kernel"].squeeze(2).permute(2, 1, 0)  # (time, any, 1, C) -> (C, any, time)
    x = functional.conv1d(x, kernel, weights[f"{name}/bias"], padding=kernel.shape[2] // 2).relu()
    return _batch_norm(x, weights, number + 1)


def network(patches, weights: dict):
    """Log-mel patches (batch, frames, mels) -> penultimate layer (batch, 200).

    Tensors in and out; `weights` by their names in the checkpoint, which give all sizes.
    """
    import torch

    x = _batch_norm(patches[:, None], weights, 0)  # (batch, 1, frames, mels)
    front = torch.cat([_front_end(x, weights, i) for i in range(5)], dim=1)  # 2 timbral, 3 temporal
    first = _mid_end(front, weights, 5)
    second = _mid_end(first, weights, 6) + first
    third = _mid_end(second, weights, 7) + second
    x = torch.cat([front, first, second, third], dim=1)  # (batch, 753, frames)
    x = torch.stack([x.amax(dim=2), x.mean(dim=2)], dim=2).flatten(1)  # (batch, 1506), largest and mean in turn
    x = _batch_norm(x, weights, 9) @ weights["dense/kernel"] + weights["dense/bias"]
    return _batch_norm(x.relu(), weights, 10)


# Embeddings of sounds


def log_mel_patches(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """The input of the network: (channels, samples) -> float32 (patches, 187 frames, 96 mels), without overlap.

    The mean of the channels at 16 kHz, as log10(10000 mel + 1) of the mel power spectrum. The rest behind the last
    whole patch is left out, so less than about 3 s have no patch. Source: musicnn/extractor.py, with two
    differences: it computes in float16, which overflows where mel > 6.5, and its frames reflect the signal at
    both ends only with librosa < 0.10, as in its training; so do these.
    """
    import librosa
    import soxr

    if x.ndim != 2:
        raise ValueError(f"expected a (channels, samples) array, got {x.shape}")
    mono = soxr.resample(x.mean(axis=0, dtype=np.float32), sample_rate, SAMPLE_RATE, quality="HQ")
    count = (1 + len(mono) // HOP) // PATCH_FRAMES
    if count == 0:
        return np.zeros((0, PATCH_FRAMES, MELS), dtype=np.float32)
    mel = librosa.feature.melspectrogram(
        y=mono, sr=SAMPLE_RATE, n_fft=FFT_SIZE, hop_length=HOP, n_mels=MELS, pad_mode="reflect"
    )  # (mels, frames)
    frames = np.log10(10000 * mel.T[: count * PATCH_FRAMES] + 1)
    return frames.reshape(count, PATCH_FRAMES, MELS).astype(np.float32)


class Embedder:
    """musicnn (MTT) as a function of sounds. Raises FileNotFoundError where the package is not installed.

    Embeddings depend on the bandwidth of a sound: compare only sounds that had the same sample rate.
    """

    def __init__(self):
        import torch

        folder = find_weights()
        if folder is None:
            raise FileNotFoundError("musicnn is not installed: pip install --no-deps musicnn==0.1.0")
        tensors = read_checkpoint(f"{folder}/")
        self.weights = {name: torch.from_numpy(tensors[name].copy()) for name in variable_names()}

    def __call__(self, x: np.ndarray, sample_rate: int) -> np.ndarray:
        """(channels, samples) -> float32 (patches, 200), one patch per 3 s."""
        import torch

        patches = torch.from_numpy(log_mel_patches(x, sample_rate))
        embeddings = [torch.zeros(0, len(self.weights["dense/bias"]))]
        with torch.inference_mode():
            for batch in patches.split(PATCHES_AT_ONCE) if len(patches) else ():
                embeddings.append(network(batch, self.weights))
        return torch.cat(embeddings).numpy()


def mel_statistics(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Describe (channels, samples) without a network: of the logarithmic mel levels of every 3 s (`log_mel_patches`)
    the mean, the standard deviation and the mean change from frame to frame, float32 (patches, 288).

    A second opinion beside musicnn's embedding, so that no system is tuned to one of them.
    """
    patches = log_mel_patches(x, sample_rate)
    change = np.abs(np.diff(patches, axis=1)).mean(axis=1)
    return np.concatenate([patches.mean(axis=1), patches.std(axis=1), change], axis=1)


# Distances of embeddings


def kernel_distance(references: Sequence[np.ndarray], estimates: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Kernel Audio Distance of two sets of embeddings, times 1000 (lower is closer), and that without each song.

    One array of embeddings a song, (n, dims) and (m, dims), which may have no rows. Source: Chung et al., "KAD: No
    More FAD!", 2025. The unbiased squared maximum mean discrepancy

        mean of k(r, r') + mean of k(e, e') - 2 mean of k(r, e),    k(a, b) = exp(-|a - b|^2 / (2 s^2)),

    where r != r' and e != e', and s is the median distance of two reference embeddings (of BANDWIDTH_ROWS evenly
    spread ones where there are more). Its expectation is 0 for sets of one distribution, so single values may be
    negative. nan for fewer than two rows in either set, and where at least half of the references are equal (s = 0).
    """
    bandwidth = _median_distance(np.concatenate(references))
    within_r, within_e = (_kernel_sums(x, x, bandwidth) for x in (references, estimates))
    between = _kernel_sums(references, estimates, bandwidth)
    rows_r, rows_e = (np.array([len(x) for x in sets]) for sets in (references, estimates))
    for within, rows in ((within_r, rows_r), (within_e, rows_e)):
        within[np.diag_indices_from(within)] -= rows  # k(r, r) = 1
    songs = np.arange(len(references))
    kept = np.concatenate([np.ones((1, len(songs))), songs != songs[:, None]])  # all songs, then all but each

    def mean_kernel(sums: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        total = ((kept @ sums) * kept).sum(axis=1)
        return np.divide(total, pairs, out=np.full(len(kept), np.nan), where=pairs > 0)

    n, m = kept @ rows_r, kept @ rows_e
    same = mean_kernel(within_r, n * (n - 1)) + mean_kernel(within_e, m * (m - 1))
    distances = KAD_SCALE * (same - 2 * mean_kernel(between, n * m))
    return float(distances[0]), distances[1:]


def _median_distance(x: np.ndarray) -> float:
    """nan where it is 0 or there are no two rows."""
    from scipy.spatial.distance import pdist

    if len(x) > BANDWIDTH_ROWS:
        x = x[np.linspace(0, len(x) - 1, BANDWIDTH_ROWS).round().astype(int)]
    median = np.median(pdist(x)) if len(x) > 1 else 0.0
    return float(median) if median > 0 else float("nan")


def _kernel_sums(a: Sequence[np.ndarray], b: Sequence[np.ndarray], bandwidth: float) -> np.ndarray:
    """Sum of k(x, y) over the rows x of each song of a and y of each song of b: (songs, songs). One song's rows at a
    time stand against all of b."""
    from scipy.spatial.distance import cdist

    ends = np.cumsum([len(rows) for rows in b])[:-1]
    others = np.concatenate(b)
    sums = np.zeros((len(a), len(b)))
    for i, rows in enumerate(a):
        kernel = np.exp(-0.5 * np.square(cdist(rows, others) / bandwidth)).sum(axis=0)
        sums[i] = [part.sum() for part in np.split(kernel, ends)]
    return sums


def paired_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the mean embeddings of two sounds, (patches, dims) each, in -1..1; nan for a sound without patch."""
    if len(a) == 0 or len(b) == 0:
        return float("nan")
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(mean_a) * np.linalg.norm(mean_b)
    return float(mean_a @ mean_b / norms) if norms > 0 else float("nan")
