"""The latent cache of stage 2: windows are encoded once, and trainings of the core read their latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from continuation import files
from continuation.cli import UsageError, print_note


class LatentCache:
    """Encoded windows of all pairs, see ContinuationModel.encode_pair: fp16 (pairs, ...), one file for each variant
    and part.

    `key.json` names the encoder, dataset and seed of the latents, and holds the checksum of every file.
    """

    PARTS = ("context", "outlook", "target")

    def __init__(self, folder, variants: int, shapes: dict[str, tuple[int, ...]], pairs: int):
        """shapes: of one window, by part."""
        self.folder, self.variants, self.shapes, self.pairs = Path(folder), variants, shapes, pairs
        self.key, self.checksums = "", {}
        self._arrays = {}

    def path(self, part: str, variant: int) -> Path:
        return self.folder / f"{part}-{variant}.npy"

    def array(self, part: str, variant: int) -> np.ndarray:
        if (part, variant) not in self._arrays:
            self._arrays[part, variant] = files.open_array(self.path(part, variant), np.float16, self.shapes[part])
        return self._arrays[part, variant]

    def read(self, variant: int, pair: int) -> dict[str, np.ndarray]:
        """Read the parts of a pair, float32."""
        return {part: self.array(part, variant)[pair].astype(np.float32) for part in self.PARTS}

    def begin(self, key: str) -> None:
        """Open the cache of this encoder, dataset and seed, and remove all other latents. Raises OSError."""
        self.key, self.checksums = key, self._checksums_of(key)
        self.clear(kept=self.checksums)
        self.folder.resolve().mkdir(exist_ok=True)  # behind a link too

    def _checksums_of(self, key: str) -> dict[str, str]:
        """Read the checksums by file name; none where key.json is missing, damaged, of another key, or of a version
        without checksums."""
        path = self.folder / "key.json"
        try:
            files.refuse_pipe(path)
            index = json.loads(path.read_text(encoding="utf-8"))
            return dict(index["sha256"]) if index["key"] == key else {}
        except (UsageError, OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}

    def clear(self, kept=()) -> None:
        """Remove all files of latents but the `kept` names; the folder may be a link, and stays."""
        for path in [path for part in self.PARTS for path in self.folder.glob(f"{part}-*")]:
            if path.name not in kept:
                path.unlink()

    def missing(self) -> list[int]:
        """Return the variants that are incomplete or have changed since they were written; the latter are printed."""
        return [v for v in range(self.variants) if not all([self._is_whole(part, v) for part in self.PARTS])]

    def _is_whole(self, part: str, variant: int) -> bool:
        path = self.path(part, variant)
        if path.name not in self.checksums:
            return False
        try:
            rows = files.open_array(path, np.float16, self.shapes[part])
            is_whole = files.array_sha256(rows) == self.checksums[path.name]
        except (UsageError, OSError):
            is_whole = False
        if not is_whole:
            print_note(f"note: {path} is missing or damaged, it is made again")
        return is_whole

    def index(self, variant: int) -> str:
        """Return the text of key.json after this variant has been written, with its checksums."""
        for path in (self.path(part, variant) for part in self.PARTS):
            self.checksums[path.name] = files.array_sha256(files.open_array(path, np.float16))
        return json.dumps({"key": self.key, "sha256": self.checksums})

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the targets by channel, float64 (latent_channels, 1) each."""
        count, total, squares = 0, 0.0, 0.0
        for variant in range(self.variants):
            for rows in np.array_split(self.array("target", variant), -(-self.pairs // 256)):
                rows = rows.astype(np.float64)
                count += rows.shape[0] * rows.shape[2]
                total = total + rows.sum((0, 2))
                squares = squares + np.square(rows).sum((0, 2))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-10))
        return mean[:, None], std[:, None]
