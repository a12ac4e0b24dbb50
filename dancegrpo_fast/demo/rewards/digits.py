"""Rewards for single digits: a small CNN to train against, and an SVM that shares nothing with it to judge by."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...rewards.base import RewardInput

_SIZE = 16
DIGITS = frozenset("0123456789")


class DigitNet(nn.Module):
    """Classify digits: float32 [B, 3, 16, 16] in [0, 1] to logits [B, 10], 26 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (_SIZE // 8) ** 2, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32 [B, 10]."""
        logits: Tensor = self.layers(images.mean(dim=1, keepdim=True) * 2 - 1)
        return logits


class WantsDigit:
    """What rewards of a digit share: every prompt says which one."""

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a row of `meta` without a digit in 0..9."""
        for row, columns in enumerate(meta):
            digit = columns.get("digit")
            # A table of text has it as text.
            if isinstance(digit, bool) or str(digit) not in DIGITS:
                raise ValueError(f'meta[{row}]["digit"]: got {digit!r}, want an integer in 0..9')

    def wanted(self, inputs: RewardInput) -> Tensor:
        """Return the digits, int64 [B].

        Raises:
            ValueError: rows of `meta` are not B, or one has no digit.
        """
        if len(inputs.meta) != len(inputs.frames):
            raise ValueError(f"meta: got {len(inputs.meta)} rows, want {len(inputs.frames)}, one per sample")
        self.check(inputs.prompts, inputs.meta)
        return torch.tensor([int(columns["digit"]) for columns in inputs.meta], dtype=torch.int64)


def load_net(path: str | Path) -> DigitNet:
    """Return the CNN saved with a demo base.

    Raises:
        ValueError: `path` is not a file.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(
            f"path: got {str(path)!r}, which does not exist, want the digit_cnn.safetensors of a base; "
            "`python -m dancegrpo_fast.demo NAME` builds the one that the top of the recipe names"
        )
    net = DigitNet().eval().requires_grad_(False)
    net.load_state_dict(load_file(path))
    return net


class Reader:
    """An RBF SVM that reads digits, float32 [B, 3, 16, 16]; trained at construction."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.svm import SVC

        self.machine = SVC(kernel="rbf", gamma="scale", C=10.0)
        self.machine.fit(_native(images), labels.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        """Return digits, int64 [B]."""
        return torch.as_tensor(self.machine.predict(_native(images))) if len(images) else torch.empty(0)


class DigitProbability(WantsDigit):
    """Probability of the wanted digit under the CNN saved with a demo base.

    Args:
        path: A `digit_cnn.safetensors` file.
        device: Where the CNN runs.

    Raises:
        ValueError: `path` is not a file.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.net, self.device = load_net(path).to(device), torch.device(device)

    @torch.no_grad()
    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return softmax probabilities in [0, 1], float32 [B], of `meta["digit"]`.

        Raises:
            ValueError: frames are not [B, 1, 3, 16, 16], or a row of `meta` has no digit in 0..9.
        """
        images, digits = _images(inputs).to(self.device), self.wanted(inputs)
        probabilities: Tensor = self.net(images).softmax(dim=1).cpu()
        return probabilities.gather(1, digits[:, None]).squeeze(1)


class DigitJudge(WantsDigit):
    """1.0 where an RBF SVM, trained at construction on the judge split, reads the wanted digit, else 0.0."""

    def __init__(self) -> None:
        from ..data import load_digits

        self.read = Reader(*load_digits("judge"))

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return 0.0 or 1.0 a sample, float32 [B].

        Raises:
            ValueError: frames are not [B, 1, 3, 16, 16], or a row of `meta` has no digit in 0..9.
        """
        images, digits = _images(inputs), self.wanted(inputs)
        return (self.read(images) == digits).float()


def _native(images: Tensor) -> Any:
    """Average [B, 3, 16, 16] down to the 8x8 pixels of the data set, as a numpy array [B, 64]."""
    return F.avg_pool2d(images.cpu().mean(dim=1, keepdim=True), 2).flatten(1).numpy()


def _images(inputs: RewardInput) -> Tensor:
    shape = tuple(inputs.frames.shape)
    if inputs.frames.ndim != 5 or shape[1:] != (1, 3, _SIZE, _SIZE):
        raise ValueError(f"frames: got shape {shape}, want [B, 1, 3, {_SIZE}, {_SIZE}]")
    return inputs.frames[:, 0].float()
