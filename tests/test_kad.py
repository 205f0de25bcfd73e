"""The network on tiny weights of our own; distances whose value is known; real tags; the cache of the weights."""

import math

import numpy as np
import pytest
import torch

from continuation import kad
from continuation.tf_checkpoint import read_checkpoint

RATE = 16000
MUSICNN = kad.find_weights()
needs_musicnn = pytest.mark.skipif(MUSICNN is None, reason="musicnn is not installed")


# The weights


def test_without_the_package_there_are_no_weights_and_the_embedder_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kad, "PACKAGE", "no_such_package")
    assert kad.find_weights() is None
    with pytest.raises(FileNotFoundError, match="pip install --no-deps musicnn"):
        kad.Embedder()


# The network, against models.py written down in numpy


def small_weights(seed: int = 0, mels: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernels = [(7, 4, 1, 5), (7, 7, 1, 5), (8, 1, 1, 3), (6, 1, 1, 3), (4, 1, 1, 3)]  # front-end, 19 channels
    kernels += [(7, 19, 1, 4), (7, 4, 1, 4), (7, 4, 1, 4)]  # mid-end: 31 channels in all
    assert mels >= kernels[1][1]
    shapes = {kad._name("conv2d", i): shape for i, shape in enumerate(kernels)}
    shapes |= {"dense": (62, 6)}
    weights = {f"{name}/kernel": rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    weights |= {f"{name}/bias": rng.normal(0, 0.3, shape[-1]) for name, shape in shapes.items()}
    for i, size in enumerate([1, *(shape[-1] for shape in kernels), 62, 6]):
        for part in ("beta", "gamma", "moving_mean"):
            weights[f"{kad._name('batch_normalization', i)}/{part}"] = rng.normal(0, 1, size)
        weights[f"{kad._name('batch_normalization', i)}/moving_variance"] = rng.uniform(0.01, 2, size)
    return weights


def network_in_numpy(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Channels last, as in TensorFlow; x is (frames, mels)."""

    def norm(x, number):
        mean, variance, gamma, beta = (
            weights[f"{kad._name('batch_normalization', number)}/{part}"]
            for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def conv(x, number):  # (frames, height, in) -> (frames, height - kernel + 1, C)
        kernel = weights[f"{kad._name('conv2d', number)}/kernel"]
        before, after = (kernel.shape[0] - 1) // 2, kernel.shape[0] // 2
        x = np.pad(x, ((before, after), (0, 0), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(0, 1))
        y = np.einsum("fhctm,tmco->fho", windows, kernel) + weights[f"{kad._name('conv2d', number)}/bias"]
        return norm(np.maximum(y, 0), number + 1)

    x = norm(x[:, :, None], 0)
    front = np.concatenate([conv(x, i).max(axis=1) for i in range(5)], axis=1)
    first = conv(front[:, :, None], 5)[:, 0]
    second = first + conv(first[:, :, None], 6)[:, 0]
    third = second + conv(second[:, :, None], 7)[:, 0]
    x = np.concatenate([front, first, second, third], axis=1)
    x = np.stack([x.max(axis=0), x.mean(axis=0)], axis=1).reshape(-1)
    x = norm(x, 9) @ weights["dense/kernel"] + weights["dense/bias"]
    return norm(np.maximum(x, 0), 10)


def test_the_network_equals_its_definition_in_numpy():
    weights = small_weights()
    assert set(weights) == kad.variable_names()
    patches = np.random.default_rng(1).normal(1, 1, (2, 20, 10))
    outputs = kad.network(torch.from_numpy(patches), {k: torch.from_numpy(v) for k, v in weights.items()})
    for output, patch in zip(outputs, patches, strict=True):
        np.testing.assert_allclose(output.numpy(), network_in_numpy(patch, weights), rtol=1e-9, atol=1e-9)


# The cache of the weights


@pytest.fixture
def checkpoint_reads(tmp_path, monkeypatch) -> list[str]:
    """What was read of a checkpoint of small weights, in a home of its own."""
    reads = []

    def read(prefix: str) -> dict[str, np.ndarray]:
        reads.append(prefix)
        return small_weights() | {"beta1_power": np.zeros(())}

    (tmp_path / ".index").write_bytes(b"an index")
    monkeypatch.setattr(kad, "read_checkpoint", read)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return reads


def assert_small_weights(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == kad.variable_names()
    for name, x in small_weights().items():
        np.testing.assert_array_equal(found[name], x)


def test_weights_are_read_once_and_then_from_the_cache(tmp_path, checkpoint_reads):
    for _ in range(2):
        assert_small_weights(kad.load_weights(tmp_path))
    assert len(checkpoint_reads) == 1
    (tmp_path / ".index").write_bytes(b"another index")
    kad.load_weights(tmp_path)
    assert len(checkpoint_reads) == 2


def pickled(path) -> None:
    with open(path, "wb") as file:
        np.savez(file, **{name: np.array([x, None], dtype=object) for name, x in small_weights().items()})


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other bytes": lambda path: path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes())),
    "one bit": lambda path: path.write_bytes(path.read_bytes().replace(b"\x3f", b"\x3e", 1)),
    "incomplete": lambda path: np.savez(path, x=np.zeros(1)),
    "pickled": pickled,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_made_again(tmp_path, checkpoint_reads, damage):
    kad.load_weights(tmp_path)
    (path,) = kad.cache_folder().iterdir()
    whole = path.read_bytes()
    damage(path)
    assert_small_weights(kad.load_weights(tmp_path))
    assert len(checkpoint_reads) == 2
    assert path.read_bytes() == whole


def test_weights_are_read_where_nothing_can_be_cached(tmp_path, checkpoint_reads):
    (tmp_path / "cache").touch()
    assert_small_weights(kad.load_weights(tmp_path))


def test_cache_is_in_the_home_where_its_variable_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert kad.cache_folder().parent == tmp_path / ".cache"


# The input


def tone(frequency: float, seconds: float, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave, wave]).astype(np.float32)


@pytest.mark.parametrize(("seconds", "patches"), [(0.0, 0), (2.9, 0), (3.0, 1), (5.9, 1), (6.0, 2), (10.0, 3)])
def test_there_is_one_patch_per_three_seconds(seconds, patches):
    assert kad.log_mel_patches(tone(440, seconds), RATE).shape == (patches, 187, 96)


def test_log_mel_of_silence_is_zero_and_a_loud_tone_peaks_in_its_band():
    import librosa

    assert not kad.log_mel_patches(np.zeros((2, 4 * RATE), np.float32), RATE).any()
    patch = kad.log_mel_patches(tone(1000, 4, level=1.0), RATE)[0]
    centres = librosa.mel_frequencies(n_mels=98, fmax=RATE / 2)[1:-1]
    assert np.abs(centres[patch[90].argmax()] - 1000) < 40
    assert patch[90].max() > math.log10(65504)  # more than float16 holds before the logarithm


def test_log_mel_hardly_depends_on_the_sample_rate_nor_on_the_number_of_channels():
    patch = kad.log_mel_patches(tone(440, 4), RATE)
    np.testing.assert_array_equal(kad.log_mel_patches(tone(440, 4)[:1], RATE), patch)
    other = kad.log_mel_patches(tone(440, 4, rate=44100), 44100)
    loud = patch[:, 5:-5] > 1
    assert np.abs(other - patch)[:, 5:-5][loud].max() < 0.02


# Distances


def gaussian(seed: int, rows: int = 300, dims: int = 8, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dims)).astype(np.float32) + np.float32(shift)


def distance(reference: np.ndarray, estimate: np.ndarray) -> float:
    return kad.kernel_distance([reference], [estimate])[0]


def test_kernel_distance_of_two_points_each_is_what_paper_and_pencil_give():
    reference, estimate = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    # s = 1; k(r, r') = e^-1/2, k(e, e') = e^-2, and |r - e| = 0, 2, 1, 1
    expected = math.exp(-0.5) + math.exp(-2) - 2 * (1 + math.exp(-2) + 2 * math.exp(-0.5)) / 4
    assert distance(reference, estimate) == pytest.approx(1000 * expected)
    # s = 2 from the other side, so the distance is not symmetric
    expected = math.exp(-1 / 8) + math.exp(-1 / 2) - 2 * (1 + math.exp(-1 / 2) + 2 * math.exp(-1 / 8)) / 4
    assert distance(estimate, reference) == pytest.approx(1000 * expected)


def test_kernel_distance_within_one_distribution_is_zero_on_average():
    distances = [distance(x[:100], x[100:]) for x in map(gaussian, range(40))]
    assert min(distances) < 0 < max(distances)
    assert abs(np.mean(distances)) < 3 * np.std(distances) / math.sqrt(len(distances))


def test_kernel_distance_grows_with_the_shift_up_to_that_of_sets_apart():
    reference = gaussian(0)
    distances = [distance(reference, gaussian(1, shift=shift)) for shift in (0, 0.3, 0.6, 1.2, 50)]
    assert abs(distances[0]) < 5 < distances[1] < distances[2] < distances[3] < distances[4]
    apart = distances[4] / 1000  # nothing between the sets: what remains is the kernel within each of them
    assert apart == pytest.approx(2 * math.exp(-0.5), rel=0.1)


def test_kernel_distance_depends_neither_on_the_order_nor_on_the_scale():
    reference, estimate = gaussian(0), gaussian(1, rows=200, shift=0.5)
    shuffled = np.random.default_rng(2).permutation(reference), estimate[::-1]
    assert distance(*shuffled) == pytest.approx(distance(reference, estimate))
    assert distance(8 * reference, 8 * estimate) == pytest.approx(distance(reference, estimate))


def test_kernel_distance_without_a_song_is_that_of_the_other_songs():
    references = [gaussian(seed, rows=4 + seed) for seed in range(4)]
    estimates = [gaussian(10 + seed, rows=3 * (seed != 2), shift=0.5) for seed in range(4)]  # one song has none
    whole, without = kad.kernel_distance(references, estimates)
    assert whole == pytest.approx(distance(np.concatenate(references), np.concatenate(estimates)))
    assert len(without) == 4
    # The bandwidth stays that of all songs, so the others alone are near and not equal.
    for song in range(4):
        others = [np.concatenate([x for i, x in enumerate(sets) if i != song]) for sets in (references, estimates)]
        assert without[song] == pytest.approx(distance(*others), rel=0.1)
        assert without[song] != pytest.approx(whole)


def test_bandwidth_of_many_rows_is_that_of_some_of_them(monkeypatch):
    reference, estimate = gaussian(0), gaussian(1, shift=0.5)
    of_all = distance(reference, estimate)
    monkeypatch.setattr(kad, "BANDWIDTH_ROWS", 50)
    assert distance(reference, estimate) == pytest.approx(of_all, rel=0.1)


def test_kernel_distance_is_undefined_for_single_rows_and_for_equal_references():
    several = gaussian(0, rows=5)
    assert math.isnan(distance(several, several[:1]))
    assert math.isnan(distance(several[:1], several))
    assert math.isnan(distance(np.ones((4, 8)), several))


def test_paired_similarity_is_the_cosine_of_the_means():
    a = np.array([[2.0, 1.0], [2.0, -1.0]])  # its mean is (2, 0)
    assert kad.paired_similarity(a, a[::-1]) == pytest.approx(1)
    assert kad.paired_similarity(a, np.array([[3.0, 3.0]])) == pytest.approx(math.sqrt(0.5))
    assert kad.paired_similarity(a, -7 * a) == pytest.approx(-1)
    assert math.isnan(kad.paired_similarity(a, a[:0]))
    assert math.isnan(kad.paired_similarity(a, 0 * a))


# Without a network


def test_mel_statistics_are_mean_deviation_and_change_of_every_patch():
    steady, pulsing = tone(1000, 7), tone(1000, 7) * (np.arange(7 * RATE) % RATE < RATE // 2)
    found = [kad.mel_statistics(x.astype(np.float32), RATE) for x in (steady, pulsing)]
    assert all(x.shape == (2, 3 * kad.MELS) and x.dtype == np.float32 for x in found)
    band = found[0][0, : kad.MELS].argmax()
    (level, deviation, change), (less, more_deviation, more_change) = (
        x[1].reshape(3, kad.MELS)[:, band] for x in found
    )
    assert level == pytest.approx(2 * less, rel=0.1)
    assert deviation < 0.01 < 0.5 < more_deviation
    assert change < 0.01 < more_change


def test_patches_of_mel_statistics_do_not_hear_each_other():
    x = np.concatenate([tone(1000, 7), tone(300, 7)], axis=1)
    np.testing.assert_allclose(kad.mel_statistics(x, RATE)[:1], kad.mel_statistics(x[:, : 4 * RATE], RATE), atol=1e-4)
    assert kad.mel_statistics(x[:, : 2 * RATE], RATE).shape == (0, 3 * kad.MELS)


def test_kernel_distance_by_mel_statistics_is_small_within_one_kind_of_sound_and_large_between_two():
    def sounds(kind, seeds) -> list[np.ndarray]:
        return [kad.mel_statistics(kind(seed), RATE) for seed in seeds]

    def noisy(seed: int) -> np.ndarray:
        return 0.1 * np.random.default_rng(seed).standard_normal((1, 7 * RATE)).astype(np.float32)

    def tonal(seed: int) -> np.ndarray:
        return tone(200 + 40 * seed, 7)

    within = kad.kernel_distance(sounds(tonal, range(0, 8, 2)), sounds(tonal, range(1, 8, 2)))[0]
    between = kad.kernel_distance(sounds(tonal, range(4)), sounds(noisy, range(4)))[0]
    assert between > 10 * abs(within)


# The real weights


def piano(seconds: float = 9.0) -> np.ndarray:
    """An arpeggio of decaying notes with six partials each."""
    time = np.arange(RATE // 2) / RATE
    pitches = [261.6 * 2 ** (step / 12) for step in (0, 4, 7, 12, 7, 4, 0, 5, 9, 12, 9, 5)]
    notes = [
        sum(np.exp(-time * (3 + k)) * np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 7))
        for pitch in pitches
    ]
    return 0.2 * np.resize(np.concatenate(notes), (1, round(seconds * RATE))).astype(np.float32)


@needs_musicnn
def test_what_the_network_leaves_in_the_checkpoint_is_the_layer_of_the_tags_and_the_optimiser():
    tensors = read_checkpoint(f"{MUSICNN}/")
    unused = set(tensors) - kad.variable_names()
    assert kad.variable_names() <= set(tensors)
    rest = {"dense_1/kernel", "dense_1/bias", "beta1_power", "beta2_power"}
    assert {name for name in unused if "/Adam" not in name} == rest
    assert all(np.isfinite(x).all() for x in tensors.values())


@needs_musicnn
def test_an_arpeggio_is_tagged_as_piano():
    from musicnn.configuration import MTT_LABELS

    tensors = read_checkpoint(f"{MUSICNN}/")
    logits = kad.Embedder()(piano(), RATE) @ tensors["dense_1/kernel"] + tensors["dense_1/bias"]
    tags = (1 / (1 + np.exp(-logits))).mean(axis=0)
    assert MTT_LABELS[tags.argmax()] == "piano"
    assert tags.max() > 0.4


@needs_musicnn
def test_embeddings_are_deterministic_and_patches_independent():
    embed = kad.Embedder()
    x = np.concatenate([piano(), tone(440, 21)[:1]], axis=1)
    embeddings = embed(x, RATE)  # more patches than one batch holds
    assert embeddings.shape == (10, 200) and embeddings.dtype == np.float32
    np.testing.assert_array_equal(embed(x, RATE), embeddings)
    np.testing.assert_allclose(embed(x[:, : 4 * RATE], RATE), embeddings[:1], atol=1e-4)
    assert embed(x[:, : 2 * RATE], RATE).shape == (0, 200)


@needs_musicnn
def test_piano_is_closer_to_piano_than_to_noise():
    embed = kad.Embedder()
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 9 * RATE)).astype(np.float32)
    near = kad.paired_similarity(embed(piano(), RATE), embed(0.5 * piano(), RATE))
    assert near > 0.8 > 0.5 > kad.paired_similarity(embed(piano(), RATE), embed(noise, RATE))
