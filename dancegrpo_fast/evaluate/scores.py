"""`dancegrpo-fast evaluate`: samples of fixed prompts from any checkpoint, every score a line, and a table."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from ..allocator import expand_segments
from ..files import append_rows, write_text, writing
from ..models import load_model
from ..models.base import DiffusersModel
from ..processes import Processes
from ..prompts import load_prompts
from ..recipe import Recipe
from ..run.changes import FREE, differences, joined
from ..run.identity import model_identity
from ..run.sheets import save_pages
from ..train.calls import Policy
from ..train.held_out import Evaluator, ScoredSet, diversity
from ..train.residence import Residence
from .weights import load_weights


def save_sample(frames: Tensor, path: Path, fps: float | None) -> Path:
    """Writes one sample without loss: an image as PNG, a video as animated PNG with all its frames.

    Args:
        frames: float32 `[T, 3, H, W]` in [0, 1] on the 8-bit grid.
        path: ends in `.png`.
        fps: of a video; None shows 8 frames a second.
    """
    from PIL import Image

    pages = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in frames]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return save_pages(path, pages, fps)


class Scores:
    """`scores.jsonl` of a folder: one line a sample, on disk after every set of prompts, continued where it ended.

    Args:
        folder: is made where it is not.
        settings: what the scores depend on.
        writes: this process writes the files; others only keep the same `rows`.

    Raises:
        ValueError: the folder holds scores of other settings, or a file of it is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], writes: bool = True) -> None:
        self.path, self._writes = folder / "scores.jsonl", writes
        recorded = folder / "settings.json"
        if recorded.is_file():
            free = [name for name in FREE if name.startswith("model.")]
            found = differences(json.loads(json.dumps(settings)), _read(recorded, 1, recorded.read_bytes()), free)
            if found:
                raise ValueError(
                    f"output: {folder} holds scores of other settings, want another folder; {joined(found)}"
                )
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(recorded, json.dumps(settings, indent=1))
        self.rows: list[dict[str, Any]] = []
        self._whole = True
        if self.path.is_file():
            *lines, part = self.path.read_bytes().split(b"\n")
            self.rows = [
                _read(self.path, number, line, "sampler", "prompt_index") for number, line in enumerate(lines, start=1)
            ]
            # A crash leaves at most a part of a line.
            self._whole = not part

    def has(self, sampler: str, prompts: range, samples: int) -> bool:
        """Whether every sample of these prompts is there with its scores; else what is there goes, to be made again."""
        others = [row for row in self.rows if row["sampler"] != sampler or row["prompt_index"] not in prompts]
        theirs = [row for row in self.rows if row["sampler"] == sampler and row["prompt_index"] in prompts]
        if len(theirs) == len(prompts) * samples and all(None not in row["scores"].values() for row in theirs):
            return True
        self._whole &= len(others) == len(self.rows)
        self.rows = others
        return False

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends to the file, which is written anew where something in it was dropped."""
        self.rows.extend(dict(row) for row in rows)
        if not self._writes:
            return
        if not self._whole:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._whole = True
        else:
            append_rows(self.path, rows)


def _read(path: Path, line: int, text: bytes, *keys: str) -> dict[str, Any]:
    """A JSON object of a file, which has these keys."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(f"want an object with {list(keys)}")
    except ValueError as error:
        raise ValueError(f"output: {path} is damaged in line {line} ({error}), want it whole or removed") from error
    return found


def _rows(
    found: ScoredSet,
    accepted: Sequence[float | None],
    sampler: str,
    names: Sequence[str],
    samples: int,
    folder: Path,
    fps: float | None,
) -> Iterator[dict[str, Any]]:
    for place, prompt in enumerate(found.prompts):
        of_accepted = {"diversity_accepted": accepted[place]} if accepted else {}
        mine = slice(place * samples, (place + 1) * samples)
        spread = diversity(found.frames[mine], samples) if samples > 1 else None
        for sample in range(samples):
            index = found.first + place
            file = folder / sampler / f"{index:05d}" / "samples" / f"{sample:04d}.png"
            save_sample(found.frames[mine][sample], file, fps)
            values = [None if math.isnan(score) else score for score in found.scores[:, mine][:, sample].tolist()]
            yield {
                "sampler": sampler,
                "prompt_index": index,
                "sample": sample,
                "prompt": prompt.text,
                "meta": prompt.columns(),
                "file": str(file.relative_to(folder)),
                "diversity": spread,
                **of_accepted,
                "scores": dict(zip(names, values, strict=True)),
            }
        # The official GenEval scorer reads a prompt's folder: metadata.jsonl beside samples/.
        metadata = {"prompt": prompt.text, **prompt.columns()}
        write_text(folder / sampler / f"{index:05d}" / "metadata.jsonl", json.dumps(metadata) + "\n")


def summary(rows: Sequence[Mapping[str, Any]], by: str | None = None) -> list[dict[str, Any]]:
    """One row per sampler and score for all prompts; with `by`, also for each value of that column of the prompts.

    The mean over these values, each counted once however many prompts it has, follows: GenEval's overall score is that
    over tags.

    `mean` with `error`, the standard error over prompts; `std` over all samples, `within` the mean over prompts of the
    standard deviation of a prompt's samples; `diversity` the mean over prompts of pixels' standard deviation. The last
    two are None where there is one sample a prompt. `diversity_accepted`, where rows have it: over prompts with at
    least two accepted samples, None where there is none. A sample without a score is left out of it.

    Raises:
        ValueError: a prompt lacks the column.
    """
    groups: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        if by is not None and by not in row["meta"]:
            raise ValueError(f'by: got "{by}", which prompt "{row["prompt"]}" lacks; it has {sorted(row["meta"])}')
        groups.setdefault((row["sampler"], None), []).append(row)
        if by is not None:
            groups.setdefault((row["sampler"], str(row["meta"][by])), []).append(row)
    table = []
    for (sampler, value), members in groups.items():
        for name in members[0]["scores"]:
            prompts: dict[int, list[float]] = {}
            for row in members:
                if row["scores"][name] is not None:
                    prompts.setdefault(row["prompt_index"], []).append(row["scores"][name])
            means = [fmean(scores) for scores in prompts.values()]
            values = [score for scores in prompts.values() for score in scores]
            spreads = [stdev(scores) for scores in prompts.values() if len(scores) > 1]
            several = members[0]["diversity"] is not None
            table.append(
                {
                    "sampler": sampler,
                    "group": value,
                    "score": name,
                    "mean": fmean(means) if means else None,
                    "error": stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
                    "std": stdev(values) if len(values) > 1 else None,
                    "within": fmean(spreads) if spreads else None,
                    "diversity": fmean([row["diversity"] for row in members]) if several else None,
                    **_accepted(members),
                    "prompts": len(prompts),
                    "samples": len(values),
                }
            )
    for whole in [row for row in table if row["group"] is None] if by is not None else ():
        same = [row for row in table if (row["sampler"], row["score"]) == (whole["sampler"], whole["score"])]
        means = [row["mean"] for row in same if row["group"] is not None and row["mean"] is not None]
        unsaid = whole.keys() & {"error", "std", "within", "diversity", "diversity_accepted"}
        mean = fmean(means) if means else None
        table.append(whole | {"group": f"mean over {by}", "mean": mean} | dict.fromkeys(unsaid))
    return [row | {"group": "all"} if row["group"] is None else row for row in table]


def _accepted(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    if "diversity_accepted" not in rows[0]:
        return {}
    prompts = {row["prompt_index"]: row["diversity_accepted"] for row in rows}
    found = [spread for spread in prompts.values() if spread is not None]
    return {"diversity_accepted": fmean(found) if found else None}


def table_text(table: Sequence[Mapping[str, Any]]) -> str:
    """A summary as a markdown table."""
    columns = list(table[0])
    cells = [
        [
            f"{v:.4f}" if isinstance(v, float) else "" if v is None else {"ode": "ODE", "sde": "SDE"}.get(v, str(v))
            for v in row.values()
        ]
        for row in table
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluate(
    recipe: Recipe,
    source: str | None,
    output: Path,
    samplers: Sequence[str] | None = None,
    by: str | None = None,
    weights: str | None = None,
) -> str | None:
    """Samples, `scores.jsonl`, `summary.json` and `table.md` in `output`; returns the table in the first process.

    Samples lie as `<sampler>/<prompt>/samples/<sample>.png` beside `metadata.jsonl`, which is how the official GenEval
    scorer wants them. A second call with the same settings continues where the first one ended. Several processes
    (`accelerate launch`) share out the prompts; the first one writes the tables.

    Args:
        recipe: the model, sampler, `evaluation` and its prompts.
        source: see `load_weights`; None evaluates the model as the recipe loads it.
        output: a folder.
        samplers: "ode", "sde" or both; None: as `evaluation.samplers` says.
        by: a column of the prompts file; the table then has a row for each of its values and for the mean over these.
        weights: "model" or "ema"; None: as `evaluation.ema` says.

    Raises:
        ValueError: a recipe without `evaluation`, unknown samplers or weights, an `output` that is a file or has
            other scores, prompts that a reward cannot score, or FSDP2.
        RuntimeError: a reward left out more samples than it may; the other scores are written.
    """
    settings = recipe.evaluation
    if settings is None:
        raise ValueError("evaluation: got none in the recipe, want evaluation.rewards at least")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: got {output}, which is a file, want a folder")
    if samplers is not None:
        settings = replace(settings, samplers=list(samplers))
    prompts = load_prompts(settings.prompts or recipe.prompts, "test" if settings.prompts else "train")
    for prompt in prompts if by is not None else ():
        if by not in prompt.meta:
            raise ValueError(f'by: got "{by}", which prompt "{prompt.text}" lacks; it has {sorted(prompt.meta)}')
    processes = Processes(recipe.train.mixed_precision, recipe.train.sequence_parallel, recipe.train.sequence_kind)
    expand_segments(processes.device)
    if processes.sharded:
        raise ValueError("accelerate: got FSDP2, want the whole model in every process to evaluate it")
    torch.set_num_threads(recipe.threads or processes.threads())
    model = load_model(recipe, processes.device, prompts, training=False)
    model.denoiser.eval().requires_grad_(False)
    loaded = (
        "as loaded"
        if source is None
        else load_weights(cast(DiffusersModel, model), Path(source), weights or (None if settings.ema else "model"))
    )
    # As the trainer prepares it, so that the same weights give the same samples.
    model.denoiser = processes.prepare(model.denoiser)
    described = {
        "model": asdict(recipe.model),
        "loaded": model_identity(model),
        "sampler": asdict(settings.sampling(recipe.sampler)),
        "rewards": [asdict(reward) for reward in settings.rewards],
        "samples_per_prompt": settings.samples_per_prompt,
        "accepted_by": settings.accepted_by,
        "micro_batch": recipe.train.micro_batch,
        "prompts": [{"prompt": prompt.text, **prompt.columns()} for prompt in prompts],
        "seed": recipe.seed,
        "weights": loaded,
        "mixed_precision": recipe.train.mixed_precision,
    }
    scores = Scores(output, described, processes.is_main)
    residence = Residence(recipe.train.offload, model, processes.device)
    evaluator = Evaluator(recipe, settings, prompts, Policy.of(recipe, model), processes, residence)
    evaluator.rewards.check(prompts)
    if evaluator.rewards.compares_groups and settings.samples_per_prompt < 2:
        raise ValueError("evaluation.samples_per_prompt: got 1, want at least 2, which a reward compares")
    samples, places = settings.samples_per_prompt, range(len(prompts))
    for sampler in settings.samplers:
        sets = evaluator.sets()
        missing = [part for part in sets if not scores.has(sampler, places[part], samples)]
        for first in range(0, len(missing), processes.groups):
            turn = missing[first : first + processes.groups]
            rows: list[dict[str, Any]] = []
            for part in turn[processes.group : processes.group + 1]:
                found = evaluator.score(sampler, part)
                accepted, names = evaluator.accepted(found), evaluator.rewards.names
                if processes.leads:
                    rows += _rows(found, accepted, sampler, names, samples, output, recipe.sampler.fps)
            rows = processes.collect(rows)
            scores.add(rows)
            if processes.is_main:
                print(f"{sampler.upper()}: {places[turn[-1]].stop} of {len(prompts)} prompts", flush=True)
        every = [row["scores"].values() for row in scores.rows if row["sampler"] == sampler]
        evaluator.rewards.check_dropped(torch.tensor([[math.nan if s is None else s for s in one] for one in every]).T)
    table = summary([row for row in scores.rows if row["sampler"] in settings.samplers], by)
    text = f"{recipe.name}, {loaded}\n\n{table_text(table)}\n"
    if processes.is_main:
        write_text(output / "summary.json", json.dumps({"weights": loaded, "table": table}, indent=1))
        write_text(output / "table.md", text)
    processes.accelerator.end_training()
    return text if processes.is_main else None
