"""Kernel Audio Distance (KAD) between two sets of sounds, on embeddings of musicnn.

The embedding is the penultimate layer of MTT_musicnn, a small tagger of music trained on MagnaTagATune: 200 numbers
per patch of 3 s. Source: Pons and Serra, "musicnn: Pre-trained convolutional neural networks for music audio
tagging", 2019. Its weights are an optional extra, the PyPI package (ISC licence), which is only read here: neither
TensorFlow nor the code of the package is needed.

    pip install --no-deps musicnn==0.1.0

Shapes: patches (batch, frames, mels), feature maps (batch, channels, frames[, mels]), embeddings (patches, dims).
What is undefined (the distance to a single patch) is nan.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from continuation import files
from continuation.tf_checkpoint import read_checkpoint

PACKAGE = "musicnn"
MODEL = "MTT_musicnn"
CACHE_NAME = "audio-track-prediction"  # of this project's folder in the user's cache
SAMPLE_RATE = 16000
FFT_SIZE = 512
HOP = 256
MELS = 96
PATCH_FRAMES = 187  # 3 s
PATCHES_AT_ONCE = 8
BATCH_NORM_EPSILON = 1e-3  # the default of tf.layers
KAD_SCALE = 1000.0
BANDWIDTH_ROWS = 2000


# The weights


def find_weights() -> Path | None:
    """Return the folder of the MTT_musicnn checkpoint in the installed package, which is not imported; None without
    it."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / MODEL
    return folder if (folder / ".index").is_file() else None


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """Read the network's tensors by name from the checkpoint in `folder`, or from the user's cache, where they are
    stored at the first use.

    The cached file's name is a hash of the checkpoint's index, which contains the tensors' checksums. A damaged one
    is written again; where none can be written, nothing is cached.
    """
    index = (folder / ".index").read_bytes()
    path = cache_folder() / f"{MODEL}-{hashlib.sha256(index).hexdigest()[:16]}.npz"
    weights = _read_cache(path)
    if weights is None:
        tensors = read_checkpoint(f"{folder}/")
        weights = {name: tensors[name] for name in sorted(variable_names())}
        _write_cache(path, weights)
    return weights


def cache_folder() -> Path:
    """Return this project's folder in the user's cache: in XDG_CACHE_HOME, or else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores such a path
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, CACHE_NAME)


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """Read the cached tensors; None where any is missing."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights = dict(arrays)
    except Exception:  # numpy's readers raise nearly any exception for damaged bytes
        return None
    return weights if weights.keys() == variable_names() else None


def _write_cache(path: Path, weights: dict[str, np.ndarray]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            np.savez(file, **weights)


# The network: musicnn/models.py, build_musicnn in inference mode. Names are numbered in the order of creation.


def _name(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind


def variable_names() -> set[str]:
    """Return the names of the tensors that the network uses; the rest of the checkpoint is the layer of the tags, and
    the optimiser's."""
    names = {f"{_name('conv2d', i)}/{part}" for i in range(8) for part in ("kernel", "bias")}
    names |= {"dense/kernel", "dense/bias"}
    parts = ("beta", "gamma", "moving_mean", "moving_variance")
    return names | {f"{_name('batch_normalization', i)}/{part}" for i in range(11) for part in parts}


def _batch_norm(x: Tensor, weights: dict[str, Tensor], number: int) -> Tensor:
    """Normalise dimension 1 by the statistics of the training."""
    name = _name("batch_normalization", number)
    parts = [weights[f"{name}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")]
    return F.batch_norm(x, *parts, training=False, eps=BATCH_NORM_EPSILON)


def _front_end(x: Tensor, weights: dict[str, Tensor], number: int) -> Tensor:
    """Convolve over time and mels, and take the maximum over mels: (batch, 1, frames, mels) -> (batch, C, frames).

    Time is padded so that its length stays, with one zero more at the end for an even kernel; mels are not padded.
    """
    name = _name("conv2d", number)
    kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)  # (time, mels, 1, C) -> (C, 1, time, mels)
    before = (kernel.shape[2] - 1) // 2
    x = F.pad(x, (0, 0, before, kernel.shape[2] - 1 - before))
    x = F.conv2d(x, kernel, weights[f"{name}/bias"]).relu()
    return _batch_norm(x, weights, number + 1).amax(dim=3)


def _mid_end(x: Tensor, weights: dict[str, Tensor], number: int) -> Tensor:
    """Convolve over 7 frames and all channels: (batch, any, frames) -> (batch, C, frames)."""
    name = _name("conv2d", number)
    kernel = weights[f"{name}/kernel"].squeeze(2).permute(2, 1, 0)  # (time, any, 1, C) -> (C, any, time)
    x = F.conv1d(x, kernel, weights[f"{name}/bias"], padding=kernel.shape[2] // 2).relu()
    return _batch_norm(x, weights, number + 1)


def network(patches: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Map log-mel patches (batch, frames, mels) to the penultimate layer (batch, 200).

    weights: by their names in the checkpoint; they determine all sizes.
    """
    x = _batch_norm(patches[:, None], weights, 0)  # (batch, 1, frames, mels)
    front = torch.cat([_front_end(x, weights, i) for i in range(5)], dim=1)  # 2 timbral, 3 temporal
    first = _mid_end(front, weights, 5)
    second = _mid_end(first, weights, 6) + first
    third = _mid_end(second, weights, 7) + second
    x = torch.cat([front, first, second, third], dim=1)  # (batch, 753, frames)
    x = torch.stack([x.amax(dim=2), x.mean(dim=2)], dim=2).flatten(1)  # (batch, 1506), maximum and mean in turn
    x = _batch_norm(x, weights, 9) @ weights["dense/kernel"] + weights["dense/bias"]
    return _batch_norm(x.relu(), weights, 10)


# Embeddings of sounds


def log_mel_patches(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Make the input of the network: (channels, samples) -> float32 (patches, 187 frames, 96 mels), without overlap.

    The mean of the channels at 16 kHz, as log10(10000 mel + 1) of the mel power spectrum. An incomplete last patch is
    left out, so less than about 3 s have no patch. Source: musicnn/extractor.py, with two
    differences: it computes in float16, which overflows where mel > 6.5, and its frames reflect the signal at
    both ends only with librosa < 0.10, as in its training; so do these.
    """
    import librosa

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
    """Embedder of sounds by musicnn (MTT). Raises FileNotFoundError where the package is not installed.

    Embeddings depend on the bandwidth of a sound: compare only sounds that had the same sample rate.
    """

    def __init__(self):
        folder = find_weights()
        if folder is None:
            raise FileNotFoundError("musicnn is not installed: pip install --no-deps musicnn==0.1.0")
        self.weights = {name: torch.tensor(x) for name, x in load_weights(folder).items()}

    def __call__(self, x: np.ndarray, sample_rate: int) -> np.ndarray:
        """Embed (channels, samples) as float32 (patches, 200), one patch per 3 s."""
        patches = torch.from_numpy(log_mel_patches(x, sample_rate))
        embeddings = [torch.zeros(0, len(self.weights["dense/bias"]))]
        with torch.inference_mode():
            for batch in patches.split(PATCHES_AT_ONCE) if len(patches) else ():
                embeddings.append(network(batch, self.weights))
        return torch.cat(embeddings).numpy()


def mel_statistics(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Describe (channels, samples) without a network, by mean, standard deviation and mean change from frame to frame
    of the log-mel levels of every 3 s (`log_mel_patches`): float32 (patches, 288).

    It is a second embedding beside musicnn's, so that no system is tuned to one of them.
    """
    patches = log_mel_patches(x, sample_rate)
    change = np.abs(np.diff(patches, axis=1)).mean(axis=1)
    return np.concatenate([patches.mean(axis=1), patches.std(axis=1), change], axis=1)


# Distances of embeddings


def kernel_distance(references: Sequence[np.ndarray], estimates: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Compute the Kernel Audio Distance of two sets of embeddings, times 1000 (lower is closer), and its values
    without each song.

    references, estimates: an array of embeddings per song, (n, dims) and (m, dims), which may have no rows. Source:
    Chung et al., "KAD: No More FAD!", 2025. It is the unbiased squared maximum mean discrepancy

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
    """Compute the median distance of two rows of x; nan where it is 0 or x has fewer than two rows."""
    if len(x) > BANDWIDTH_ROWS:
        x = x[np.linspace(0, len(x) - 1, BANDWIDTH_ROWS).round().astype(int)]
    median = np.median(pdist(x)) if len(x) > 1 else 0.0
    return float(median) if median > 0 else float("nan")


def _kernel_sums(a: Sequence[np.ndarray], b: Sequence[np.ndarray], bandwidth: float) -> np.ndarray:
    """Sum k(x, y) over the rows x of each song of a and y of each song of b: (songs, songs). One song of a at a time
    is compared with all of b."""
    ends = np.cumsum([len(rows) for rows in b])[:-1]
    others = np.concatenate(b)
    sums = np.zeros((len(a), len(b)))
    for i, rows in enumerate(a):
        kernel = np.exp(-0.5 * np.square(cdist(rows, others) / bandwidth)).sum(axis=0)
        sums[i] = [part.sum() for part in np.split(kernel, ends)]
    return sums


def paired_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the cosine similarity, -1..1, of the mean embeddings of two sounds, (patches, dims) each; nan for a
    sound without patches."""
    if len(a) == 0 or len(b) == 0:
        return float("nan")
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(mean_a) * np.linalg.norm(mean_b)
    return float(mean_a @ mean_b / norms) if norms > 0 else float("nan")
