"""The command line: verbs that parse, call and print."""

import os
import sys
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lalia import __version__
from lalia.arguments import Json, Model, model_folder, print_json, standard_input
from lalia.errors import UserError
from lalia.model_verbs import app as model_verbs
from lalia.run_verbs import app as run_verbs

app = typer.Typer(
    name="lalia",
    help="Build a language model from nothing, see inside it, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as pretrain.steps=100")
]
Source = Annotated[
    str | None,
    typer.Argument(
        help="a recipe (path or name), a run folder, or your own file or folder of text", show_default=False
    ),
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="the run folder (default: runs/NAME)")]
MaxTokens = Annotated[int | None, typer.Option(help="most tokens to produce (default: some that fit the context)")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; higher is more varied")]
TopK = Annotated[int, typer.Option(help="sample among the k most probable tokens; 0 = all")]
TopP = Annotated[float, typer.Option(help="sample among the tokens that hold this probability")]
MinP = Annotated[float, typer.Option(help="leave out tokens less probable than this share of the best")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1 discourages repeating")]
Stop = Annotated[list[str] | None, typer.Option(help="stop before this text (may be given several times)")]
Seed = Annotated[int | None, typer.Option(help="same seed, same text")]
Quantized = Annotated[
    str | None,
    typer.Option("--quantize", help="int8 or int4 weights, or none (default: as the file has them)"),
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: Source = None,
    overrides: Overrides = None,
    folder: RunFolder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved recipe and what would be done")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe from raw text to an evaluated model; continue it if it was interrupted."""
    _run_until(None, recipe, overrides, folder, as_json, dry_run)


def _stage_verb(verb: str, what: str) -> None:
    def command(
        source: Source = None, overrides: Overrides = None, folder: RunFolder = None, as_json: Json = False
    ) -> None:
        from lalia.stages import VERBS

        _run_until(VERBS[verb], source, overrides, folder, as_json)

    command.__doc__ = f"{what} Stages before it that are not done yet are run first."
    app.command(name=verb)(command)


_stage_verb("collect", "Read, clean and split documents; write them and a data card.")
_stage_verb("tokenize", "Train the tokenizer and write token shards.")
_stage_verb("pretrain", "Train the base model.")
_stage_verb("finetune", "Teach the base model to talk.")


@app.command()
def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            help="a recipe (path or name), a run folder, or your own text; with --quantize a model", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    folder: RunFolder = None,
    quantize: Annotated[str | None, typer.Option(help="compare a model with itself in int8 or int4")] = None,
    text: Annotated[Path | None, typer.Option(help="what to compare on (default: the run's held-out text)")] = None,
    as_json: Json = False,
) -> None:
    """Measure the models on held-out text beside baselines. Stages before it that are not done yet are run first.

    With --quantize, measure what smaller weights cost one model.
    """
    if quantize is None:
        if text is not None:
            raise UserError("--text has an effect with --quantize only; give both, or leave it out")
        from lalia.stages import VERBS

        _run_until(VERBS["evaluate"], source, overrides, folder, as_json)
        return
    if source is None or overrides or folder is not None:
        raise UserError("--quantize takes one model: lalia evaluate MODEL --quantize int4 [--text FILE]")
    from lalia.evaluation.quantized import compare_quantized, held_out_texts, report

    path = model_folder(source, "chat")
    results = compare_quantized(path, held_out_texts(path, text), quantize)
    if as_json:
        print_json(results)
        return
    for line in report(results):
        print(line)


@app.command()
def plan(
    source: Source = None,
    overrides: Overrides = None,
    folder: RunFolder = None,
    minutes: Annotated[float | None, typer.Option(help="training time; same as pretrain.budget")] = None,
    budget: Annotated[str | None, typer.Option(help="such as '1e18 FLOPs', '300M tokens' or '5 dollars'")] = None,
    devices: Annotated[int | None, typer.Option(help="plan for so many devices")] = None,
    device: Annotated[
        str | None, typer.Option(help="plan for a device that is not here, such as 'NVIDIA H100'")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="fit a scaling law to finished runs: lalia plan --fit RUN ...")
    ] = False,
    ladder: Annotated[bool, typer.Option("--ladder", help="print the small runs to fit a law to")] = False,
    law: Annotated[Path | None, typer.Option(help="go by this law; with --fit, where to write it")] = None,
    as_json: Json = False,
) -> None:
    """Show what a budget gives on this machine or on others, and why."""
    from lalia.devices import process_rank
    from lalia.progress import Progress

    if minutes is not None and budget is not None:
        raise UserError("--minutes and --budget are both a budget; leave out one of them")
    overrides = list(overrides or [])
    asked = {
        "pretrain.budget": f'"{Decimal(str(minutes)):f} minutes"' if minutes is not None else budget,
        "plan.devices": devices,
        "plan.device": device,
        "plan.law": None if fit else law,
    }
    overrides += [f"{key}={value}" for key, value in asked.items() if value is not None]
    progress = Progress(quiet=True)
    if process_rank() > 0:  # one of those that torchrun started is enough
        return
    if fit:
        _fit(source, overrides, law, progress, as_json)
        return
    recipe, run_folder = _resolve(source, overrides, folder)
    if (minutes is not None or budget is not None) and recipe.pretrain.steps:
        raise UserError(
            f"{'--minutes' if budget is None else '--budget'} has no effect where the number of steps is fixed "
            f"(pretrain.steps = {recipe.pretrain.steps}); leave out one of them"
        )
    from lalia.pipeline import Run, stages_until, status
    from lalia.planner import facts_of_data, make_plan

    run = Run(run_folder, recipe, progress)
    tokenized = all(status(run, stage)[0] == "done" for stage in stages_until(recipe, "tokens"))
    facts = facts_of_data(recipe, run_folder if tokenized else None)
    if ladder:
        from lalia.scaling import plan_ladder

        result = plan_ladder(
            recipe,
            facts,
            source or recipe.name,
            overrides,
            run_folder.with_name(f"{recipe.name}-ladder"),
            progress,
        )
        if as_json:
            print_json(result)
        else:
            print("\n".join([f"# {len(result['rungs'])} runs, about {result['seconds']:,.0f} s", *result["commands"]]))
        return
    result = make_plan(recipe, facts, progress)
    if as_json:
        print_json(result)
        return
    _print_plan(result)


def _fit(source: str | None, arguments: list[str], law: Path | None, progress: Any, as_json: bool) -> None:
    """Without a key and a value, an argument is a run folder."""
    from lalia.scaling import fit_and_plan

    names = [source or "", *arguments]
    folders = [Path(name) for name in names if name and ("=" not in name or Path(name).exists())]
    if not folders:
        raise UserError(
            "--fit takes finished runs: lalia plan --fit RUN RUN ...; lalia plan --ladder prints some to make"
        )
    settings = [name for name in names if name and Path(name) not in folders]
    result, curve = fit_and_plan(folders, settings, law or folders[0].parent / "law.json", progress)
    if as_json:
        print_json(result)
        return
    for entry in result["runs"]:
        print(f"{entry['name']:<40} {entry['bits_per_byte']:.3f} bits per byte, by the law {entry['expected']:.3f}")
    print(
        "bits per byte = {floor:.4g} + {size:.4g} / N^{size_exponent:.3g} + {data:.4g} / D^{data_exponent:.3g}".format(
            **result["law"]
        )
    )
    print(curve)
    if result["plan"]:
        _print_plan(result["plan"])
    print(f"wrote {' and '.join(result['files'])}; lalia plan --law {result['files'][0]} goes by it")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    logprobs: Annotated[int | None, typer.Option(help="alternatives per token to report with --json")] = None,
    quantize: Quantized = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    text = standard_input() if prompt == "-" else prompt
    language_model = _load(model, "base", quantize)
    if max_tokens is None:
        max_tokens = max(1, min(200, language_model.max_length - len(language_model.encode(text))))
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    if as_json:
        result = language_model.generate(text, **sampling, logprobs=logprobs)
        print_json(
            {"prompt": text, "text": result.text, "finish_reason": result.finish_reason, "token_ids": result.token_ids}
            | ({"logprobs": _logprobs(result)} if logprobs is not None else {})
        )
        return
    pieces = language_model.stream(text, **sampling)
    sys.stdout.write(text)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def chat(
    model: Model = "runs/shakespeare/chat",
    system: Annotated[str | None, typer.Option(help="a system message to begin with")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    quantize: Quantized = None,
    as_json: Json = False,
) -> None:
    """Talk with a model; each line you type is a turn."""
    from lalia.conversation import converse, reply_tokens

    language_model = _load(model, "chat", quantize)
    sampling = {
        "max_tokens": reply_tokens(language_model.max_length) if max_tokens is None else max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    messages = converse(language_model, system, sampling, quiet=as_json)
    if as_json:
        print_json(messages)


@app.command()
def serve(
    model: Model = "runs/shakespeare/chat",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one", min=0, max=65535)] = 8000,
    allow_host: Annotated[list[str] | None, typer.Option(help="answer under this host name too")] = None,
    max_length: Annotated[int | None, typer.Option(help="longest sequence in tokens; default: the context")] = None,
    quantize: Quantized = None,
) -> None:
    """Serve a model: a chat page at / and an OpenAI-compatible API under /v1."""
    try:
        from lalia.serving.server import serve as serve_model
    except ModuleNotFoundError as error:
        raise UserError(f'serving needs {error.name}; install it with: pip install "lalia[serve]"') from None
    from lalia.formats.store import stored_name

    folder = model_folder(model, "chat")
    serve_model(
        folder,
        host=host,
        port=port,
        name=stored_name(folder),
        allowed_hosts=tuple(allow_host or ()),
        max_length=max_length,
        quantize=quantize,
    )


app.add_typer(run_verbs)
app.add_typer(model_verbs)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check Python, PyTorch, disk, memory and extras, and say what to do."""
    from lalia.doctor import examine

    checks = examine()
    if as_json:
        print_json(checks)
    else:
        for check in checks:
            print(
                f"{'ok  ' if check['ok'] else 'FIX ' if check['needed'] else 'note'}  {check['name']}: {check['found']}"
            )
            if check["remedy"]:
                print(f"      {check['remedy']}")
    if any(check["needed"] and not check["ok"] for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: user errors become one message and exit status 1, never a traceback."""
    code = 0
    try:
        code = app(standalone_mode=False)  # an exit code where a command left by typer.Exit
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except typer.Exit as leaving:
        code = leaving.exit_code
    except Exception as error:
        # Typer's own usage errors (unknown option, bad number) know how to print themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()  # pyright: ignore[reportAttributeAccessIssue]
            sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(error, OSError) and error.filename is not None:
            _fail(f"cannot use {str(error.filename)[:200]!r}: {error.strerror}")
        raise
    if code == STOPPED:
        _fail("stopped", code=STOPPED)
    sys.exit(code or 0)


STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"lalia: {message}", file=sys.stderr)
    sys.exit(code)


def _run_until(
    stage: str | None,
    source: str | None,
    overrides: list[str] | None,
    folder: Path | None,
    as_json: bool,
    dry_run: bool = False,
) -> None:
    from lalia.pipeline import Run, run_recipe, stages_until, status
    from lalia.progress import Progress

    recipe, run_folder = _resolve(source, overrides, folder)
    if dry_run:
        from lalia.recipe import to_toml

        run = Run(run_folder, recipe, Progress(quiet=True))
        states = {s.name: status(run, s) for s in stages_until(recipe, stage)}
        if as_json:
            print_json({"recipe": recipe.model_dump(mode="json"), "run": str(run_folder), "stages": states})
            return
        print(to_toml(recipe.model_dump(mode="json")))
        print(f"# run folder: {run_folder}")
        for name, (state, reason) in states.items():
            print(f"# {name}: {state} ({reason})")
        return
    try:
        results = run_recipe(recipe, run_folder, stage, Progress(quiet=as_json))
    except KeyboardInterrupt:
        _fail("stopped; the same command continues where it left off", code=STOPPED)
    if as_json:
        print_json(results)


def _resolve(source: str | None, overrides: list[str] | None, folder: Path | None) -> tuple[Any, Path]:
    """The recipe and run folder meant by a source (recipe, run folder or the user's own text) and overrides."""
    from lalia.pipeline import load_run_recipe
    from lalia.recipe import load_recipe, toml_value

    overrides = list(overrides or [])
    if source is not None and "=" in source and not Path(source).exists():
        overrides.insert(0, source)
        source = None
    path = Path(source).expanduser() if source else None
    if path and (path / "recipe.toml").is_file():
        folder, source, path = folder or path, None, None
    if source is None and folder and (folder / "recipe.toml").is_file():
        return load_run_recipe(folder, overrides), folder
    if path and path.exists() and path.suffix != ".toml":
        letters = (c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.resolve().stem)
        name = "".join(letters).strip(".-_") or "own-text"
        own = [f"data.path={toml_value(str(path.absolute()))}", f"name={toml_value(name)}"]
        recipe = load_recipe("own-text", own + overrides)
    else:
        recipe = load_recipe(source or "shakespeare", overrides)
    return recipe, folder or Path("runs") / recipe.name


def _load(model: str, stage: str, quantize: str | None) -> Any:
    from lalia.inference.language_model import load

    return load(model_folder(model, stage), quantize=quantize)


def _logprobs(result: Any) -> list[dict[str, Any]]:
    def entry(token: Any) -> dict[str, Any]:
        return {"token_id": token.token_id, "text": token.text, "logprob": token.logprob}

    return [
        entry(token) | {"alternatives": [entry(other) for other in others]}
        for token, others in zip(result.logprobs, result.alternatives, strict=True)
    ]


def _print_plan(result: dict[str, Any]) -> None:
    for name, entry in result["values"].items():
        value = entry["value"]
        if name == "parallel":
            value = " x ".join(f"{axis} {count}" for axis, count in value.items() if count > 1) or "none"
        shown = f"{value:,}" if isinstance(value, int) else "" if isinstance(value, dict) else str(value)
        print(f"{name.replace('_', ' '):<24} {shown:>12}   {entry['reason']}")
    predicted = result["predicted"]
    (low, high), (soon, late) = predicted["bits_per_byte_interval"], predicted["seconds_interval"]
    far = predicted["extrapolation"]
    doubt = f"; {far:,.0f} times as large as the law's largest run: fit your own (--ladder)" if far > 10 else ""
    rows = [
        (
            "time",
            f"{predicted['seconds']:,.0f} s",
            f"{soon:,.0f} to {late:,.0f} s; {predicted['tokens_per_second']:,} tokens/s",
        ),
        (
            "memory",
            f"{predicted['memory_bytes'] / 2**20:,.0f} MiB",
            "of a device: weights, optimizer, activations, checkpoint, runtime",
        ),
        ("computation", f"{predicted['flops']:.3g}", "FLOPs, attention without causal halving (docs/planning.md)"),
        ("bits per byte", f"{predicted['bits_per_byte']:.2f}", f"between {low:.2f} and {high:.2f}{doubt}"),
    ]
    if "energy_kwh" in predicted:
        rows.append(("energy", f"{predicted['energy_kwh']:,} kWh", "plan.watts x devices x time"))
    if "cost_dollars" in predicted:
        rows.append(("cost", f"{predicted['cost_dollars']:,.2f} $", "plan.price_per_hour x devices x time"))
    for name, value, reason in rows:
        print(f"{'expected ' + name:<24} {value:>12}   {reason}")


if __name__ == "__main__":
    main()
