"""The command line: `python -m cifar_lib`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from cifar_lib import ROOT, recipes

EXAMPLES = """\
examples:
  python -m cifar_lib demo                                 all of it, small
  python -m cifar_lib data                                 find, download and verify CIFAR-100
  python -m cifar_lib train quick                          a few minutes' training
  python -m cifar_lib train seed --epochs 10 --seed 1      a recipe with some choices changed
  python -m cifar_lib range-test seed --batch-size 128     suggest a learning rate
  python -m cifar_lib runs                                 what was trained
  python -m cifar_lib evaluate                             test the newest run again
  python -m cifar_lib predict cat.jpg --card card.png      classify a picture of your own
  python -m cifar_lib report                               pages from all finished runs
  python -m cifar_lib sweep studies/learning_rate.yaml     calibrate by many runs
  python -m cifar_lib benchmark fast --seconds 10          how fast this machine trains

A run that was interrupted continues when the same command is given again.

exit codes: 0 done, 1 the run failed, 2 usage or recipe, 3 data, 130 interrupted
"""

RECIPES_FIRST = f"""\
recipes: {", ".join(recipes.RECIPES)}
They come before options that take several values.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options.command(options)
    except KeyboardInterrupt:
        again = "measure again" if options.command is _benchmark else "continue"
        print(
            f"\nInterrupted. What is finished is kept: give the same command to {again}.",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return code
    return 0


def _exit_code(error: Exception) -> int | None:
    if isinstance(error, recipes.RecipeError):
        return 2
    from cifar_lib import data, runs

    if isinstance(error, data.DataError):
        return 3
    if isinstance(error, runs.RunError | OSError):
        return 1
    from cifar_lib import reports

    return 1 if isinstance(error, reports.NotebookError | reports.ReportError) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_lib",
        description="CIFAR-100 with a convolutional network, from the data to the report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: typing.Callable, help: str, **settings: str):
        added = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        added.set_defaults(command=command)
        return added

    data = add("data", _data, "find (or download) a data set, verify it and say what is in it")
    data.add_argument("--dataset", default="cifar100", choices=recipes.DATASETS)
    data.add_argument("--no-download", action="store_true", help="fail if it is not on the machine")

    train = add(
        "train",
        _train,
        "train and test a recipe's network, or continue an interrupted run",
        epilog=RECIPES_FIRST,
    )
    train.add_argument("--run-name", help="the run folder's name; by default made from the recipe")
    _add_recipe(train)

    range_test = add(
        "range-test",
        _range_test,
        "train briefly while the learning rate rises, draw the loss and suggest a rate",
        epilog=RECIPES_FIRST,
    )
    for name, kind, what in (
        ("--steps", int, "batches to train on, by default 300"),
        ("--lowest", float, "the learning rate of the first step, by default 1e-6"),
        ("--highest", float, "that of the last step, by default 1"),
    ):
        range_test.add_argument(name, type=kind, metavar=kind.__name__.upper(), help=what)
    _add_recipe(range_test)

    evaluate = add("evaluate", _evaluate, "test a run's network, or a published one, again")
    _add_run(evaluate, "run", "the newest")
    evaluate.add_argument("--split", default="test", choices=("test", "validation"))
    evaluate.add_argument("--flip", action="store_true", help="average with the mirror images")

    predict = add("predict", _predict, "classify image files of any size and format")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _add_run(predict, "--run", "the best published network answers, else the newest run")
    predict.add_argument("--card", type=Path, metavar="PNG", help="draw the predictions there")

    report = add("report", _report, "make pages of runs, in a folder that opens from disk")
    report.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="by default all finished and tested runs of the newest one's data set",
    )
    _add_runs_dir(report)
    report.add_argument("--out", type=Path, help="by default the folder report in --runs-dir")
    report.add_argument(
        "--fresh",
        action="store_true",
        help="execute every notebook again, also those that would give the same",
    )

    _add_runs_dir(add("runs", _runs, "list the runs"))

    demo = add("demo", _demo, "do all of it small: data, a short training, pages")
    _add_runs_dir(demo)

    sweep = add(
        "sweep",
        _sweep,
        "run the trials of calibration studies, on this machine or a Dask cluster",
        epilog="The studies come before options that take several values.",
    )
    sweep.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="a YAML file")
    sweep.add_argument(
        "--studies-dir",
        type=lambda text: Path(text).absolute(),
        default=ROOT / "runs" / "studies",
        help="the folder of the studies' folders",
    )
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, as tcp://host:8786")
    sweep.add_argument(
        "--resources",
        nargs="+",
        type=_resource,
        default=[],
        metavar="NAME=NUMBER",
        help="what a worker must have for a trial, as GPU=1",
    )
    sweep.add_argument(
        "--take-over",
        action="store_true",
        help="go on where another process, which is gone, has left off",
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="list the trials and estimate their time"
    )

    benchmark = add(
        "benchmark",
        _benchmark,
        "measure how fast this machine trains the recipes, on each backend that is installed",
        epilog=RECIPES_FIRST,
    )
    benchmark.add_argument(
        "names", nargs="*", metavar="RECIPE", help="by default all that differ in speed"
    )
    for name, settings, what in (
        ("--seconds", {"type": float, "metavar": "FLOAT"}, "of each measurement, by default 5"),
        ("--rounds", {"type": int, "metavar": "INT"}, "how often each is measured, by default 3"),
        ("--backends", {"nargs": "+", "metavar": "BACKEND"}, "by default tensorflow jax torch"),
    ):
        benchmark.add_argument(name, help=what, **settings)
    benchmark.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "benchmark",
        metavar="FOLDER",
        help="of the table and its picture",
    )

    reference = add(
        "reference",
        _reference,
        "make results/, weights/, figures/, reports/ and README's tables again, which takes hours",
    )
    _add_runs_dir(reference)
    reference.add_argument(
        "--pages", action="store_true", help="train nothing: make figures and pages of results/"
    )
    return parser


def _add_runs_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir",
        type=lambda text: Path(text).absolute(),
        default=ROOT / "runs",
        help="the folder of the run folders",
    )


def _add_run(parser: argparse.ArgumentParser, name: str, default: str) -> None:
    nargs = {} if name.startswith("-") else {"nargs": "?"}
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(name, metavar="RUN", help=f"a run's name; by default {default}", **nargs)
    chosen.add_argument("--weights", metavar="NAME", help="a published network's name")
    _add_runs_dir(parser)
    parser.add_argument(
        "--weights-dir",
        type=lambda text: Path(text).absolute(),
        default=ROOT / "weights",
        help="the folder of the published networks",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe's name")
    _add_runs_dir(parser)
    choices = parser.add_argument_group(
        "choices that replace the recipe's", "`none` takes one back that may be left out"
    )
    for field, hint in typing.get_type_hints(recipes.Recipe).items():
        if field != "name":
            known = ", ".join(recipes.NAMES.get(field, ())) or None
            choices.add_argument(f"--{field.replace('_', '-')}", **_option(hint), help=known)


def _recipe(options: argparse.Namespace) -> recipes.Recipe:
    fields = {field.name for field in dataclasses.fields(recipes.Recipe)} - {"name"}
    chosen = {field: getattr(options, field) for field in fields}
    chosen = {
        field: recipes.NONE if value == [recipes.NONE] else value
        for field, value in chosen.items()
        if value is not None
    }
    return recipes.get(options.recipe, **chosen)


def _option(hint: object) -> dict:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)

    def settings(kind: type, metavar: str) -> dict:
        def convert(text: str) -> object:
            if text == recipes.NONE and type(None) in kinds:
                return text
            if kind is bool:
                return bool(("false", "true").index(text.lower()))  # bool() of any text is true
            return kind(text)

        convert.__name__ = kind.__name__  # which argparse names in its messages
        return {"type": convert, "metavar": metavar}

    if tuple[str, ...] in kinds:
        return {"nargs": "+", "metavar": "CLASS"}
    if tuple[int, ...] in kinds:
        return {"nargs": "+", **settings(int, "PIXELS")}
    return settings(kinds[0], kinds[0].__name__.upper())


def _data(options: argparse.Namespace) -> None:
    from cifar_lib import data

    dataset = data.load(options.dataset, download=not options.no_download)
    if not dataset.synthetic and (folder := data.find()):
        data.verify(folder)
        print(f"folder        {folder}")
    for file, digest in dataset.digests.items():
        print(f"{file:<13} SHA-256 {digest}")
    print(f"data set      {dataset.title}")
    print(f"images        {len(dataset.train):,} training, {len(dataset.test):,} test")
    print(f"classes       {len(dataset.fine_names)} in {len(dataset.coarse_names)} superclasses")
    print(f"array cache   {data.cache_folder()}")


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    run_dir = options.runs_dir / (options.run_name or recipe.run_name)
    from cifar_lib import data

    dataset = data.load(recipe.dataset)
    from cifar_lib import training

    run = training.train(recipe, run_dir, dataset=dataset)
    split = "test" if "test" in run.metrics else "validation"
    print(f"{run.name}, {split} images of {dataset.title}")
    _print_metrics(run.metrics[split])
    print(run.path)


def _range_test(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from cifar_lib import workflows

    chosen = {name: getattr(options, name) for name in ("lowest", "highest", "steps")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    path, suggestion = workflows.range_test(recipe, options.runs_dir, **chosen)
    print(f"suggested learning rate  {suggestion:.3g}")
    print(path, path.with_suffix(".png"), sep="\n")


def _evaluate(options: argparse.Namespace) -> None:
    from cifar_lib import data, evaluation, runs, weights

    if options.weights:
        network = weights.load(options.weights, options.weights_dir)
    else:
        [network] = runs.finished(options.runs_dir, options.run and [options.run])
    dataset = data.load(network.recipe.dataset)
    split = getattr(data.make_splits(dataset, **network.recipe.split_choices), options.split)
    if split is None:
        raise recipes.RecipeError(
            f"{network.name} has no validation images: its protocol is "
            f"{network.recipe.protocol!r}. Use --split test."
        )
    if not len(split):
        raise recipes.RecipeError(
            f"{network.name} has no test images: its test_size is 0. Use --split validation."
        )
    model = network.model if options.weights else network.load_model()
    probabilities = evaluation.predict(model, split.images, flip=options.flip)
    print(f"{network.name}, {options.split} images of {dataset.title}")
    _print_metrics(evaluation.evaluate(probabilities, split.fine_labels, dataset.superclass_of))


def _predict(options: argparse.Namespace) -> None:
    import numpy as np

    from cifar_lib import data, evaluation, figures, runs, weights

    images = np.stack([data.read_image(path) for path in options.images])
    if options.weights or (not options.run and weights.index(options.weights_dir)):
        network = weights.load(options.weights, options.weights_dir)
        model, kind = network.model, "published network"
    else:
        [network] = runs.finished(options.runs_dir, options.run and [options.run])
        model, kind = network.load_model(), "run"
    # Without the data set itself: who has a network alone can use it.
    names = data.class_names(network.recipe.dataset)
    probabilities = evaluation.predict(model, images)
    print(f"{kind} {network.name}")
    for path, row in zip(options.images, probabilities, strict=True):
        best = row.argsort()[::-1][:5]
        print(path, *(f"{names[i]} {row[i]:.1%}" for i in best), sep="\n  ")
    if options.card:
        labels = [path.name for path in options.images]
        cards = figures.prediction_cards(
            images, [None] * len(images), probabilities, names, network.name, labels
        )
        cards.savefig(options.card)
        print(options.card)


def _report(options: argparse.Namespace) -> None:
    from cifar_lib import runs, workflows

    tested = [run for run in runs.find(options.runs_dir) if run.finished and run.tested]
    names = options.runs or [
        run.name for run in tested if run.recipe.dataset == tested[-1].recipe.dataset
    ]
    chosen = runs.finished(options.runs_dir, names, tested=True)
    index = workflows.report(
        chosen,
        (options.out or options.runs_dir / "report").absolute(),
        executed_dir=options.runs_dir / "executed",
        output_dir=options.runs_dir / "figures",
        tables_dir=options.runs_dir / "tables",
        studies_dir=options.runs_dir / "studies",
        fresh=options.fresh,
    )
    print(index)


def _runs(options: argparse.Namespace) -> None:
    from cifar_lib import runs

    found = runs.find(options.runs_dir)
    if not found:
        print(f"There is no run in {options.runs_dir}.")
        return
    width = max(len(run.name) for run in found)
    print(f"{'run':<{width}}  state        epochs     data       test accuracy")
    for run in found:
        history = run.path / "history.csv"
        epochs = f"{len(run.history) if history.exists() else 0}/{run.recipe.epochs}"
        tested = run.finished and run.tested
        accuracy = f"{run.metrics['test']['accuracy']:.2%}" if tested else ""
        print(
            f"{run.name:<{width}}  {run.state:<12} {epochs:<10} {run.recipe.dataset:<10} {accuracy}"
        )


def _demo(options: argparse.Namespace) -> None:
    from cifar_lib import workflows

    print(workflows.demo(options.runs_dir))


def _benchmark(options: argparse.Namespace) -> None:
    from cifar_lib import benchmark

    chosen = {name: getattr(options, name) for name in ("seconds", "rounds", "backends")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    table = benchmark.run(options.out, options.names, **chosen)
    whole = "{:,.0f}".format
    shown = {
        "image_size": ("pixels", str),
        "images_per_second": ("images/s", whole),
        "trained_images_per_second": ("without feeding", whole),
        "feeding_share": ("feeding", "{:.1%}".format),
        "seconds_per_epoch": ("s an epoch", whole),
        "compile_seconds": ("s to compile", whole),
    }
    table = table[["recipe", "backend", "precision", *shown]]
    table = table.rename(columns={name: title for name, (title, _) in shown.items()})
    print("", table.to_string(index=False, formatters=dict(shown.values())), "", sep="\n")
    print(*(options.out / f"benchmark.{kind}" for kind in ("csv", "json", "png")), sep="\n")


def _reference(options: argparse.Namespace) -> None:
    from cifar_lib import workflows

    make = workflows.pages if options.pages else workflows.reference
    print(make(options.runs_dir))


def _resource(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, as GPU=1") from None


def _sweep(options: argparse.Namespace) -> None:
    from cifar_lib import studies

    chosen = [studies.load(path) for path in options.studies]
    from cifar_lib import calibration, sweeps

    for study in chosen:
        if options.dry_run:
            sweeps.dry_run(study, options.studies_dir)
            continue
        folder = sweeps.run(
            study,
            options.studies_dir,
            scheduler=options.scheduler,
            resources=dict(options.resources),
            take_over=options.take_over,
        )
        print(calibration.conclusion(calibration.read(folder)))
        print(folder)


def _print_metrics(metrics: dict[str, float]) -> None:
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    print(f"images                {metrics['images']:,}")
    print(
        f"accuracy              {metrics['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})"
    )
    print(f"loss                  {metrics['loss']:.4f}")
    for name in ("top5_accuracy", "superclass_accuracy", "expected_calibration_error"):
        print(f"{name.replace('_', ' '):<28}{metrics[name]:.2%}")


if __name__ == "__main__":
    sys.exit(main())
