"""What a checkpoint costs: seconds of writing, of its checksums and of reading, and host memory above what was held.

    python -m bench.checkpoint [--mb 1024] [--processes 2]

A made-up model of `--mb` of weights with AdamW's states and a moving average, four times as much, is saved and restored
as the trainer does it: in one process, or in several under FSDP2, each with its own shards (gloo).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

ROW = 4096  # of a layer, which has 64 MiB


def anonymous() -> float:
    """MB of this process's own memory, without what it maps of files."""
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon")]
    return int(line.split()[1]) / 1e3


@contextmanager
def measured(what: str, found: dict[str, str], size: float) -> Iterator[None]:
    """Seconds, seconds of processors, and the most memory above what was held."""
    peak, done = [before := anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, used = time.perf_counter(), time.process_time()
    yield
    wall, used = time.perf_counter() - wall, time.process_time() - used
    done.set()
    watcher.join()
    found[what] = f"{wall:7.2f} s {used:7.2f} CPU s {size / wall:8.0f} MB/s {max(peak) - before:8.0f} MB more"


def work(folder: Path, megabytes: int) -> dict[str, str]:
    """Saves and restores once; what each took."""
    from dancegrpo_fast.files import CHUNK, checksum, sha256
    from dancegrpo_fast.processes import Processes
    from dancegrpo_fast.recipe import TrainSettings
    from dancegrpo_fast.run.folder import RunDirectory
    from dancegrpo_fast.train.ema import MovingAverage
    from dancegrpo_fast.train.optimizer import Optimizer
    from dancegrpo_fast.train.state import State

    processes = Processes("no")
    layers = max(1, round(megabytes * 1e6 / (4 * ROW * ROW)))
    model = processes.prepare(nn.Sequential(*(nn.Linear(ROW, ROW, bias=False) for _ in range(layers))))
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, TrainSettings(1, 1, 2, 1), keep_gradients=False)
    optimizer.step(changed=False, learning_rate=0.0)
    average = MovingAverage(parameters, optimizer.weights, 0.5)
    identity = {"model": {"files": {}, "vae_in_tiles": False}, "gradient_sync": "update"}
    state = State(identity, processes, optimizer, average)
    directory, found = RunDirectory(folder), dict[str, str]()
    size = 16e-6 * sum(one.numel() for one in parameters.values())
    processes.collect([0])
    with measured("save", found, size):
        state.save(directory, 1, 1)
    processes.collect([0])
    made = folder / "checkpoints" / "000001"
    with measured("restore", found, size):
        state.restore(made, (), ())
    if processes.count == 1:
        files = sorted(made.rglob("*.safetensors"))
        with measured("its CRC-32, one thread", found, size):
            for path in files:
                for start in range(0, path.stat().st_size, CHUNK):
                    checksum(path, start)
        with measured("SHA-256, one thread", found, size):
            for path in files:
                sha256(path)
    return found


def main() -> None:
    """Prints a line for each measure and process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="of weights in float32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    given = parser.parse_args()
    if "RANK" in os.environ or given.processes == 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        folder = Path(tempfile.mkdtemp(dir=given.folder)) if given.processes == 1 else given.folder
        try:
            found = work(folder, given.mb)
        finally:
            if given.processes == 1:
                shutil.rmtree(folder)
        index = int(os.environ.get("RANK", "0"))
        print("".join(f"process {index}  {what:<24}{numbers}\n" for what, numbers in found.items()), end="", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        shared = {"WORLD_SIZE": str(given.processes), "LOCAL_WORLD_SIZE": str(given.processes)}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "ACCELERATE_USE_FSDP": "true"}
        shared |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        shared |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.checkpoint", "--mb", str(given.mb), "--folder", made]
        command += ["--processes", str(given.processes)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(given.processes)]
        running: list[Any] = [subprocess.Popen(command, env=os.environ | shared | rank) for rank in ranks]
        sys.exit(max(one.wait() for one in running))


if __name__ == "__main__":
    main()
