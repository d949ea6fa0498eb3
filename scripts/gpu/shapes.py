"""A folder of images of four shapes, `train/` and `val/`, that a network can learn: `python scripts/gpu/shapes.py DIR`."""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COUNTS = {"train": 64, "val": 32}
SHAPES = ("circle", "cross", "square", "triangle")


def picture(shape: str, rng: random.Random) -> Image.Image:
    """Return a shape of random place, size and colour on a dark ground."""
    image = Image.new("RGB", (224, 224), tuple(rng.randrange(90) for _ in range(3)))
    draw, colour = ImageDraw.Draw(image), tuple(rng.randrange(140, 256) for _ in range(3))
    x, y, r = rng.randrange(70, 154), rng.randrange(70, 154), rng.randrange(30, 66)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    else:
        draw.rectangle((x - r, y - r // 4, x + r, y + r // 4), fill=colour)
        draw.rectangle((x - r // 4, y - r, x + r // 4, y + r), fill=colour)
    return image


def main() -> None:
    rng = random.Random(0)
    for split, count in COUNTS.items():
        for shape in SHAPES:
            folder = Path(sys.argv[1]) / split / shape
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture(shape, rng).save(folder / f"{number:03}.png")


if __name__ == "__main__":
    main()
