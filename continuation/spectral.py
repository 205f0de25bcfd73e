"""Spectra: the STFT, mid and side, levels in bands, and the decoder's head, an inverse STFT."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import FRAME_RATE_HZ, WINDOW_HOPS, typical_magnitude

COMPLEX_HZ = (600, 900)  # complex values have full weight up to the first, none from the second on
NOISE_GAIN = 2  # compensates the 6 dB that overlap-add of independent frames loses
STEADY_HZ = 350  # above it the local mean of complex values is subtracted
STEADY_FRAMES = 51  # half a second
BANDS = 24
STEP_FRAMES = 4  # frames per step of the levels, 40 ms
QUIETEST_POWER = 1e-3  # of a band, relative to the typical power: lower limit of the levels


def stft(x: Tensor, size: int, hop: int) -> Tensor:
    """Compute the spectra of x (..., samples) in Hann windows of `size` every `hop` samples, without padding, in
    fp32: complex (..., frames, bins)."""
    return torch.fft.rfft(x.float().unfold(-1, size, hop) * torch.hann_window(size, device=x.device))


def istft(spectrum: Tensor, hop: int) -> Tensor:
    """Invert `stft`, of windows of a whole number of hops, by overlap-add, divided by the sum of squared windows:
    complex (batch, channels, bins, frames) -> (batch, channels, (frames - 1) * hop + window)."""
    window = torch.hann_window(2 * (spectrum.shape[2] - 1), device=spectrum.device)
    pieces = torch.fft.irfft(spectrum.flatten(0, 1), dim=1).transpose(1, 2) * window
    envelope = overlap_add(window.square().expand(1, spectrum.shape[-1], -1), hop)
    return (overlap_add(pieces, hop) / envelope.clamp(min=1e-4)).unflatten(0, spectrum.shape[:2])


def overlap_add(pieces: Tensor, hop: int) -> Tensor:
    """Overlap-add (n, frames, size) -> (n, (frames - 1) * hop + size); size: a whole number of hops."""
    count, frames, size = pieces.shape
    hops = size // hop
    parts = pieces.unflatten(-1, (hops, hop)).unbind(2)
    total = sum(F.pad(part, (0, 0, i, hops - 1 - i)) for i, part in enumerate(parts))
    return total.reshape(count, (frames + hops - 1) * hop)


def mid_side(x: Tensor) -> Tensor:
    """Convert left and right (batch, 2, samples) to mid and side, half their sum and half their difference; other
    channel counts stay as they are."""
    if x.shape[1] != 2:
        return x
    left, right = x.unbind(1)
    return torch.stack([left + right, left - right], dim=1) / 2


def left_right(x: Tensor) -> Tensor:
    """Invert `mid_side`: mid and side (batch, 2, samples) to left and right."""
    if x.shape[1] != 2:
        return x
    mid, side = x.unbind(1)
    return torch.stack([mid + side, mid - side], dim=1)


class ISTFTHead(nn.Module):
    """Inverse STFT head: frames -> spectrum of mid and side -> audio (after Vocos, Siuzdak 2023).

    Frames are overlap-added in fp32 and divided by the true sum of squared windows, at the edges too. All bins have
    noise of a predicted magnitude; bins up to the last of COMPLEX_HZ have a predicted complex value too. The spectrum
    is of mid and side, since noise in left and right would always be wide.

    Where the latents do not carry phases, a convolutional network, the same at every frame, could only repeat one
    phase pattern: a hum at multiples of the frame rate, whatever the music. So from STEADY_HZ on the mean over half a
    second, which would be that hum, is subtracted from the complex values.
    """

    def __init__(self, width: int, channels: int, hop: int):
        super().__init__()
        size = WINDOW_HOPS * hop
        self.channels, self.hop, self.bins = channels, hop, size // 2 + 1
        full, zero = (hz * WINDOW_HOPS // FRAME_RATE_HZ for hz in COMPLEX_HZ)  # in bins
        self.complex_bins = min(zero, self.bins)
        self.steady = STEADY_HZ * WINDOW_HOPS // FRAME_RATE_HZ  # bins below STEADY_HZ
        self.left_padding = (WINDOW_HOPS - 1) * hop // 2  # samples of the first window before the audio begins
        weight = ((zero - torch.arange(self.complex_bins)[:, None]) / (zero - full)).clamp(max=1)
        scale = size / 4 * typical_magnitude(self.bins)
        self.register_buffer("complex_scale", scale[: self.complex_bins] * weight, persistent=False)
        self.register_buffer("scale", scale / NOISE_GAIN, persistent=False)
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.project = nn.Conv1d(width, channels * (2 * self.complex_bins + self.bins), 1)
        with torch.no_grad():  # quiet at first: a loud start costs the first hundred steps
            self.project.weight.mul_(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project frames (batch, width, frames) to the spectrum of mid and side, complex (batch, channels, bins,
        frames), and the magnitudes in the bins without complex values, relative to `scale`: (batch, channels, bins,
        frames)."""
        x = self.project(x).float().view(len(x), self.channels, -1, x.shape[-1])
        real, imaginary, log_magnitudes = x.split([self.complex_bins, self.complex_bins, self.bins], dim=2)
        values = torch.complex(*(self.subtract_local_mean(part) * self.complex_scale for part in (real, imaginary)))
        magnitudes = self.magnitude_activation(log_magnitudes)
        noise = NOISE_GAIN * self.noise(x.shape[-1], x.device) * (magnitudes * self.scale)
        return F.pad(values, (0, 0, 0, self.bins - self.complex_bins)) + noise, magnitudes[:, :, self.complex_bins :]

    def audio(self, spectrum: Tensor) -> Tensor:
        """Convert a spectrum of mid and side (batch, channels, bins, frames) to audio (batch, channels, frames *
        hop)."""
        frames = spectrum.shape[-1]
        return left_right(istft(spectrum, self.hop)[..., self.left_padding : self.left_padding + frames * self.hop])

    def spectrum(self, x: Tensor) -> Tensor:
        """Compute the spectrum of mid and side (batch, channels, bins, frames) of audio (batch, channels, frames *
        hop)."""
        x = F.pad(x.float(), (self.left_padding, (WINDOW_HOPS - 1) * self.hop - self.left_padding))
        return stft(mid_side(x), len(self.window), self.hop).transpose(2, 3)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Compute the magnitudes of mid and side of audio x (batch, channels, frames * hop), relative to `scale`, in
        the bins without complex values: (batch, channels, bins, frames)."""
        return (self.spectrum(x).abs() / self.scale)[:, :, self.complex_bins :]

    def subtract_local_mean(self, x: Tensor) -> Tensor:
        """Subtract the mean over STEADY_FRAMES in the bins from STEADY_HZ on; x: real or imaginary parts (batch,
        channels, complex_bins, frames)."""
        low, high = x[:, :, : self.steady], x[:, :, self.steady :]
        mean = F.avg_pool1d(high.flatten(1, 2), STEADY_FRAMES, 1, STEADY_FRAMES // 2, count_include_pad=False)
        return torch.cat([low, high - mean.view_as(high)], dim=2)

    @staticmethod
    def magnitude_activation(x: Tensor) -> Tensor:
        """Map outputs x of the network, of any shape, to magnitudes: small at first, 43 dB more for x + 1."""
        return (5 * x - 2).clamp(-9, 5).exp()

    def noise(self, frames: int, device) -> Tensor:
        """Draw complex normal noise, (channels, bins, frames), the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (frames, self.channels, self.bins)
        return torch.randn(shape, dtype=torch.complex64, generator=generator).permute(1, 2, 0).to(device)


def band_edges(bins: int) -> list[int]:
    """Return the first bin of each of at most BANDS bands, and the end of the last. The bands are single bins of
    25 Hz, then equally wide in log frequency."""
    single = BANDS // 3
    ratio = (bins / single) ** (1 / (BANDS - single))
    return sorted({*range(single), *(round(single * ratio**i) for i in range(BANDS - single + 1))})


def band_at(frequencies: Tensor, bins: int) -> Tensor:
    """Return the number of the band in which each of `frequencies` (n,), in Hz, lies: (n,)."""
    edges = torch.tensor(band_edges(bins)[1:-1], device=frequencies.device)
    return torch.bucketize((frequencies * WINDOW_HOPS / FRAME_RATE_HZ).round().long(), edges, right=True)


def pooling(bins: int) -> Tensor:
    """Make the matrix that averages the bins of each band: (bands, bins)."""
    places = torch.arange(bins)
    rows = torch.stack([(places >= low) & (places < high) for low, high in pairwise(band_edges(bins))]).float()
    return rows / rows.sum(1, keepdim=True)


def interpolation(bins: int) -> Tensor:
    """Make the matrix that interpolates linearly between the centres of the bands, and is constant beyond the
    outermost: (bins, bands)."""
    edges = torch.tensor(band_edges(bins), dtype=torch.float)
    return interpolate_between((edges[:-1] + edges[1:] - 1) / 2, torch.arange(bins))


def interpolate_between(nodes: Tensor, places: Tensor) -> Tensor:
    """Make the matrix that interpolates values at increasing `nodes` linearly at `places`, and is constant beyond the
    outermost: (places, nodes)."""
    way = ((places[:, None] - nodes[:-1]) / nodes.diff()).clamp(0, 1)  # from each node to the next
    return F.pad(way, (1, 0), value=1.0) * F.pad(1 - way, (0, 1), value=1.0)


class BandLevels(nn.Module):
    """Levels of a spectrum of mid and side in bands and steps of STEP_FRAMES frames, and the interpolation from bands
    to bins; without trained weights."""

    def __init__(self, bins: int):
        super().__init__()
        full_scale = (bins - 1) / 2  # magnitude of a sine, Hann window
        self.register_buffer("typical_power", (full_scale * typical_magnitude(bins)).square(), persistent=False)
        self.register_buffer("pool", pooling(bins), persistent=False)
        self.register_buffer("interpolate", interpolation(bins), persistent=False)

    def power(self, spectrum: Tensor) -> Tensor:
        """Compute the mean power relative to the typical one, (..., bins, frames) -> (..., bands, steps)."""
        power = (spectrum.real.square() + spectrum.imag.square()) / self.typical_power
        pooled = F.avg_pool1d(power.flatten(0, -3), STEP_FRAMES, ceil_mode=True).unflatten(0, power.shape[:-2])
        return self.pool @ pooled

    def forward(self, spectrum: Tensor) -> Tensor:
        """Compute the levels, log magnitudes in nepers: (..., channels, bins, frames) -> (..., channels * bands,
        steps)."""
        return (self.power(spectrum) + QUIETEST_POWER).log().flatten(-3, -2) / 2

    def to_bins(self, gains: Tensor) -> Tensor:
        """Interpolate gains (..., bands) linearly between the middles of the bands: (..., bins, 1)."""
        return self.interpolate @ gains[..., None]
