"""Heat equation on a torus: exact solutions, and a small neural operator that learns to predict them."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from noether.core.errors import Problem, SettingsError, check_choice, check_whole, raise_problems
from noether.core.progress import track_progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

SPLITS: Final = ("train", "val", "test")
SAMPLES: Final = {"train": 1024, "val": 128, "test": 256}
"""Default number of samples of each split."""
DIFFUSIVITY: Final = 0.01
"""nu in u_t = nu * laplace(u): squared sides of the torus per unit of time."""
GRADIENT_WEIGHT: Final = 0.1
"""Weight of the gradient error in the total loss; the weight of the field error is 1."""
_VERSION: Final = 1  # part of the file name; increase it when the random fields or the solver change
_MIN_SIZE: Final = 4
_MIN_NORM: Final = 1e-8  # keeps the error relative to a field of zeros finite


class HeatFields(Dataset[dict[str, torch.Tensor]]):
    """Temperature fields on the unit torus, and the fields at a later time by u_t = nu * laplace(u).

    Initial fields are samples of a smooth Gaussian random field of mean 0 and variance 1; times are uniform in [0, 1).
    They are generated once and cached; a damaged cache file is generated again. The first samples of a split do not
    depend on the number of samples.

    Args:
        split: `train`, `val` or `test`; each split has different seeds.
        size: Grid points per side, >= 4.
        samples: Number of samples, >= 1; None for 1,024 (`train`), 128 (`val`) or 256 (`test`).
        cache: Directory of the cache; None for `$XDG_CACHE_HOME/noether/heat`, or `~/.cache/noether/heat`.

    Raises:
        SettingsError: If a setting is out of range, or the cache cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     sample = HeatFields("val", size=8, samples=2, cache=directory)[0]
        >>> {name: tuple(tensor.shape) for name, tensor in sample.items()}
        {'initial': (1, 8, 8), 'time': (), 'target': (1, 8, 8)}
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        size: int = 32,
        samples: int | None = None,
        cache: str | None = None,
    ) -> None:
        count = None if samples is None else check_whole("samples", samples)
        raise_problems([check_choice("split", split, SPLITS), check_whole("size", size, at_least=_MIN_SIZE), count])
        directory = _default_cache() if cache is None else Path(cache).expanduser()
        arrays = _load_or_generate(directory, split, size, SAMPLES[split] if samples is None else samples)
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self._tensors["time"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `initial` and `target` `(1, size, size)`, and the `time` between them `()` in [0, 1); all float32."""
        return {name: tensor[index] for name, tensor in self._tensors.items()}


def solve(initial: ArrayLike, time: ArrayLike) -> NDArray[np.float64]:
    """Return the solution of the heat equation on the unit torus after some time, exact up to rounding.

    The Fourier mode of wave vector k, in waves per side, decays as exp(-DIFFUSIVITY * |2 pi k|^2 * time): see
    L. C. Evans, Partial Differential Equations (2nd ed.), section 4.3.1.

    Args:
        initial: Temperatures `(..., size, size)` on a regular grid.
        time: A time per field `(...)`, or one for all fields `()`; >= 0.

    Returns:
        Temperatures `(..., size, size)`, float64.

    Example:
        >>> wave = np.cos(2 * np.pi * np.arange(8) / 8) * np.ones((8, 1))
        >>> bool(np.allclose(solve(wave, 2.0), np.exp(-0.01 * (2 * np.pi) ** 2 * 2.0) * wave))
        True
    """
    fields, times = np.asarray(initial, dtype=np.float64), np.asarray(time, dtype=np.float64)
    rates = DIFFUSIVITY * (2 * np.pi) ** 2 * _squared_waves(fields.shape[-1])
    decayed = np.fft.rfft2(fields) * np.exp(-rates * times[..., None, None])
    return np.fft.irfft2(decayed, s=fields.shape[-2:])


def _squared_waves(size: int) -> NDArray[np.float64]:
    """Return |k|^2 `(size, size // 2 + 1)` in the order of `rfft2`."""
    down, right = np.fft.fftfreq(size, 1 / size), np.fft.rfftfreq(size, 1 / size)
    squares: NDArray[np.float64] = down[:, None] ** 2 + right**2
    return squares


def _generate(split: str, size: int, samples: int) -> dict[str, NDArray[np.float32]]:
    """Generate the arrays of a split."""
    smoothing = _smoothing(size)
    indices = track_progress(range(samples), f"generating heat fields ({split})")
    # One seed per sample, so that a sample does not depend on the number of samples.
    drawn = [_draw_sample(smoothing, np.random.default_rng([SPLITS.index(split), index])) for index in indices]
    initial, time, target = (np.array(part, dtype=np.float32) for part in zip(*drawn, strict=True))
    return {"initial": initial[:, None], "time": time, "target": target[:, None]}


def _draw_sample(smoothing: NDArray[np.float64], random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Return a random initial field, a random time, and the field at that time."""
    shape = (len(smoothing), len(smoothing))
    initial = np.fft.irfft2(np.fft.rfft2(random.standard_normal(shape)) * smoothing, s=shape)
    time = random.random(dtype=np.float32)  # float32, so that the stored time is exactly that of the target
    return initial, time, solve(initial, time)


def _smoothing(size: int) -> NDArray[np.float64]:
    """Return the factor of each mode of white noise, such that every point keeps variance 1.

    The spectrum is that of a Matern field: (tau^2 + |k|^2)^(-alpha) with tau = 3 and alpha = 4; the factor is its root.
    """
    decay = (9.0 + _squared_waves(size)) ** -2
    # The noise is convolved with this kernel, so its variance is multiplied by the squared norm of the kernel.
    kernel = np.fft.irfft2(decay, s=(size, size))
    smoothing: NDArray[np.float64] = decay / np.linalg.norm(kernel)
    return smoothing


def _default_cache() -> Path:
    # The XDG Base Directory Specification says to ignore relative paths.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "noether" / "heat"


def _load_or_generate(directory: Path, split: str, size: int, samples: int) -> Mapping[str, NDArray[np.float32]]:
    """Return the cached arrays; generate them if the file is missing or damaged."""
    path = directory / f"v{_VERSION}-{split}-{size}x{size}-{samples}.fields"
    arrays = _read(path)
    if arrays is None:
        arrays = _generate(split, size, samples)
        _write(path, arrays)
    return arrays


def _read(path: Path) -> dict[str, NDArray[np.float32]] | None:
    """Return the arrays in a file, or None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, archive = content[: hashlib.sha256().digest_size], content[hashlib.sha256().digest_size :]
    if hashlib.sha256(archive).digest() != digest:
        return None
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        return dict(arrays)


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a file atomically: a SHA-256 digest, then the arrays as a numpy archive."""
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    # A unique name, so that two processes do not write to one file; the later one replaces an equal file.
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(archive.getvalue()).digest() + archive.getvalue())
        temporary.replace(path)
    except OSError as error:
        message = f"{str(path.parent)!r} cannot be written ({error.strerror}); give a writable directory"
        raise SettingsError([Problem("cache", message)]) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


class FourierNet(nn.Module):
    """A small Fourier neural operator conditioned on the time.

    See Z. Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, ICLR 2021.

    Args:
        width: Channels of each layer, >= 1.
        modes: Number of lowest modes that a layer mixes, per direction; in [1, grid points per side / 2].
        layers: Number of layers, >= 1.

    Raises:
        SettingsError: If a setting is not a whole number >= 1.

    Example:
        >>> outputs = FourierNet(width=4, modes=2)(torch.zeros(3, 1, 8, 8), torch.zeros(3))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'field': (3, 1, 8, 8), 'heat_drift': (3,)}
    """

    def __init__(self, width: int = 16, modes: int = 6, layers: int = 2) -> None:
        super().__init__()
        raise_problems([check_whole("width", width), check_whole("modes", modes), check_whole("layers", layers)])
        self.lift = nn.Conv2d(1, width, 1)
        self.clock = nn.Sequential(nn.Linear(1, width), nn.GELU())
        self.layers = nn.ModuleList(_FourierLayer(width, modes) for _ in range(layers))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, initial: torch.Tensor, time: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the predicted field, and how much heat was not conserved.

        Args:
            initial: Temperatures `(batch, 1, size, size)`.
            time: Time of the prediction `(batch,)`, in [0, 1).

        Returns:
            `field` `(batch, 1, size, size)`, and `heat_drift` `(batch,)`: the absolute change of the mean temperature,
            which is 0 for the exact solution.

        Raises:
            ValueError: If the grid is too coarse for the modes.
        """
        hidden, clock = self.lift(initial), self.clock(time[:, None])
        for layer in self.layers:
            hidden = layer(hidden, clock)
        field = self.head(hidden)
        return {"field": field, "heat_drift": (field - initial).mean(dim=(1, 2, 3)).abs()}


class _FourierLayer(nn.Module):
    """Residual layer: a linear map of the lowest modes, scaled and shifted by the time, plus a pointwise linear map."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self._modes = modes
        # Complex numbers as pairs of real ones, which every optimizer and checkpoint supports.
        self.mixing = nn.Parameter(torch.randn(width, width, 2 * modes, modes, 2) / width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.clock = nn.Linear(width, 2 * width)

    def forward(self, hidden: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        scale, shift = self.clock(clock)[:, :, None, None].chunk(2, dim=1)
        mixed = self._mix_modes(hidden.float())  # the transforms do not support bfloat16
        passed: torch.Tensor = hidden + functional.gelu(mixed * (1 + scale) + self.pointwise(hidden) + shift)
        return passed

    def _mix_modes(self, hidden: torch.Tensor) -> torch.Tensor:
        modes, size = self._modes, hidden.shape[-1]
        if 2 * modes > size:
            raise ValueError(f"a grid of {size} x {size} has no {modes} modes; set modes to {size // 2} or less")
        # Negative frequencies are the last rows; a real field has no columns of them.
        spectrum = torch.fft.fft(torch.fft.rfft(hidden)[..., :modes], dim=-2)
        lowest = torch.cat([spectrum[..., :modes, :], spectrum[..., -modes:, :]], dim=-2)
        mixed = torch.einsum("bixy,ioxy->boxy", lowest, torch.view_as_complex(self.mixing))
        zeros = mixed.new_zeros(*mixed.shape[:2], size - 2 * modes, modes)
        rows = torch.cat([mixed[..., :modes, :], zeros, mixed[..., modes:, :]], dim=-2)
        mixture: torch.Tensor = torch.fft.irfft(torch.fft.ifft(rows, dim=-2), n=size)
        return mixture


def losses(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the mean relative L2 errors of the field and, times `GRADIENT_WEIGHT`, of its gradient.

    The gradient is the differences between neighbours on the torus; the distance between them cancels.

    Args:
        outputs: `field` `(batch, 1, size, size)`.
        batch: `target` `(batch, 1, size, size)`.

    Returns:
        `field` and `gradient`, `()` each, >= 0; their sum is the total.

    Example:
        >>> target = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(3, 1, 2, 2)
        >>> losses({"field": 2 * target}, {"target": target})
        {'field': tensor(1.), 'gradient': tensor(0.1000)}
    """
    error, target = outputs["field"] - batch["target"], batch["target"]
    gradient = _relative_norm(_differences(error), _differences(target))
    return {"field": _relative_norm(error, target).mean(), "gradient": GRADIENT_WEIGHT * gradient.mean()}


def relative_l2(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the relative L2 error of each sample: the norm of its error, divided by the norm of its target.

    Args:
        outputs: `field` `(batch, 1, size, size)`.
        batch: `target` `(batch, 1, size, size)`.

    Returns:
        `(batch,)`, >= 0.

    Example:
        >>> target = torch.ones(2, 1, 4, 4)
        >>> relative_l2({"field": 1.5 * target}, {"target": target})
        tensor([0.5000, 0.5000])
    """
    return _relative_norm(outputs["field"] - batch["target"], batch["target"])


def _relative_norm(error: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    error_norm, target_norm = (torch.linalg.vector_norm(field, dim=(1, 2, 3)) for field in (error, target))
    relative: torch.Tensor = error_norm / target_norm.clamp_min(_MIN_NORM)
    return relative


def _differences(field: torch.Tensor) -> torch.Tensor:
    return torch.cat([field.roll(-1, dims=dim) - field for dim in (-2, -1)], dim=1)
