"""The command line and the Python API as documented: verbs, options, output for people and for programs."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lalia
from lalia.devices import peak_memory_bytes, reset_peak_memory
from lalia.recipe import Recipe, load_recipe, to_toml
from lalia.stages import STAGES
from tests.end_to_end.conftest import ROOT, SETTINGS, Main, command, environment
from tests.end_to_end.conftest import lalia as run_command

VERBS = (
    "run",
    "collect",
    "tokenize",
    "pretrain",
    "finetune",
    "evaluate",
    "plan",
    "generate",
    "chat",
    "serve",
    "doctor",
)
HEAVY = ("torch", "transformers", "pyarrow", "numpy", "tokenizers", "fastapi", "rich", "lalia.recipe")
"""Not pydantic: Typer 0.29 takes it for checking options. lalia.recipe is where our own use of it begins."""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["generate", "--help"]])
def test_help_is_quick_because_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, lalia.cli\n"
        "sys.argv[0] = 'lalia'\n"
        "try:\n    lalia.cli.main()\n"
        "except SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        f"print(sorted(sys.modules.keys() & set({HEAVY!r})), file=sys.stderr)\n"
    )
    done = python(code, *arguments)
    assert done.stderr == "[]\n"
    assert done.stdout


def test_the_check_above_sees_a_heavy_import() -> None:
    done = python(f"import sys, lalia.data.documents\nprint(sorted(sys.modules.keys() & set({HEAVY!r})))")
    assert "pyarrow" in done.stdout


def test_help_lists_every_verb(main: Main) -> None:
    answer = main("--help")
    assert answer.code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} +[A-Z]", answer.out, re.MULTILINE), verb
        assert main(verb, "--help").code == 0
    assert main().code == 2  # no verb: the same help, but nothing was done


def test_version(main: Main) -> None:
    assert main("--version").out == f"{lalia.__version__}\n"


def test_python_m_lalia() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lalia", "--version"], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{lalia.__version__}\n")


# Overrides and recipes


def test_overrides_take_the_type_of_their_setting() -> None:
    recipe = load_recipe(
        "shakespeare",
        [
            "name=an-experiment",
            "pretrain.steps=100",
            "pretrain.checkpoint_seconds=3",
            "pretrain.budget=90 seconds",
            'finetune.budget="2 minutes"',
            "finetune.enabled=false",
            "pretrain.optimizer.betas=[0.8, 0.9]",
            "pretrain.optimizer.matrix_learning_rate=1e-2",
            "model.tie_word_embeddings=true",
            "data.license = CC BY-SA 4.0",
            "evaluate.max_bytes=1_000",
        ],
    )
    assert recipe.name == "an-experiment"
    assert (recipe.pretrain.steps, type(recipe.pretrain.steps)) == (100, int)
    assert (recipe.pretrain.checkpoint_seconds, type(recipe.pretrain.checkpoint_seconds)) == (3.0, float)
    assert (recipe.pretrain.budget, recipe.finetune.budget) == ("90 seconds", "2 minutes")
    assert recipe.finetune.enabled is False
    assert recipe.pretrain.optimizer.betas == (0.8, 0.9)
    assert recipe.pretrain.optimizer.matrix_learning_rate == 0.01
    assert recipe.model.tie_word_embeddings is True
    assert recipe.data.license.strip() == "CC BY-SA 4.0"
    assert recipe.evaluate.max_bytes == 1000
    assert load_recipe("shakespeare", ["pretrain.seed=1", "pretrain.seed=7"]).pretrain.seed == 7  # the last one counts


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "recipes").glob("*.toml")])
def test_recipes_that_come_with_lalia_load_by_name_and_by_path(name: str) -> None:
    overrides = ["data.path=somewhere"] if name == "own-text" else []
    assert load_recipe(name, overrides) == load_recipe(ROOT / "recipes" / f"{name}.toml", overrides)
    assert load_recipe(name, overrides).name == name


ODD_TEXTS = (
    "plain",
    "with \"quotes\" and 'others'",
    "back\\slash \\u0041 \\",
    "tab\tnewline\nreturn\rnull\0escape\x1bdelete\x7f",
    "# no comment = [no table]",
    '"""',
    "\u00fcber \u4f60\u597d \U0001f600 \u2028 \x85 \ufeff",
    "1e5",
    "true",
    " spaces ",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives_toml(text: str) -> None:
    recipe = Recipe.parse({"data": {"license": text, "path": text}})
    assert Recipe.parse(tomllib.loads(to_toml(recipe.model_dump(mode="json")))) == recipe


def test_any_recipe_survives_toml() -> None:
    rng = random.Random(0)

    def text() -> str:
        pools = ("abc \t\n\"'\\=[]#.", "\u00e9\u4f60\U0001f600\u2028\x00\x1f\x7f\x85")
        return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 12)))

    def number() -> float:
        return rng.choice([rng.random(), 10.0 ** rng.randint(-300, 0), 1 / 3])

    for _ in range(300):
        values: dict[str, Any] = {
            "name": rng.choice(["a", "a.b-c_d", "7"]),
            "data": {"path": text(), "license": text(), "validation_fraction": 0.001 + 0.4 * rng.random()},
            "model": {
                "hidden_size": rng.choice([None, 32, 640]),
                "tie_word_embeddings": rng.choice([None, True, False]),
            },
            "pretrain": {
                "budget": rng.choice(["300M tokens", "1.5 hours"]),
                "steps": rng.choice([None, 1, 10**12]),
                "checkpoint_seconds": number(),
                "seed": rng.randint(-(2**40), 2**40),
                "optimizer": {"matrix_learning_rate": number(), "betas": [number(), number()]},
            },
            "evaluate": {"max_bytes": rng.choice([None, 5]), "baselines": rng.random() < 0.5},
        }
        recipe = Recipe.parse(values)
        assert Recipe.parse(tomllib.loads(to_toml(recipe.model_dump(mode="json")))) == recipe


def test_dry_run_prints_a_recipe_that_loads_back(main: Main, corpus: Path) -> None:
    answer = main("run", str(corpus), *SETTINGS, 'data.license="odd" \\ \' # text', "--dry-run")
    assert answer.code == 0
    assert not Path("runs").exists()
    Path("printed.toml").write_text(answer.out, encoding="utf-8")
    recipe = load_recipe("printed.toml")
    assert recipe.data.path == str(corpus)
    assert recipe.data.license == '"odd" \\ \' # text'
    for stage in STAGES:
        assert f"# {stage.name}: make (not made yet)" in answer.out
    again = main("run", "printed.toml", "--dry-run")
    assert again.out == answer.out


# Output for programs


def test_json_is_all_there_is_on_standard_output(main: Main, finished_run: Path) -> None:
    run = str(finished_run)
    for arguments, stdin in (
        (["run", run, "--json"], ""),
        (["run", run, "--dry-run", "--json"], ""),
        (["collect", run, "--json"], ""),
        (["tokenize", run, "--json"], ""),
        (["pretrain", run, "--json"], ""),
        (["finetune", run, "--json"], ""),
        (["evaluate", run, "--json"], ""),
        (["plan", run, "--json"], ""),
        (["generate", run, "The", "--max-tokens", "5", "--logprobs", "2", "--json"], ""),
        (["chat", run, "--json", "--max-tokens", "5"], "Hello\nWho are you?\n"),
        (["doctor", "--json"], ""),
    ):
        answer = main(*arguments, stdin=stdin)
        assert answer.code == 0, (arguments, answer.err)
        assert answer.err == "", arguments
        json.loads(answer.out)


def test_json_of_stages_and_of_a_run(main: Main, corpus: Path, tmp_path: Path) -> None:
    """Also while work is done, not only when all is done already."""
    answer = main("tokenize", str(corpus), *SETTINGS, "--run", str(tmp_path / "run"), "--json")
    assert (answer.code, answer.err) == (0, "")
    results = json.loads(answer.out)
    assert list(results) == ["run", "documents", "tokens"]
    assert results["run"] == str(tmp_path / "run")
    assert results["tokens"]["train"]["num_tokens"] > 10_000


def test_the_peak_memory_of_a_stage_is_its_own(main: Main, corpus: Path, tmp_path: Path) -> None:
    if not reset_peak_memory():
        pytest.skip("this system counts from the beginning of the process")
    block = b"1" * 2**30  # an earlier stage that needs much, more than the imports of a first test
    before = peak_memory_bytes()
    del block
    answer = main("pretrain", str(corpus), *SETTINGS, "--run", str(tmp_path / "run"), "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["base"]["peak_memory_bytes"] < before - 256 * 2**20
    planned = json.loads((tmp_path / "run" / "plan" / "plan.json").read_text())["predicted"]["memory_bytes"]
    assert planned < before - 256 * 2**20
    # And where the plan, which starts counting for its own measurement, had been made before.
    shutil.rmtree(tmp_path / "run" / "base")
    block = b"1" * 2**30
    before = peak_memory_bytes()
    del block
    answer = main("pretrain", str(corpus), *SETTINGS, "--run", str(tmp_path / "run"), "--json")
    assert json.loads(answer.out)["base"]["peak_memory_bytes"] < before - 256 * 2**20


def test_json_of_generate_and_chat(main: Main, finished_run: Path) -> None:
    options = ["--max-tokens", "6", "--seed", "3", "--json"]
    answer = json.loads(main("generate", str(finished_run), "The river", *options, "--logprobs", "2").out)
    assert answer["prompt"] == "The river"
    assert answer["finish_reason"] in ("length", "stop")
    assert 1 <= len(answer["token_ids"]) == len(answer["logprobs"]) <= 6
    for entry in answer["logprobs"]:
        assert set(entry) == {"token_id", "text", "logprob", "alternatives"}
        assert len(entry["alternatives"]) == 2
        assert entry["logprob"] <= 0
    assert "logprobs" not in json.loads(main("generate", str(finished_run), "The river", *options).out)
    talk = json.loads(main("chat", str(finished_run), *options, "--system", "Be brief.", stdin="Hello\nBye\n").out)
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]


def test_generate_prints_prompt_and_continuation(main: Main, finished_run: Path) -> None:
    one = main("generate", str(finished_run), "The river", "--seed", "3", "--max-tokens", "6")
    same = json.loads(
        main("generate", str(finished_run), "The river", "--seed", "3", "--max-tokens", "6", "--json").out
    )
    other = main("generate", str(finished_run), "The river", "--seed", "4", "--max-tokens", "6")
    assert one.out == f"The river{same['text']}\n"
    assert one.out != other.out
    stopped = main("generate", str(finished_run), "The", "--temperature", "0", "--stop", "e", "--stop", "a").out
    assert not set(stopped.removeprefix("The")) & {"e", "a"}
    assert main("generate", str(finished_run / "chat"), "The", "--seed", "1").code == 0  # a model folder, not a run


def test_default_lengths_fit_a_small_context(main: Main, finished_run: Path) -> None:
    """The model's context is 64 tokens, less than the usual 200."""
    assert main("generate", str(finished_run), "The river " * 5).code == 0
    assert main("chat", str(finished_run), stdin="Hello\n" * 8).code == 0


def test_chat_with_lines_from_a_pipe(main: Main, finished_run: Path) -> None:
    answer = main("chat", str(finished_run), "--max-tokens", "5", stdin="Hello\nBye\n\nnot read\n")
    assert answer.code == 0
    assert answer.out.count("you> ") == 2
    assert answer.out.count("chat> ") == 2
    assert "not read" not in answer.out


def test_chat_says_when_turns_no_longer_fit(main: Main, finished_run: Path) -> None:
    answer = main("chat", str(finished_run), "--max-tokens", "20", stdin="The winter garden by the river\n" * 4)
    assert answer.code == 0
    assert "earlier turns no longer fit the context of 64 tokens" in answer.out


# Planning and checking


def test_plan_gives_values_with_reasons_and_what_to_expect(
    main: Main, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_seconds(shape: Any, rows: int, length: int, precision: str, steps: int, parts: int, *_: Any) -> float:
        return shape.flops_per_token(length) * rows * parts * length / 5e10

    monkeypatch.setattr("lalia.planning.speed.measure_step", step_seconds)
    precision = "pretrain.precision=float32"  # "auto" measures, so its reason varies
    answer = main("plan", str(corpus), "--minutes", "1", precision, "--json")
    assert answer.code == 0, answer.err
    made = json.loads(answer.out)
    names = {
        "threads",
        "precision",
        "sequence_length",
        "batch_size",
        "steps",
        "tokens",
        "epochs",
        "family",
        "hidden_size",
    }
    names |= {"num_hidden_layers", "parameters", "vocab_size", "matrix_learning_rate"}
    assert made["values"].keys() >= names
    assert all(entry.keys() == {"value", "reason"} and entry["reason"] for entry in made["values"].values())
    keys = {
        "seconds",
        "seconds_interval",
        "tokens_per_second",
        "memory_bytes",
        "flops",
        "extrapolation",
        "bits_per_byte",
        "bits_per_byte_interval",
        "seconds_per_step",
    }
    assert made["predicted"].keys() == keys
    assert 0 < made["predicted"]["seconds"] < 50  # the corpus is small, and would be learnt by heart
    assert "less than the budget" in made["values"]["steps"]["reason"]
    more = json.loads(main("plan", str(corpus), "--minutes", "10", precision, "--json").out)
    assert more["predicted"]["bits_per_byte"] <= made["predicted"]["bits_per_byte"]
    assert not Path("runs").exists()
    shown = main("plan", str(corpus), "--minutes", "1", precision).out
    for name, entry in made["values"].items():
        assert entry["reason"] in shown, name
    assert "expected bits per byte" in shown


def test_plan_takes_the_tokens_of_a_run_only_if_they_are_the_asked_ones(main: Main, finished_run: Path) -> None:
    same = json.loads(main("plan", str(finished_run), "--json").out)
    assert same["values"]["epochs"]["reason"].startswith("over 3")
    assert "estimated" not in same["values"]["epochs"]["reason"]
    other = json.loads(main("plan", str(finished_run), "tokenizer.vocab_size=448", "--json").out)
    assert "estimated" in other["values"]["epochs"]["reason"]
    assert other["values"]["vocab_size"]["value"] == 448


def test_doctor(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    answer = main("doctor")
    assert answer.code == 0
    assert re.search(r"^ok    PyTorch: 2\.", answer.out, re.MULTILINE)
    assert {check["name"] for check in json.loads(main("doctor", "--json").out)} > {
        "Python",
        "PyTorch",
        "disk",
        "memory",
    }
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else find_spec(name, *a)
    )
    answer = main("doctor")
    assert answer.code == 0  # an extra is no need
    assert "note  extra serve: not installed" in answer.out
    assert 'pip install "lalia[serve]"' in answer.out


def test_doctor_fails_where_training_could_not_work(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lalia.doctor.memory_bytes", lambda: 2**30)
    answer = main("doctor")
    assert answer.code == 1
    assert "FIX   memory: 1.0 GiB" in answer.out
    assert answer.err == ""
    assert main("doctor", "--json").code == 1


# Stages on the user's own texts, and the Python API


@pytest.fixture
def mixed(corpus: Path, tmp_path: Path) -> Path:
    """The corpus as .txt, .md, .jsonl and .parquet, in folders, beside files of other kinds."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    for number, text in enumerate(texts[:5]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    for number, text in enumerate(texts[5:8]):
        (folder / "deeper" / f"{number}.md").write_text(f"# Title\n\n{text}", encoding="utf-8-sig")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "license": "CC0", "extra": 1}) + "\n" for text in texts[8:12]),
        encoding="utf-8",
    )
    pq.write_table(pa.table({"text": texts[12:], "id": [f"row {n}" for n in range(4)]}), folder / "table.parquet")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    return folder


def test_every_stage_verb_on_its_own(main: Main, mixed: Path, tmp_path: Path) -> None:
    run = Path("runs") / "mixed"
    verbs = ("collect", "tokenize", "pretrain", "finetune", "evaluate", "run")
    made = ("documents", "tokens", "base", "chat", "evaluation", "report")
    for index, (verb, stage) in enumerate(zip(verbs, made, strict=True)):
        answer = main(verb, str(mixed), *SETTINGS)
        assert answer.code == 0, answer.err
        assert (run / stage / "receipt.json").exists()
        assert not any((run / later).exists() for later in made[index + 1 :])
        for earlier in made[:index]:
            assert f"{earlier}: done" in answer.err
    card = json.loads((run / "documents" / "card.json").read_text())
    assert card["documents"] == 16
    assert sum(card["inputs"]["skipped"].values()) == 2
    assert (run / "report.html").exists()
    again = main("run", str(run))  # the run folder is enough to go on
    assert again.code == 0
    assert again.err.count("done (finished in") == len(STAGES)
    os.utime(mixed / "0.txt", (1, 1))  # a file that changed
    planned = json.loads(main("run", str(run), "--dry-run", "--json").out)["stages"]
    assert planned["documents"] == ["make", "made anew because files changed"]


def test_a_run_goes_on_from_elsewhere(main: Main, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's folder was named relative to where the run began."""
    assert main("collect", "mixed", *SETTINGS).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = main("tokenize", "../runs/mixed")
    assert answer.code == 0, answer.err
    assert "documents: done" in answer.err


def test_a_single_file(main: Main, corpus: Path) -> None:
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir()))
    Path("My Notes (2024).txt").write_text(text, encoding="utf-8")
    answer = main("collect", "My Notes (2024).txt", "data.document_bytes=5000", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["run"] == "runs/My-Notes--2024"
    assert json.loads(answer.out)["documents"]["documents"] > 8


def test_finetune_that_the_recipe_leaves_out(main: Main, corpus: Path) -> None:
    answer = main("finetune", str(corpus), *SETTINGS, "finetune.enabled=false")
    assert answer.code == 1
    assert "this recipe has no stage 'chat'; its stages are documents, tokens, plan, base, evaluation" in answer.err
    planned = json.loads(main("run", str(corpus), *SETTINGS, "finetune.enabled=false", "--dry-run", "--json").out)
    assert "chat" not in planned["stages"]


def test_python_api(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(f"name = 'mine'\n[data]\npath = '{corpus}'\n", encoding="utf-8")
    results = lalia.run("mine.toml", *SETTINGS, "evaluate.baselines=false", quiet=True)
    assert capfd.readouterr() == ("", "")
    assert list(results) == ["run", *(stage.name for stage in STAGES)]
    assert results["run"] == "runs/mine"
    assert results["base"]["steps"] == 60
    assert 0 < results["evaluation"]["bits_per_byte"]["base"] < 8
    model = lalia.load("runs/mine/chat")
    reply = model.chat("Hello", max_tokens=8, seed=1)
    assert "".join(model.chat("Hello", max_tokens=8, seed=1, stream=True)) == reply
    assert capfd.readouterr() == ("", "")
    lalia.run("mine.toml", *SETTINGS, "evaluate.baselines=false")
    said = capfd.readouterr()
    assert (said.out, said.err.count("done (finished in")) == ("", len(STAGES))
    with pytest.raises(lalia.errors.UserError, match="did you mean 'pretrain.steps'"):  # pyright: ignore[reportAttributeAccessIssue]
        lalia.run("mine.toml", "pretrain.step=1")
    with pytest.raises(lalia.errors.UserError, match="there is no folder"):  # pyright: ignore[reportAttributeAccessIssue]
        lalia.load("runs/none")
    folder = tmp_path / "copied"
    shutil.copytree("runs/mine/base", folder)
    shutil.rmtree("runs/mine")
    assert lalia.load(folder).generate("The", max_tokens=3, seed=1).token_ids  # a model folder stands on its own


def test_the_same_in_a_process_of_its_own(finished_run: Path, tmp_path: Path) -> None:
    done = run_command("run", str(finished_run), "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(json.loads(done.stdout)) == ["run", *(stage.name for stage in STAGES)]
    assert command("run")[1:3] == ["-m", "lalia.cli"]
