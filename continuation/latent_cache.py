"""The latent cache of stage 2 on disk: reads encoded windows, and checks that they are complete and up to date.

latent_encoding.py fills it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from continuation import files
from continuation.cli import UsageError, print_note


class LatentCache:
    """Encoded windows of all pairs (see ContinuationModel.encode_pair): an fp16 array (pairs, ...) per variant and
    part, PART-VARIANT.npy.

    key.json holds the key, a hash of encoder, dataset and seed, and the checksum of every array.
    """

    PARTS = ("context", "outlook", "target", "features", "correction")

    def __init__(self, folder, variants: int, shapes: dict[str, tuple[int, ...]], pairs: int):
        """shapes: of one window's arrays, by part; pairs: their number."""
        self.folder, self.variants, self.shapes, self.pairs = Path(folder), variants, shapes, pairs
        self.key, self.checksums = "", {}
        self._arrays = {}

    def path(self, part: str, variant: int) -> Path:
        """Return the path of the array of a part (of PARTS) and variant."""
        return self.folder / f"{part}-{variant}.npy"

    def array(self, part: str, variant: int) -> np.ndarray:
        """Open the array of a part and variant, fp16 (pairs, ...), memory-mapped. Raises UsageError."""
        if (part, variant) not in self._arrays:
            self._arrays[part, variant] = files.open_array(self.path(part, variant), np.float16, self.shapes[part])
        return self._arrays[part, variant]

    def read(self, variant: int, pair: int) -> dict[str, np.ndarray]:
        """Read the encoded window of a pair: part -> float32 array."""
        return {part: self.array(part, variant)[pair].astype(np.float32) for part in self.PARTS}

    def begin(self, key: str) -> None:
        """Open the cache of this key, and remove the latents of any other. Raises OSError."""
        self.key, self.checksums = key, self._checksums_of(key)
        self.clear(kept=self.checksums)
        self.folder.resolve().mkdir(exist_ok=True)  # the folder may be a link

    def _checksums_of(self, key: str) -> dict[str, str]:
        """Read the checksums by file name; empty where key.json is missing, damaged, of another key, or without
        checksums, as in earlier versions."""
        path = self.folder / "key.json"
        try:
            files.refuse_pipe(path)
            index = json.loads(path.read_text(encoding="utf-8"))
            return dict(index["sha256"]) if index["key"] == key else {}
        except (UsageError, OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}

    def clear(self, kept=()) -> None:
        """Remove all arrays but those named in `kept`. The folder stays: it may be a link."""
        for path in [path for part in self.PARTS for path in self.folder.glob(f"{part}-*")]:
            if path.name not in kept:
                path.unlink()

    def missing(self) -> list[int]:
        """Return the variants with a missing or changed file; changed files are printed."""
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
        """Compute the checksums of a variant just written, and return the new text of key.json."""
        for path in (self.path(part, variant) for part in self.PARTS):
            self.checksums[path.name] = files.array_sha256(files.open_array(path, np.float16))
        return json.dumps({"key": self.key, "sha256": self.checksums})

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean and standard deviation of the target latents by channel, float64 (latent_channels, 1) each."""
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
