"""The ladder of small runs behind the planner's scaling law: sizes x training times, on the demo's data.

    lalia tokenize recipes/shakespeare.toml
    python benchmarks/ladder.py --run runs/shakespeare
    python benchmarks/ladder.py --run runs/shakespeare --install

About 10 minutes on a quiet machine with the defaults. Each run is `lalia pretrain` in a folder of its own under
runs/ladder, with the tokens of --run, so one that was interrupted goes on, and `lalia plan --fit runs/ladder/*` reads
them too. Writes benchmarks/results/ladder.json and, with --install, the law that comes with Lalia
(src/lalia/planning/shakespeare.json). --quick makes tiny runs on the text of docs/ in under a minute, to see that the
script works.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from lalia.devices import use_threads
from lalia.model.shapes import ArchitectureConfig
from lalia.pipeline import load_run_recipe, run_recipe
from lalia.planning.ladder import fit_runs
from lalia.planning.rules import depth_of
from lalia.planning.speed import measure_step
from lalia.progress import Progress
from lalia.recipe import load_recipe, toml_value
from machine import REPOSITORY, describe, table, write_result

LAW = REPOSITORY / "src" / "lalia" / "planning" / "shakespeare.json"
MADE = ("documents", "tokens")


def small_tokens(folder: Path) -> Path:
    """A run folder with tokens of this repository's own pages, a few hundred kilobytes, made if it is not there."""
    settings = [
        f"data.path={toml_value(str(REPOSITORY / 'docs'))}",
        "data.document_bytes=2000",
        "tokenizer.vocab_size=512",
    ]
    run_recipe(load_recipe("own-text", settings), folder, "tokens", Progress(quiet=True))
    return folder


def branch(source: Path, folder: Path) -> Path:
    """A run folder that begins with the documents and tokens of another."""
    for name in MADE:
        if not (folder / name).exists():
            shutil.copytree(source / name, folder / name)
    if not (folder / "recipe.toml").exists():
        shutil.copy(source / "recipe.toml", folder / "recipe.toml")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shakespeare"), help="a run with tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="where the runs are made")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 30.0, 90.0])
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 128, 192, 256])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--install", action="store_true", help="make this the law that comes with Lalia")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.run, arguments.out = small_tokens(Path("runs/quick/pages")), Path("runs/quick/ladder")
        arguments.seconds, arguments.widths, arguments.length, arguments.batch = [0.2, 0.8], [32, 64, 96], 64, 4
        shutil.rmtree(arguments.out, ignore_errors=True)
    threads = use_threads()
    vocab_size = load_run_recipe(arguments.run).tokenizer.vocab_size
    folders = []
    for width in arguments.widths:
        layers = depth_of(width)
        shape = ArchitectureConfig(hidden_size=width, num_hidden_layers=layers).build(vocab_size, arguments.length)
        per_step = 0.01  # a quick look takes 20 and 80 steps, on however busy a machine
        if not arguments.quick:
            per_step = measure_step(shape, arguments.batch, arguments.length, arguments.precision, steps=5)
        for seconds in arguments.seconds:
            folder = arguments.out / f"width-{width}-seconds-{seconds:g}"
            if not (folder / "base" / "receipt.json").is_file():  # the steps of a finished one stay what they were
                settings = {
                    "model.hidden_size": width,
                    "model.num_hidden_layers": layers,
                    "pretrain.steps": max(10, round(seconds / per_step)),
                    "pretrain.sequence_length": arguments.length,
                    "pretrain.batch_size": arguments.batch,
                    "pretrain.precision": arguments.precision,
                    "pretrain.evaluations": 0,
                }
                branch(arguments.run, folder)
                recipe = load_run_recipe(folder, [f"{key}={value}" for key, value in settings.items()])
                run_recipe(recipe, folder, "base", Progress(quiet=True))
            folders.append(folder)
            print(f"width {width}, {seconds:g} s: done", flush=True)
    law, runs = fit_runs(folders)
    rows = [
        run.point._asdict() | {"name": folder.name, "flops": run.flops, "expected": law.bits_per_byte(*run.point[1:3])}
        for folder, run in zip(folders, runs, strict=True)
    ]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(law.constants())
    errors = [row["expected"] / row["bits_per_byte"] - 1 for row in rows]
    print(f"largest error on the runs it was fitted to: {max(map(abs, errors)):.2%}")
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("run", "out", "install")}
    result = {"machine": describe(threads), "settings": settings, "rows": rows, "law": law.constants()}
    write_result("ladder", result, arguments.quick)
    if arguments.install and not arguments.quick:
        points = tuple(point._replace(name=Path(point.name).name) for point in law.points)
        replace(law, source=f"{len(points)} runs of {arguments.run.name}", points=points).save(LAW)
        print(f"wrote {LAW.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
