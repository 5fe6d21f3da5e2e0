"""Where the time of a training step goes on TensorFlow's CPU, and what `backend.py` saves of it.

    python benchmarks/operations.py                          some four minutes on 2 cores
    python benchmarks/operations.py --seconds 1 --rounds 1   a quick look

Two measurements. TensorFlow's profiler watches some steps of each network, on a batch of random
images; the times of operations on all threads are added up by kind. Operations that run side by
side slow each other, so that their shares say where work is, not what a step would save without
it. Then each operation that this library computes in its own way, beside Keras' own way, in turns:
every round measures each once, every other round backwards.
"""

import argparse
import functools
import logging
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar_lib import backend, benchmark, layers, optimizers, recipes, runs
from cifar_lib.backend import keras

BATCH_SIZES = {"seed": 128, "airbench": 512, "speedrun": 512}
WARM_UP_CALLS = 2

# The kinds of operations, each with what its events are called, "scope/operation:Type"; the first
# that fits is taken. The scope is that of the layer or the optimiser; `backend.convolution`'s own
# gradients have none.
KINDS = {
    "optimiser": r"^(muon|rm_sprop)(_\d+)?/",
    "input gradient": r"Conv2DBackpropInput$",
    "filter gradient": r"Conv2DBackpropFilter|^[^/]+:(_Mkl)?(MatMul|Pack|Reshape|StridedSlice)$",
    "convolution": r"Conv2D$",
    "matrix products": r"MatMul$",
    "batch normalisation": r"/batch_normalization|FusedBatchNorm",
    "pooling and its gradient": r"pooling",
    "activation and its gradient": r"activation|PartitionedCall$",
    "the rest": r"",
}

# Of the pairs, in images, pixels a side, channels, and the sides of a matrix that Muon moves.
BATCH_SIZE, SIDE, CHANNELS, MATRIX = 256, 15, 256, (9 * 512, 768)
FILTER_SIDES = (4, 7, 8, 15)

Pair = tuple[Callable[[], object], Callable[[], object]]


def recipe(network: str, precision: str, batch_size: int) -> recipes.Recipe:
    """A network's own recipe, on images of 32 pixels."""
    changes = {} if network == "seed" else {"model": network, "image_sizes": None}
    name = "seed" if network == "seed" else "accurate"
    return recipes.get(name, precision=precision, batch_size=batch_size, **changes)


def profiled(step: recipes.Recipe, seconds: float) -> tuple[list[float], dict[str, float]]:
    """The seconds of each of some steps, and those a step of each kind of operation."""
    import tensorflow as tf

    batches, model = benchmark.network(step)
    batch = batches[0]
    for _ in range(benchmark.WARM_UP_STEPS):
        model.train_on_batch(*batch)
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        while sum(steps) < seconds:
            began = time.perf_counter()
            model.train_on_batch(*batch)
            steps.append(time.perf_counter() - began)
        tf.profiler.experimental.stop()
        [path] = Path(folder).rglob("*.xplane.pb")
        totals = seconds_by_kind(path)
    return steps, {kind: total / len(steps) for kind, total in totals.items()}


def seconds_by_kind(path: Path) -> dict[str, float]:
    """The seconds of all operations in a profile of TensorFlow's, by kind."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    [plane] = [plane for plane in space.planes if plane.name == "/host:CPU"]
    seconds: Counter[str] = Counter()
    for event in (event for line in plane.lines for event in line.events):
        name = operation(plane, event)
        if re.fullmatch(r"[^:]*:\w+", name):
            kind = next(kind for kind, form in KINDS.items() if re.search(form, name))
            seconds[kind] += event.duration_ps / 1e12
    return {kind: seconds[kind] for kind in KINDS}


def operation(plane, event) -> str:
    """What an event of a profile is called, as in `KINDS`."""
    name = plane.event_metadata[event.metadata_id].name
    if name != "ExecutorState::ProcessAsync::Start":
        return name
    # A function that XLA compiled: the event's own data tell it from others.
    data = {plane.stat_metadata[stat.metadata_id].name: stat.ref_value for stat in event.stats}
    return f":{plane.stat_metadata[data['kernel_type']].name}"


def numbers(*shape: int, dtype: str):
    """Normal numbers, of one seed, in a type."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return keras.ops.cast(values, dtype)


def compiled(function: Callable, watched, upstream, *, forward: bool) -> Callable[[], object]:
    """The gradient of `watched` as one function of TensorFlow's, and with `forward` the outputs."""
    import tensorflow as tf

    @tf.function
    def run(watched, upstream):
        with tf.GradientTape() as tape:
            tape.watch(watched)
            outputs = function(watched)
        gradient = tape.gradient(outputs, watched, upstream)
        return (outputs, gradient) if forward else gradient

    return functools.partial(run, watched, upstream)


def pairs(dtype: str, batch_size: int) -> dict[str, Pair]:
    """Keras' own way and this library's of what it computes in its own way, by what it is."""
    import tensorflow as tf

    found = {}
    # At all sides, to show where they end to be the faster way.
    backend.MOST_PIXELS_FOR_PRODUCTS = max(FILTER_SIDES) ** 2
    kernel = numbers(3, 3, CHANNELS, CHANNELS, dtype=dtype)
    for side in FILTER_SIDES:
        maps = numbers(batch_size, side, side, CHANNELS, dtype=dtype)
        ways = (
            functools.partial(tf.nn.conv2d, maps, strides=1, padding="SAME"),
            functools.partial(backend.convolution, maps, padding="same"),
        )
        found[f"gradient of 3x3 filters, maps of {side} x {side} pixels"] = tuple(
            compiled(way, kernel, maps, forward=False) for way in ways
        )
    maps = numbers(batch_size, SIDE, SIDE, CHANNELS, dtype=dtype)
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    normalizations = [
        functools.partial(layer(dtype=policy), training=True)
        for layer in (keras.layers.BatchNormalization, layers.BatchNormalization)
    ]
    for what, ways, forward in (
        ("gradient of SiLU", (keras.ops.silu, layers.silu), False),
        ("ELU and its gradient", (keras.ops.elu, backend.elu), True),
        ("batch normalisation and its gradient", normalizations, True),
    ):
        found[what] = tuple(compiled(way, maps, maps, forward=forward) for way in ways)
    matrix = numbers(*MATRIX, dtype=dtype)
    ways = (keras.optimizers.Muon().zeropower_via_newtonschulz5, optimizers.orthogonalize)
    found["three Newton-Schulz steps of {} x {} weights".format(*MATRIX)] = tuple(
        functools.partial(tf.function(way), matrix, 3) for way in ways
    )
    return found


def compare(ways: dict[tuple[str, str], Pair], rounds: int) -> list[dict]:
    """A row for each of the pairs, with the milliseconds of every round."""
    for pair in ways.values():
        for way in pair:
            for _ in range(WARM_UP_CALLS):
                way()
    taken: dict[tuple, list[float]] = {(*key, side): [] for key in ways for side in (0, 1)}
    for number in range(rounds):
        for what, precision, side in list(taken)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            ways[what, precision][side]()
            milliseconds = 1000 * (time.perf_counter() - began)
            taken[what, precision, side].append(round(milliseconds, 3))
    rows = []
    for what, precision in ways:
        keras_own, ours = (taken[what, precision, side] for side in (0, 1))
        medians = statistics.median(keras_own), statistics.median(ours)
        rows.append(
            {
                "what": what,
                "precision": precision,
                "keras_milliseconds": medians[0],
                "milliseconds": medians[1],
                "times_faster": round(medians[0] / medians[1], 2),
                "keras_rounds": keras_own,
                "rounds": ours,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(BATCH_SIZES), choices=BATCH_SIZES, metavar="NETWORK"
    )
    parser.add_argument("--seconds", type=float, default=8, help="of the steps of each network")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each of a pair")
    parser.add_argument("--batch-size", type=int, help="of everything, for a look that is quick")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    if options.seconds <= 0 or options.rounds < 1:
        parser.error("--seconds must be above 0 and --rounds at least 1")
    if not backend.on_tensorflow_cpu():
        raise SystemExit("This is about TensorFlow on a CPU: leave KERAS_BACKEND out, and GPUs.")

    # That each of many networks has a step of its own is no mistake to warn of.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    precisions = list(dict.fromkeys((backend.resolve_precision("auto"), "float32")))
    steps, operations = [], []
    for network in options.networks:
        for precision in precisions:
            step = recipe(network, precision, options.batch_size or BATCH_SIZES[network])
            seconds, by_kind = profiled(step, options.seconds)
            median, total = statistics.median(seconds), sum(by_kind.values())
            what = {"network": network, "precision": precision, "batch_size": step.batch_size}
            measured = {"steps": len(seconds), "milliseconds": round(1000 * median, 1)}
            steps.append(what | measured | {"milliseconds_on_threads": round(1000 * total, 1)})
            print(f"{network}, {precision}: {1000 * median:,.0f} ms a step", flush=True)
            for kind, part in by_kind.items():
                share = part / total
                per_image = 1000 * median * share / step.batch_size
                row = {"milliseconds_per_image": round(per_image, 5), "share": round(share, 4)}
                operations.append(what | {"kind": kind} | row)
                print(f"  {kind:<28}{share:7.1%}", flush=True)
    ways = {
        (what, precision): pair
        for precision in precisions
        for what, pair in pairs(precision, options.batch_size or BATCH_SIZE).items()
    }
    compared = compare(ways, options.rounds)
    for row in compared:
        print(
            f"{row['precision']:<9} {row['what']:<50}{row['keras_milliseconds']:8.1f} ms, "
            f"ours {row['milliseconds']:.1f} ms"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": backend.describe(" and ".join(precisions)), "steps": steps}
        runs.write_json(options.out, content | {"operations": operations, "pairs": compared})


if __name__ == "__main__":
    main()
