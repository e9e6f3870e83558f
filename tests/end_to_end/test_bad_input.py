"""What users get wrong: one message that names the value and the remedy, exit status 1, and nothing lost."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.end_to_end.conftest import SETTINGS, Main, lalia, refused


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder for a test's own files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    return folder


# Recipes and overrides


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("pretain.steps=5", ["unknown key 'pretain'", "did you mean 'pretrain'?"]),
        ("pretrain.step=5", ["unknown key 'pretrain.step'", "did you mean 'pretrain.steps'?"]),
        (
            "pretrain.optimizer.matrix_lerning_rate=1",
            ["unknown key", "did you mean 'pretrain.optimizer.matrix_learning_rate'?"],
        ),
        ("pretrain.zzz=5", ["unknown key 'pretrain.zzz'", "known keys here:", "batch_size"]),
        ("data.validation_fraction=2", ["data.validation_fraction = 2", "less than 0.5"]),
        ("data.validation_fraction=nan", ["data.validation_fraction = nan", "finite"]),
        ("tokenizer.vocab_size=7", ["tokenizer.vocab_size = 7", "greater than or equal to 320"]),
        ("tokenizer.vocab_size=1000", ["tokenizer.vocab_size = 1000", "take 960 or 1024"]),
        ("pretrain.steps=0", ["pretrain.steps = 0", "greater than 0"]),
        ("pretrain.steps=true", ["pretrain.steps = True", "expected a number"]),
        ("pretrain.seed=1_000_000_000_000_000_000_000", ["pretrain.seed", "less than"]),
        ("pretrain.steps=many", ["pretrain.steps = 'many'", "integer"]),
        ("pretrain.budget=soon", ["pretrain.budget = 'soon'", "not a time", "'6 minutes'"]),
        ("pretrain.budget=-1 minutes", ["'-1 minutes'", "not a time"]),
        ("pretrain.budget=0 minutes", ["'0 minutes'", "not a time"]),
        ("finetune.budget=6 parsecs", ["finetune.budget = '6 parsecs'", "not a time"]),
        ("model.hidden_size=33", ["model.hidden_size = 33", "multiple of 32"]),
        ("model.head_dim=24", ["hidden_size = 32", "must be a multiple of model.head_dim = 24"]),
        ("model.num_key_value_heads=3", ["num_attention_heads = 1", "num_key_value_heads = 3"]),
        ("model.family=gpt5", ["model.family = 'gpt5'", "'qwen3'"]),
        ("pretrain.precision=int3", ["pretrain.precision = 'int3'", "'float32'"]),
        ("name=../elsewhere", ["name = '../elsewhere'", "pattern"]),
        ("pretrain.steps", ["'pretrain.steps'", "section.key=value"]),
        ("=5", ["'=5'", "section.key=value"]),
        ("pretrain..steps=5", ["'pretrain..steps=5'", "section.key=value"]),
        ("name.first=5", ["'name' is a value, not a section"]),
        ("data.license=\udcff", ["not valid Unicode"]),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_made(
    main: Main, corpus: Path, override: str, parts: list[str]
) -> None:
    answer = main("run", str(corpus), *SETTINGS, override)
    refused(answer, *parts)
    assert not Path("runs").exists()


def test_all_problems_come_in_one_message(main: Main, corpus: Path) -> None:
    refused(main("run", str(corpus), "pretrain.steps=0", "tokenizer.vocab_size=7", "zzz=1"), "steps", "vocab", "zzz")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"[pretrain\nsteps = 5", ["is not valid TOML", "line 1"]),
        (b"name = 'caf\xe9'", ["is not UTF-8 text", "byte 11"]),
        (b"pretrain = 5", ["pretrain = 5"]),
        (b"[pretrain]\nsteps = 5\nsteps = 6", ["is not valid TOML"]),
    ],
)
def test_a_recipe_that_cannot_be_read(main: Main, content: bytes, parts: list[str]) -> None:
    Path("mine.toml").write_bytes(content)
    refused(main("run", "mine.toml"), "mine.toml", *parts)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("shakespere", ["did you mean 'shakespeare'?", "Known recipes:", "smoke"]),
        ("recipes/shakespere.toml", ["did you mean 'shakespeare'?"]),
        ("qqqq", ["no recipe, file or folder 'qqqq'", "Known recipes:"]),
        ("missing.txt", ["no recipe, file or folder 'missing.txt'"]),
        ("x" * 5000, ["File name too long"]),
    ],
)
def test_a_source_that_does_not_exist(main: Main, source: str, parts: list[str]) -> None:
    refused(main("run", source), *parts)


def test_two_sources_are_refused(main: Main, corpus: Path) -> None:
    refused(main("run", str(corpus), str(corpus)), "only one recipe, folder or file")


# Data


def test_data_path_that_is_missing(main: Main, finished_run: Path, tmp_path: Path) -> None:
    refused(main("run", "own-text", "data.path=nowhere", *SETTINGS), "data.path 'nowhere' does not exist")
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    refused(main("run", str(run), "data.path=nowhere"), "does not exist")
    assert main("run", str(run)).code == 0  # the mistake did not replace the run's own recipe


def test_own_text_without_a_path(main: Main) -> None:
    refused(main("run", "own-text"), "set data.path to a file or folder")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({}, ["holds no .txt, .md, .jsonl, .parquet file", "it is empty"]),
        ({"a.pdf": b"%PDF", "b": b"x"}, ["holds no", "1 of unknown kind (.pdf)", "(no suffix)"]),
        ({"latin.txt": b"caf\xe9 " * 999}, ["latin.txt is not valid UTF-8", "byte 0xe9 at byte 3", "iconv"]),
        ({"binary.txt": b"ab\0\1\2" * 999}, ["binary.txt is binary", "NUL at byte 2", 'data.on_bad_file="skip"']),
        ({"rows.jsonl": b'{"text": "a"}\n{"text": '}, ["rows.jsonl line 2 is not valid JSON"]),
        ({"rows.jsonl": b'{"txt": "a"}\n'}, ["rows.jsonl line 1", "rename 'txt' to \"text\""]),
        ({"rows.jsonl": b"[1, 2]\n"}, ["rows.jsonl line 1 holds a list", "expected an object"]),
        ({"table.parquet": b"PAR1 no table"}, ["table.parquet is not a readable Parquet file"]),
        ({"empty.txt": b" \n"}, ["no usable text", "add texts"]),
        ({"one.txt": b"Too little text to learn from. " * 3}, ["bytes of text are left", "add more text"]),
        ({"one.txt": b"A line that differs. " * 1000}, ["only one document", "data.document_bytes="]),
    ],
)
def test_data_that_cannot_be_learned_from(main: Main, texts: Path, files: dict[str, bytes], parts: list[str]) -> None:
    for name, content in files.items():
        (texts / name).write_bytes(content)
    refused(main("collect", str(texts)), *parts)
    assert not Path("runs/texts/documents").exists()


def test_a_file_of_unknown_kind(main: Main) -> None:
    Path("book.pdf").write_bytes(b"%PDF")
    refused(main("run", "book.pdf"), "book.pdf' is not one of", ".txt", "convert it")


def test_a_name_that_is_not_utf8(main: Main, texts: Path) -> None:
    bad = texts / "caf\udce9"
    bad.mkdir()
    (bad / "a.txt").write_text("words " * 999, encoding="utf-8")
    refused(main("collect", str(bad)), "not valid Unicode", "rename")


@pytest.mark.parametrize("name", ['with "quotes" and \\', "B\u00fccher", "a=b", "tab\there"])
def test_names_that_toml_or_a_run_folder_could_not_hold_as_they_are(
    main: Main, texts: Path, name: str, corpus: Path
) -> None:
    shutil.copytree(corpus, texts / name)
    answer = main("collect", str(texts / name), "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["documents"]["documents"] == 16
    assert main("collect", json.loads(answer.out)["run"]).code == 0  # the recipe in the run folder reads back


def test_text_too_little_for_the_vocabulary(main: Main, texts: Path) -> None:
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"{number} the same few words again " * 99, encoding="utf-8")
    message = refused(main("tokenize", str(texts), "tokenizer.vocab_size=4096"), "tokenizer.vocab_size = 4096")
    assert "give more text" in message
    assert Path("runs/texts/documents/train.parquet").exists()  # what was made stays


def test_text_shorter_than_one_batch(main: Main, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lalia.planning.speed.measure_step", lambda *arguments: 0.01)
    answer = main("pretrain", str(corpus), *SETTINGS, "pretrain.sequence_length=2048", "pretrain.batch_size=64")
    refused(answer, "but a batch takes 64", "set pretrain.batch_size to", "shorten pretrain.sequence_length")
    # So nearly one batch that only packing can tell.
    answer = main("pretrain", str(corpus), *SETTINGS, "pretrain.sequence_length=2048", "pretrain.batch_size=32")
    refused(answer, "but a batch takes 32", "set batch_size to")


def test_a_budget_too_small_for_any_model(main: Main, corpus: Path) -> None:
    settings = ["tokenizer.vocab_size=384", "pretrain.sequence_length=16", "pretrain.batch_size=1"]
    answer = main("plan", str(corpus), *settings, "pretrain.budget=0.001 seconds")
    refused(answer, "too small for any model", "set pretrain.budget = '")


def test_a_plan_needs_a_budget_or_steps_and_not_both(main: Main, corpus: Path) -> None:
    refused(main("plan", str(corpus), "--minutes", "1", "--budget", "1M tokens"), "leave out one of them")
    refused(main("plan", str(corpus), *SETTINGS, "--minutes", "1"), "--minutes has no effect", "pretrain.steps = 60")
    refused(main("plan", str(corpus), "--minutes", "-1"), "not a time")
    refused(main("plan", str(corpus), "--minutes", "nan"), "not a time")


def test_context_shorter_than_the_training_rows(main: Main, corpus: Path) -> None:
    answer = main("pretrain", str(corpus), *SETTINGS, "model.max_position_embeddings=16")
    refused(answer, "max_position_embeddings", "sequence_length")


# Models, prompts and sampling


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_model_that_is_not_there(main: Main, finished_run: Path, verb: str) -> None:
    refused(main(verb, "runs/none", stdin="Hello\n"), "there is no folder runs/none")
    refused(main(verb, str(finished_run / "bsae"), stdin="Hello\n"), "did you mean", "base")
    refused(main(verb, str(finished_run / "recipe.toml"), stdin="Hello\n"), "is a file")
    refused(main(verb, str(finished_run / "documents"), stdin="Hello\n"), "has no config.json")


SAMPLING = [
    (["--temperature", "-1"], "temperature = -1.0"),
    (["--temperature", "nan"], "temperature = nan"),
    (["--temperature", "inf"], "temperature = inf"),
    (["--top-p", "0"], "top_p = 0.0"),
    (["--top-p", "1.5"], "top_p = 1.5"),
    (["--top-k", "-1"], "top_k = -1"),
    (["--min-p", "2"], "min_p = 2.0"),
    (["--repetition-penalty", "0"], "repetition_penalty = 0.0"),
    (["--max-tokens", "0"], "max_tokens = 0"),
    (["--max-tokens", "5000"], "set max_tokens to"),
]


@pytest.mark.parametrize(("options", "part"), SAMPLING)
def test_sampling_out_of_range(main: Main, finished_run: Path, options: list[str], part: str) -> None:
    refused(main("generate", str(finished_run), "The river", *options), part)
    if part != "set max_tokens to":
        refused(main("chat", str(finished_run), *options, stdin="Hello\n"), part)
        refused(main("chat", str(finished_run), *options, "--json", stdin="Hello\n"), part)


def test_a_prompt_longer_than_the_context(main: Main, finished_run: Path) -> None:
    refused(main("generate", str(finished_run), "winter " * 500), "tokens", "context", "shorten the prompt")
    refused(main("generate", str(finished_run), "-", stdin="winter " * 500), "shorten the prompt")
    answer = main("chat", str(finished_run), "--json", stdin="winter " * 500 + "\n")
    refused(answer, "tokens", "context")


def test_a_prompt_of_nothing_starts_a_document(main: Main, finished_run: Path) -> None:
    answer = main("generate", str(finished_run), "", "--seed", "1", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["token_ids"]
    assert main("generate", str(finished_run), "-", "--seed", "1", "--json").out == answer.out


def test_the_engine_refuses_no_tokens_at_all(finished_run: Path) -> None:
    from lalia import load
    from lalia.errors import UserError
    from lalia.inference.sampling import SamplingParams

    model = load(finished_run / "base")
    with pytest.raises(UserError, match="at least one token"):
        model.engine.submit([], SamplingParams())


def test_a_prompt_that_is_not_unicode(main: Main, finished_run: Path) -> None:
    refused(main("generate", str(finished_run), "half \ud83d"), "surrogate")


def test_standard_input_that_is_not_utf8(finished_run: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    for arguments in (["generate", str(finished_run), "-"], ["chat", str(finished_run), "--json"]):
        monkeypatch.setattr(io, "StringIO", lambda _: io.TextIOWrapper(io.BytesIO(b"caf\xe9 \n"), encoding="utf-8"))
        answer = main(*arguments)
        refused(answer, "standard input is not UTF-8")
    assert sys.stdin is not sys.__stdin__


# Serving and usage


def test_serve_on_a_port_in_use(main: Main, finished_run: Path) -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(main("serve", str(finished_run), "--port", str(port)), f"port {port}", "in use", "--port")


def test_serve_without_its_extra(main: Main, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("lalia.serving", "fastapi"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused(main("serve", str(finished_run)), "serving needs fastapi", 'pip install "lalia[serve]"')


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["rum"], "No such command 'rum'"),
        (["run", "--dry"], "No such option"),
        (["generate"], "Missing argument"),
        (["generate", "m", "--temperature", "warm"], "--temperature"),
        (["serve", "m", "--port", "99999"], "65535"),
        (["plan", "--minutes"], "requires an argument"),
    ],
)
def test_usage_errors_are_typers_own(main: Main, arguments: list[str], part: str) -> None:
    answer = main(*arguments)
    assert answer.code == 2
    assert part in answer.err
    assert "Traceback" not in answer.err


def test_messages_as_a_user_sees_them(tmp_path: Path) -> None:
    """The same in a process of its own: status, streams and no traceback."""
    wrong = lalia("run", "shakespere", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("lalia: no recipe")
    assert len(wrong.stderr.splitlines()) == 1
    unknown = lalia("run", "--nope", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr
