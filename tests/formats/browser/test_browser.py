"""Exported models in a real browser: headless Chromium with onnxruntime-web computes what PyTorch does.

Needs playwright, Chromium (CHROMIUM, or on the PATH) and onnxruntime-web, which `ort_web` fetches through npm. What is
missing is said; in CI it is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.formats.convert import SAMPLE
from lalia.formats.hf_folder import load_model
from lalia.formats.onnx.export import export_onnx
from lalia.formats.onnx.page import PAGE, write_page
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from tests.formats.browser.server import ort_web, serving
from tests.formats.references import make_input, make_reference

playwright_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test in a browser")
pytest.importorskip("onnx", reason="pip install 'lalia[onnx]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="NOT TESTED in a browser: no Chromium (apt install it)"
    ),
]
SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
HARNESS = Path(__file__).parent / "harness.html"
MILLISECONDS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM is not None, "CI needs Chromium"
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The harness; afterwards nothing may have been logged, or fetched from elsewhere."""
    problems: list[str] = []
    requested: list[str] = []
    routes = {
        "/harness.html": HARNESS,
        "/onnx_model.js": PAGE / "onnx_model.js",
        "/ort/": ort_web(),
        "/": folder,
    }
    with serving(routes) as url:
        page = browser.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(f"{url}/harness.html")
        page.wait_for_function("window.ready")
        assert page.evaluate("crossOriginIsolated"), "without isolation there are no threads"
        yield page
        page.close()
        assert problems == []
        assert [found for found in requested if not found.startswith((url, "data:", "blob:"))] == []


def load(page: Any, model: Transformer, folder: Path, name: str, **options: Any) -> None:
    exported = export_onnx(model, folder / f"{name}.onnx", **options)
    files = dict(zip(("model", "data"), (f"/{path.name}" for path in exported.files), strict=False))
    page.evaluate("files => window.load(files)", files)


def greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids + found])))
        found.append(int(logits[0, -1].argmax()))
    return found


def ours(name: str, folder: Path) -> Transformer:
    make_reference(name).save_pretrained(folder / name)
    return load_model(folder / name)


@pytest.mark.parametrize("name", ["bert, pooled", "distilbert, encoder"])
def test_sentence_encoder(name: str, page: Any, folder: Path) -> None:
    model, ids = ours(name, folder), make_input(name)[0, :23]
    load(page, model, folder, "encoder", task="feature-extraction")
    got = torch.tensor(page.evaluate("ids => window.embed(ids)", ids.tolist()))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(ids[None])[0].mean(0), dim=0)
        other = torch.nn.functional.normalize(model(ids[None, :-1])[0].mean(0), dim=0)
    assert (got - expected).abs().max() < 1e-5
    assert (got - other).abs().max() > 1e-3  # negative control: one token fewer
    load(page, model, folder, "encoder8", task="feature-extraction", int8=True)
    got = torch.tensor(page.evaluate("ids => window.embed(ids)", ids.tolist()))
    assert 0.99 < torch.cosine_similarity(got, expected, dim=0) < 1 - 1e-7


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mixtral"])
def test_decoder_with_cache(name: str, page: Any, folder: Path) -> None:
    """Twenty greedy tokens, step by step with the cache, are those of PyTorch without one."""
    model, ids = ours(name, folder), make_input(name)[0, :11].tolist()
    load(page, model, folder, "decoder", max_inline_bytes=1000 if name == "qwen3" else 10**9)
    answer = page.evaluate("ids => window.generate(ids, 20)", ids)
    expected = greedy(model, ids, 20)
    assert answer["found"] == expected
    print(f"{name}: {answer['tokensPerSecond']:.0f} tokens/s")
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids])))[0, -1]
    assert (torch.tensor(page.evaluate("ids => window.logits(ids)", ids)) - logits).abs().max() < 1e-5
    # Negative controls: one token fewer, and a text that is no repetition of one token.
    assert (torch.tensor(page.evaluate("ids => window.logits(ids)", ids[:-1])) - logits).abs().max() > 1e-2
    assert name != "qwen3" or len(set(expected)) > 3
    load(page, model, folder, "decoder8", int8=True)
    got = torch.tensor(page.evaluate("ids => window.logits(ids)", ids))
    assert 1e-5 < (got - logits).pow(2).mean().sqrt() / logits.std() < 0.25


def test_the_page_for_people(browser: Any, tmp_path: Path) -> None:
    """index.html with a model beside it: choose a prompt, press, and read what PyTorch would have said."""
    tokenizer = train_tokenizer([SAMPLE], TokenizerConfig(vocab_size=320))
    settings = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 128}
    reference = make_reference("qwen3", **settings)
    reference.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    out = tmp_path / "out"
    export_onnx(model, out / "model.onnx")
    tokenizer.save(out)
    write_page(out, ["The ferry", "My sister asked"], max_tokens=12)
    shutil.copytree(ort_web(), out / "ort")
    problems: list[str] = []
    with serving({"/": out}) as url:
        page = browser.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{url}/index.html")
        page.locator("#go:enabled").wait_for()
        assert "MB, ready in" in page.locator("#facts").inner_text()
        page.locator("#prompt").select_option(label="My sister asked")
        page.locator("#go").click()
        page.get_by_text("12 tokens,").wait_for()
        got = page.locator("#text").text_content()
        page.close()
    ids = tokenizer.encode("My sister asked")
    content = b"".join(tokenizer.token_bytes(i) for i in greedy(model, ids, 12))
    assert got == "My sister asked" + content.decode("utf-8", errors="replace") and problems == []
