"""Training steps on this machine beside the same steps in plain PyTorch.

    python benchmarks/pytorch.py --torch-python /path/to/python   some 15 minutes on 2 cores
    python benchmarks/pytorch.py --seconds 1 --rounds 1           a quick look

PyTorch is no dependency of this library: without `--torch-python` it is looked for beside it.
Networks, sizes of batches and images, optimisers and threads are the same; weight decay and
augmentation are left out. The sides take turns, every other round backwards, each in a process of
its own, on every Keras backend that is named and installed. PyTorch runs `pytorch_loop.py`:
channels last, bfloat16 by `torch.autocast`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from cifar_lib import benchmark, recipes, runs

LOOP = Path(__file__).with_name("pytorch_loop.py")
BATCH_SIZES = {"seed": 128, "airbench": 512, "speedrun": 512}
STEPS = [
    {"name": name, "pixels": pixels, "precision": precision, "batch_size": BATCH_SIZES[name]}
    for name, pixels in (
        ("seed", 32),
        ("airbench", 32),
        ("speedrun", 32),
        ("speedrun", 24),
        ("speedrun", 20),
    )
    for precision in ("bfloat16", "float32")
]


class PyTorch:
    """`pytorch_loop.py` in a process of its own; `about` is what it says of itself."""

    def __init__(self, python: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, LOOP, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def measure(self, step: dict, seconds: float) -> list[float]:
        self.process.stdin.write(json.dumps(step | {"seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> object:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"PyTorch's process ended with code {self.process.wait()}.")
        return json.loads(line)


def recipe(step: dict) -> recipes.Recipe:
    """The same step as a recipe."""
    name = step["name"]
    return recipes.Recipe(
        model=name,
        augmentation="none",
        optimizer="rmsprop" if name == "seed" else "sgd",
        batch_size=step["batch_size"],
        precision=step["precision"],
        epochs=1,
        image_sizes=(step["pixels"],) if name in recipes.RESIZABLE else None,
    )


def sizes() -> dict[str, dict[str, int]]:
    """What `pytorch_loop.size` counts, of this library's networks. For a backend's process."""
    from cifar_lib import models

    tables = {name: models.summary(models.build(name)) for name in BATCH_SIZES}
    columns = ("parameters", "multiply_adds")
    return {name: {c: int(table[c].sum()) for c in columns} for name, table in tables.items()}


def has_torch(python: str) -> bool:
    """Whether an interpreter finds PyTorch."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        return subprocess.run([python, "-c", find]).returncode == 0
    except OSError as error:
        raise SystemExit(f"--torch-python is {python}, which does not run: {error}.") from None


def measure(
    torch: PyTorch, processes: benchmark.Processes, seconds: float, rounds: int
) -> list[dict]:
    """A row for each step and side, with the images per second of each round."""
    sides = ["PyTorch", *processes.processes]
    rates = {(number, side): [] for number in range(len(STEPS)) for side in sides}
    for round_number in range(rounds):
        for number, side in list(rates)[:: 1 if round_number % 2 == 0 else -1]:
            step = STEPS[number]
            if side == "PyTorch":
                taken = torch.measure(step, seconds)
            else:
                steps = processes.ask(side, benchmark.measure, recipe(step), seconds)
                if steps is None:
                    continue
                taken = [trained for _, trained in steps[benchmark.WARM_UP_STEPS :]]
            rate = step["batch_size"] / statistics.median(taken)
            rates[number, side].append(round(rate, 1))
            print(
                f"{round_number + 1}  {step['name']:<9}{step['pixels']} pixels  "
                f"{step['precision']:<9} {side:<11}{rate:8.1f} images/s",
                flush=True,
            )
    return [
        {
            "network": STEPS[number]["name"],
            "precision": STEPS[number]["precision"],
            "pixels": STEPS[number]["pixels"],
            "batch_size": STEPS[number]["batch_size"],
            "side": side,
            "images_per_second": statistics.median(measured),
            "lowest": min(measured),
            "highest": max(measured),
            "rounds": measured,
        }
        for (number, side), measured in rates.items()
        if side not in processes.failures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--backends", nargs="+", default=["tensorflow"], choices=benchmark.BACKENDS, help="of Keras"
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="an interpreter that has PyTorch"
    )
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    if options.seconds <= 0 or options.rounds < 1:
        parser.error("--seconds must be above 0 and --rounds at least 1")
    if not has_torch(options.torch_python):
        print(
            f"Skipped: {options.torch_python} has no PyTorch, so nothing is compared with it"
            + (f", and {options.out} stays as it is" if options.out else "")
            + ". Make an environment for it (python3 -m venv torchenv; torchenv/bin/pip install "
            "torch --index-url https://download.pytorch.org/whl/cpu) and give --torch-python "
            "torchenv/bin/python."
        )
        return

    with benchmark.Processes(options.backends) as processes:
        environments = {b: processes.ask(b, benchmark.describe) for b in processes.processes}
        ours = [processes.ask(backend, sizes) for backend in processes.processes]
        environments = {b: environments[b] for b in environments if environments[b]}
        if not environments:
            raise SystemExit(f"No backend of Keras could be measured: {processes.failures}")
        threads = next(iter(environments.values()))["threads"]
        torch = PyTorch(options.torch_python, threads)
        for counted in filter(None, ours):
            if counted != torch.about["networks"]:
                raise SystemExit(f"The networks differ: {counted}, {torch.about['networks']}")
        rows = measure(torch, processes, options.seconds, options.rounds)
        torch.close()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"seconds": options.seconds, "environments": environments}
        content |= {"pytorch": torch.about, "failures": processes.failures, "throughput": rows}
        runs.write_json(options.out, content)


if __name__ == "__main__":
    main()
