"""Pictures of shapes among clutter, with their classes and boxes: what yolo_head.py trains on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from torch import Tensor

SIZE = 128  # pixels a side
CLASSES = ("disc", "ring", "square", "triangle", "cross", "star")
MOST = 6  # objects in a picture
SCALE = 2  # pictures are drawn larger and shrunk: smooth edges


@dataclass
class Pictures:
    images: Tensor  # [N, 3, SIZE, SIZE] of bytes
    labels: Tensor  # [N, MOST], -1 where there is no object
    boxes: Tensor  # [N, MOST, 4], corners x0 y0 x1 y1 in pixels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor, turn: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Images from 0 to 1, labels, boxes; `turn` is one of the eight ways to lay a square on itself."""
        images, boxes = self.images[index].float() / 255, self.boxes[index]
        if turn & 1:
            images, boxes = images.transpose(2, 3), boxes[..., [1, 0, 3, 2]]
        for bit, axis in ((2, 0), (4, 1)):  # x, y
            if turn & bit:
                images, boxes = images.flip(3 - axis), boxes.clone()
                boxes[..., [axis, axis + 2]] = SIZE - boxes[..., [axis + 2, axis]]
        return images.contiguous(), self.labels[index], boxes


def draw_pictures(number: int, seed: int, what: str, console: Console) -> Pictures:
    """The same pictures for a seed, however many they are; `what` is the progress bar's word for them."""
    images = torch.empty(number, 3, SIZE, SIZE, dtype=torch.uint8)
    labels, boxes = torch.full((number, MOST), -1), torch.zeros(number, MOST, 4)
    for i in track(range(number), f"drawing {what}", console=console):
        image, of_image, around = draw_picture(np.random.default_rng([seed, i]))
        images[i] = torch.from_numpy(image).permute(2, 0, 1)
        labels[i, : len(of_image)] = torch.tensor(of_image)
        boxes[i, : len(around)] = torch.from_numpy(np.stack(around))
    return Pictures(images, labels, boxes)


def draw_picture(random: np.random.Generator) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """One picture [SIZE, SIZE, 3], its objects' classes and boxes."""
    coarse = random.uniform(60, 200, 3) + random.uniform(-60, 60, (5, 5, 3))
    background = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    picture = background.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.BICUBIC)
    draw_clutter(picture, random, int(random.integers(4, 12)))
    labels: list[int] = []
    boxes: list[np.ndarray] = []
    for _ in range(int(random.integers(1, MOST + 1))):
        label = int(random.integers(len(CLASSES)))
        radius = np.exp(random.uniform(np.log(7), np.log(34)))
        points = radius * rotated(OUTLINES[CLASSES[label]], random.uniform(0, 2 * np.pi))
        points += random.uniform(-points.min(0), SIZE - points.max(0))
        box = np.concatenate([points.min(0), points.max(0)])
        if all(covered(box, other) <= 0.2 for other in boxes):
            draw_shape(picture, random, points, hollow=CLASSES[label] == "ring")
            labels.append(label)
            boxes.append(box)
    draw_clutter(picture, random, int(random.integers(0, 4)))
    small = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noisy = small + random.normal(0, random.uniform(2, 12), small.shape)
    return noisy.clip(0, 255).astype(np.uint8), labels, boxes


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def polygon(corners: int, radius: np.ndarray | float = 1.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))


ARM = np.array([[1, -0.3], [1, 0.3], [0.3, 0.3]])
OUTLINES = {  # corners of each shape, its radius 1
    "disc": polygon(48),
    "ring": polygon(48),
    "square": polygon(4),
    "triangle": polygon(3),
    "cross": np.concatenate([rotated(ARM, quarter * np.pi / 2) for quarter in range(4)]),
    "star": polygon(10, np.where(np.arange(10) % 2, 0.42, 1.0)),
}


def any_colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(random.integers(0, 256, 3).tolist())


def draw_shape(picture: Image.Image, random: np.random.Generator, points: np.ndarray, hollow: bool) -> None:
    """Of four colours the one that stands out most."""
    centre = points.mean(0)
    behind = picture.getpixel(tuple(int(c) for c in centre * SCALE))
    colour = max((any_colour(random) for _ in range(4)), key=lambda c: math.dist(c, behind))
    mask = Image.new("L", picture.size)
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(p) for p in points * SCALE], fill=255)
    if hollow:
        pen.polygon([tuple(p) for p in (centre + 0.55 * (points - centre)) * SCALE], fill=0)
    picture.paste(colour, mask=mask)


def draw_clutter(picture: Image.Image, random: np.random.Generator, number: int) -> None:
    """Bent lines, arcs and dots."""
    pen = ImageDraw.Draw(picture)
    for _ in range(number):
        at, reach = random.uniform(0, SIZE * SCALE, 2), random.uniform(4, 40) * SCALE
        bends = [tuple(at + reach * step) for step in random.uniform(-1, 1, (3, 2))]
        kind = random.integers(3)
        if kind == 0:
            pen.line(bends, any_colour(random), int(random.integers(1, 3 * SCALE)))
        elif kind == 1:
            start, end = random.uniform(0, 360, 2)
            pen.arc(
                [tuple(at), tuple(at + reach)],
                start,
                end,
                any_colour(random),
                int(random.integers(1, 2 * SCALE)),
            )
        else:
            pen.ellipse([tuple(at), tuple(at + random.uniform(1, 4) * SCALE)], any_colour(random))


def covered(a: np.ndarray, b: np.ndarray) -> float:
    """How much of the smaller box lies in the other."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.clip(0).prod() / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))
