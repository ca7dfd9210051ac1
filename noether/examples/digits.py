"""Handwritten digits, and a small convolutional network that classifies them."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from noether.core.artifacts import LogImages
from noether.core.errors import check_choice, raise_problems

if TYPE_CHECKING:
    from collections.abc import Mapping

SPLITS: Final = ("train", "val", "test")
_MAX_INTENSITY: Final = 16.0


class Digits(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images of handwritten digits, 8 x 8, with their labels.

    `data/digits.md` beside this file describes the data, its source and its licence.

    Args:
        split: `train` (1,205 images), `val` (296) or `test` (296).
        shift: Largest random shift in pixels, vertical and horizontal; 0 does not shift the images.

    Example:
        >>> image, label = Digits(split="val")[0]
        >>> tuple(image.shape), image.dtype, label.dtype
        ((1, 8, 8), torch.float32, torch.int64)
    """

    def __init__(self, split: Literal["train", "val", "test"], shift: int = 0) -> None:
        raise_problems([check_choice("split", split, SPLITS)])
        with files("noether.examples").joinpath("data/digits.npz").open("rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
        is_selected = arrays["split"] == SPLITS.index(split)
        self._images = torch.from_numpy(arrays["images"][is_selected].astype(np.float32) / _MAX_INTENSITY).unsqueeze(1)
        self._labels = torch.from_numpy(arrays["labels"][is_selected].astype(np.int64))
        self._shift = shift

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an image `(1, 8, 8)`, float32 in [0, 1], and its label, int64 in [0, 10)."""
        image = self._images[index]
        if self._shift:
            down, right = torch.randint(0, 2 * self._shift + 1, (2,)).tolist()
            padded = functional.pad(image, (self._shift,) * 4)
            image = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
        return image, self._labels[index]


class ConvNet(nn.Module):
    """Two convolutions with batch norm, dropout and a linear layer.

    Args:
        width: Channels of the first convolution; the second has twice as many. >= 1.
        dropout: Fraction of features that is dropped in training, in [0, 1).

    Example:
        >>> ConvNet()(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(self, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width * 16, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores `(batch, 10)` for images `(batch, 1, 8, 8)`."""
        scores: torch.Tensor = self.head(self.features(image))
        return scores


def cross_entropy(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the mean cross-entropy of the scores `(batch, classes)` and the labels in `batch`.

    Example:
        >>> cross_entropy(torch.zeros(2, 10), (torch.zeros(2), torch.tensor([1, 2])))
        {'cross_entropy': tensor(2.3026)}
    """
    return {"cross_entropy": functional.cross_entropy(outputs, batch[1])}


def show_predictions(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> LogImages:
    """Return the images of a batch with their predicted digits: the `figure` of a `PredictionsCallback`.

    Example:
        >>> images, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 7])
        >>> show_predictions(torch.zeros(2, 10), (images, labels)).captions
        ('0', '0 instead of 7')
    """
    images, labels = batch
    predicted = outputs.argmax(dim=1).tolist()
    pairs = zip(predicted, labels.tolist(), strict=True)
    captions = [f"{guess}" if guess == label else f"{guess} instead of {label}" for guess, label in pairs]
    return LogImages("predictions", images, captions)
