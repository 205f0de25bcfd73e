"""Draw docs/scaling.png from the rows of stage 2 at several sizes and minutes, and extrapolate to an hour of a GPU.

python scripts/plot_scaling.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import plots

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURE = DOCS / "scaling.png"
GPU_IN_CORES = 80  # base's stage 1 on an H200 (74 ms for 240 GFLOPs) over the 40 GFLOP/s of one core here


def main() -> None:
    rows = {path.stem: json.loads(path.read_text()) for path in (DOCS / "runs").glob("*.json")}
    sizes = sorted((row["core_parameters"], last_loss(row)) for name, row in rows.items() if name.startswith("size-"))
    minutes = sorted((minutes_of_steps(row), last_loss(row)) for name, row in rows.items() if is_timed(name))
    law, gpu_hour = power_law(minutes), 60.0 * GPU_IN_CORES
    plots.plot_scaling(PICTURE, sizes, minutes, law, gpu_hour)
    print(f"extrapolated from {minutes[-1][0]:.0f} to {gpu_hour:.0f} minutes: {law(gpu_hour):.3f}")


def power_law(points: list[tuple[float, float]]):
    """The straight line through the logarithms: it knows no floor, which every loss has."""
    line = np.polynomial.Polynomial.fit(*np.log(points).T, 1)
    return lambda x: np.exp(line(np.log(x)))


def is_timed(name: str) -> bool:
    return name.startswith("minutes-") or name == "headless-90-minutes-flow-training"


def minutes_of_steps(row: dict) -> float:
    """Of stage 2, without the time in which its latents are cached."""
    seconds = [record["seconds"] for record in row["records"] if record["stage"] == 2]
    return (seconds[-1] - seconds[0]) / 60


def last_loss(row: dict) -> float:
    return row["records"][-1]["val_loss"]


if __name__ == "__main__":
    main()
