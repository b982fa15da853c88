"""Drawing of scenes with Pillow: 84 x 84 pixels, a 3 x 3 grid, each object jittered within its cell."""

from __future__ import annotations

import io
import math
import random
from functools import cache

from PIL import Image, ImageDraw

from unime_st.data.scenes.world import Scene, Thing

CELL = 28
SIDE = 3 * CELL
_SCALE = 4  # supersampling factor, for smooth edges
_PAINT = {
    "red": (215, 30, 35),
    "green": (30, 150, 55),
    "blue": (35, 70, 215),
    "yellow": (245, 215, 35),
    "purple": (130, 40, 165),
    "orange": (245, 130, 20),
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "brown": (110, 75, 45),
    "black": (20, 20, 20),
}


def _points(shape: str, side: float) -> list[tuple[float, float]]:
    """Vertices of a polygonal shape in a square of the given side."""
    center = side / 2
    if shape == "square":
        return [(0, 0), (side, 0), (side, side), (0, side)]
    if shape == "triangle":
        return [(center, 0), (side, side), (0, side)]
    if shape == "cross":
        a, b = side * 0.33, side * 0.67
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (side, a),
            (side, b),
            (b, b),
            (b, side),
            (a, side),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    radii = [center if corner % 2 == 0 else center * 0.42 for corner in range(10)]  # star
    angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
    return [(center + r * math.cos(a), center + r * math.sin(a)) for r, a in zip(radii, angles)]


@cache
def _tile(color: str, shape: str, size: str, texture: str) -> Image.Image:
    """Image of one object with transparency."""
    side = (26 if size == "large" else 16) * _SCALE
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            pen.ellipse((side * 0.28, side * 0.28, side * 0.72, side * 0.72), fill=0)
    else:
        pen.polygon(_points(shape, side - 1), fill=255)
    paint = _PAINT[color]
    shade = tuple(channel // 3 for channel in paint)
    layer = Image.new("RGB", (side, side), paint)
    brush = ImageDraw.Draw(layer)
    if texture == "striped":
        for top in range(0, side, 5 * _SCALE):
            brush.rectangle((0, top, side, top + 2 * _SCALE - 1), fill=shade)
    elif texture == "dotted":
        for top in range(0, side, 5 * _SCALE):
            for left in range(0, side, 5 * _SCALE):
                brush.ellipse((left, top, left + 3 * _SCALE, top + 3 * _SCALE), fill=shade)
    layer.putalpha(mask)
    return layer.resize((side // _SCALE, side // _SCALE), Image.Resampling.LANCZOS)


def _corner(thing: Thing, tile: Image.Image, rng: random.Random) -> tuple[int, int]:
    """Upper left corner of an object: centered in its cell, jittered by up to two pixels."""
    slack = min(2, (CELL - tile.width) // 2)
    row, column = thing.cell
    center = (CELL - tile.width) // 2
    return (
        column * CELL + center + rng.randint(-slack, slack),
        row * CELL + center + rng.randint(-slack, slack),
    )


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene. ``rng`` only jitters the objects, so two drawings of a scene are near-duplicates."""
    image = Image.new("RGB", (SIDE, SIDE), _PAINT[scene.background])
    for thing in scene.things:
        tile = _tile(thing.color, thing.shape, thing.size, thing.texture)
        image.paste(tile, _corner(thing, tile, rng), tile)
    return image


def paint_object(color: str, shape: str, background: str, corner: tuple[int, int], side: int = SIDE) -> Image.Image:
    """Draw one large, plain object with its upper left corner at (x, y) in pixels."""
    image, tile = Image.new("RGB", (side, side), _PAINT[background]), _tile(color, shape, "large", "plain")
    image.paste(tile, corner, tile)
    return image


def crop_thing(image: Image.Image, thing: Thing) -> Image.Image:
    """Crop the cell of an object from a drawn scene, enlarged to the size of a scene."""
    row, column = thing.cell
    box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
    return image.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def to_png(image: Image.Image) -> bytes:
    """Encode a drawing as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
