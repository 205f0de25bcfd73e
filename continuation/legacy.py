"""The network that this project descends from, layer for layer: strided and transposed convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

LEGACY_HOP = 40  # samples per latent


class LegacyEncoder(nn.Module):
    """Audio (batch, channels, samples) -> latents (batch, 64, samples / LEGACY_HOP), and None for their variance."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv1d(channels, 128, 9, stride=2, padding=4)
        self.pool = nn.MaxPool1d(2)
        self.second = nn.Conv1d(128, 64, 7, stride=2, padding=3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Encode x, padded to whole latents."""
        x = F.pad(x, (0, -x.shape[-1] % LEGACY_HOP))
        latents = x.shape[-1] // LEGACY_HOP
        return F.adaptive_avg_pool1d(self.second(self.pool(self.first(x))), latents), None


class LegacyCore(nn.Module):
    """Latents of the input -> latents of the continuation, one transformer layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        """Predict from z (batch, 64, latents): the same shape."""
        return self.layer(z.transpose(1, 2)).transpose(1, 2)


class LegacyDecoder(nn.Sequential):
    """Latents -> audio, and None in place of magnitudes; other inputs of `Decoder` are ignored."""

    def __init__(self, channels: int):
        super().__init__(
            nn.ConvTranspose1d(64, 128, 7, stride=2, padding=3, output_padding=1),
            nn.ConvTranspose1d(128, 128, 2, stride=2),
            nn.ConvTranspose1d(128, 128, 3, stride=5, padding=1, output_padding=4),
            nn.ConvTranspose1d(128, channels, 9, stride=2, padding=4, output_padding=1),
        )

    def forward(self, z: Tensor, *_) -> tuple[Tensor, None]:
        """Decode z (batch, 64, latents) to audio (batch, channels, samples)."""
        return super().forward(z), None
