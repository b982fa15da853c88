"""Example images: one drawn object per color and shape, as PNG files named by their content."""

from __future__ import annotations

import random
from pathlib import Path

from unime_st.data.scenes.draw import draw_scene
from unime_st.data.scenes.world import COLORS, SHAPES, Scene, Thing


def write_example_images(folder: str | Path) -> list[Path]:
    """Draw 36 images, six colors of six shapes, for examples that need files.

    Args:
        folder: Folder to write to; made if necessary. Files of the same names are replaced.

    Returns:
        list[Path]: The files, sorted by name.

    Example:
        >>> from unime_st.data.scenes import write_example_images
        >>> [path.name for path in write_example_images("images")[:2]]
        ['blue-circle.png', 'blue-cross.png']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = random.Random(0), []
    for color in sorted(COLORS):
        for shape in sorted(SHAPES):
            scene = Scene((Thing(color, shape, "large", "plain", (1, 1)),), "white")
            paths.append(folder / f"{color}-{shape}.png")
            draw_scene(scene, rng).save(paths[-1])
    return paths
