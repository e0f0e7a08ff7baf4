"""Pictures as PNG files with what Python brings: grids of samples, and clouds of points in the plane."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
_GAP = 6  # pixels between panels


def write(path: Path, image: Grey) -> None:
    """Writes a grey picture [height, width]; a kill leaves no half file."""
    height, width = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], 1).tobytes()  # each row begins with its filter, 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )
    unfinished.replace(path)


def panel(samples: NDArray[Any], side: int = 360) -> Grey:
    """In at most `side` pixels: images [N, 1, H, W] in -1 to 1 as a grid, points [N, 2] as a cloud."""
    if samples.ndim == 4:
        return _grid(samples[:, 0], side)
    return _cloud(samples, side)


def _grid(images: NDArray[Any], side: int) -> Grey:
    """The first of the images that fill a square, 1 pixel apart, each enlarged by a whole factor."""
    across = max(1, min(10, int(len(images) ** 0.5)))
    factor = max(1, side // (across * (images.shape[1] + 1)))
    grey = ((np.clip(images[: across**2], -1, 1) + 1) * 127.5).round().astype(np.uint8)
    tiles = np.pad(grey.repeat(factor, 1).repeat(factor, 2), ((0, 0), (0, factor), (0, factor)), constant_values=64)
    height, width = tiles.shape[1:]
    return tiles.reshape(across, across, height, width).swapaxes(1, 2).reshape(across * height, across * width)


def _cloud(points: NDArray[Any], side: int) -> Grey:
    """Counts in a field of [-3, 3]^2, y upwards, brightness by the root of the share of the largest count."""
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=side // 2, range=[[-3, 3], [-3, 3]])
    grey = (255 * np.sqrt(counts / max(1.0, counts.max()))).round().astype(np.uint8)
    return grey.repeat(2, 0).repeat(2, 1)


def side_by_side(panels: Sequence[Grey]) -> Grey:
    """Panels of one height from left to right, with a bright gap."""
    gap = np.full((len(panels[0]), _GAP), 255, np.uint8)
    parts = [part for one in panels for part in (one, gap)]
    return np.concatenate(parts[:-1], 1)
