"""Images, captions and prompt files of the demo, all made from the digits that ship with scikit-learn."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SIZES = {"generator": 900, "reward": 450, "judge": 447}
IMAGE_SIZE = 16
SEED = 20250512


def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return one of three disjoint, stratified parts of the 1,797 digits.

    Args:
        split: "generator" (900 images), "reward" (450) or "judge" (447).

    Returns:
        Images, float32 [B, 3, 16, 16] in [0, 1], bright ink on black, and labels, int64 [B] in 0..9.

    Raises:
        ValueError: `split` is not one of the three names.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    if split not in SPLIT_SIZES:
        raise ValueError(f"split: got {split!r}, want one of {sorted(SPLIT_SIZES)}")
    data = load()
    everything = list(range(len(data.target)))
    generator, rest = train_test_split(
        everything, train_size=SPLIT_SIZES["generator"], stratify=data.target, random_state=SEED
    )
    reward, judge = train_test_split(
        rest, train_size=SPLIT_SIZES["reward"], stratify=data.target[rest], random_state=SEED
    )
    rows = {"generator": generator, "reward": reward, "judge": judge}[split]
    native = torch.from_numpy(data.images[rows]).float().div(16).unsqueeze(1)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = F.interpolate(native, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return images.repeat(1, 3, 1, 1), torch.from_numpy(data.target[rows]).long()


def shuffle_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return a copy of `labels` in which a random part has been shuffled among itself, as bad captions are.

    Args:
        labels: int64 [B].
        share: Part of the labels that takes part in the shuffle, in [0, 1]; about a tenth of it stays right.
        seed: Seed of the choice and of the shuffle.

    Raises:
        ValueError: `share` lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, want a number in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shuffled = labels.clone()
    shuffled[chosen] = labels[chosen[torch.randperm(len(chosen), generator=generator)]]
    return shuffled


def make_signs(images: Tensor, labels: Tensor, numbers: Sequence[int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Put random digits side by side so that their labels spell one of `numbers`.

    Args:
        images: float32 [B, 3, H, W].
        labels: int64 [B]; every digit of `numbers` must occur.
        numbers: Two-digit numbers in 0..99 that may be spelled.
        count: How many signs to make.
        seed: Seed of the choice.

    Returns:
        Signs, float32 [count, 3, H, 2 W], and the numbers they spell, int64 [count].
    """
    generator = torch.Generator().manual_seed(seed)
    spelled = torch.tensor(list(numbers))[torch.randint(len(numbers), (count,), generator=generator)]
    rows = [torch.where(labels == digit)[0] for digit in range(10)]
    pick = torch.rand(count, 2, generator=generator).tolist()
    halves: list[list[Tensor]] = [[], []]
    for number, shares in zip(spelled.tolist(), pick, strict=True):
        for side, digit in enumerate(divmod(number, 10)):
            halves[side].append(rows[digit][int(shares[side] * len(rows[digit]))])
    left, right = (images[torch.stack(half)] for half in halves)
    return torch.cat([left, right], dim=3), spelled


def digit_prompt(digit: int) -> str:
    """Return the prompt of one digit, for example "a handwritten digit three"."""
    return f"a handwritten digit {DIGIT_NAMES[digit]}"


def sign_prompt(number: int) -> str:
    """Return the prompt of a two-digit sign, for example 'a sign that reads "07"'."""
    return f'a sign that reads "{number:02d}"'


def sign_numbers() -> tuple[list[int], list[int]]:
    """Return the 80 numbers used for training and the 20 held out.

    Every digit is held out twice in each place, so that both parts hold all digits in all places equally often.
    """
    order = torch.randperm(10, generator=torch.Generator().manual_seed(SEED)).tolist()
    held_out = sorted(10 * tens + order[(tens + turn) % 10] for tens in range(10) for turn in (0, 3))
    return [number for number in range(100) if number not in held_out], held_out


def write_prompts(folder: Path) -> list[Path]:
    """Write `digits.jsonl`, `signs.train.jsonl` and `signs.test.jsonl` into `folder` and return their paths."""
    train, test = sign_numbers()
    files: dict[str, list[dict[str, object]]] = {
        "digits.jsonl": [{"prompt": digit_prompt(digit), "digit": digit} for digit in range(10)],
        "signs.train.jsonl": [{"prompt": sign_prompt(number)} for number in train],
        "signs.test.jsonl": [{"prompt": sign_prompt(number)} for number in test],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [folder / name for name in files]
