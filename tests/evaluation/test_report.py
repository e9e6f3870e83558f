"""The report: shows what the records say, nothing else, and nothing in them can act on the page."""

import json
from html.parser import HTMLParser

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.evaluation.records import read_metrics
from lalia.evaluation.report import write_report

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
BASELINES = [
    {"name": "uniform bytes", "bits_per_byte": 8.0, "how": "all equal"},
    {"name": "8-gram bytes", "bits_per_byte": 2.035, "how": "counted"},
    {"name": "xz -9e", "bits_per_byte": 2.303, "how": "compressed"},
]


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words, self.ids, self._style = [], [], [], [], False
        self.source = source
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.words.append(data)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def events(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path):
    """A run folder with every record."""
    run = tmp_path / "my-run"
    predicted = {"seconds": 100.0, "bits_per_byte": 2.0, "bits_per_byte_interval": [1.8, 2.2], "memory_bytes": 1e9}
    write(run / "recipe.toml", f'name = "my-run"\n# {NASTY}\n')
    write(run / "environment.json", {"python": "3.11.2", "commit": None, "memory_bytes": 25e9, "cpu": NASTY})
    plan = {
        "values": {"hidden_size": {"value": 384, "reason": NASTY}, "parameters": {"value": 12_300_000, "reason": ""}}
    }
    write(run / "plan" / "plan.json", {**plan, "predicted": predicted})
    counts = {f"documents_{kind}": 38 for kind in ("in", "changed", "cut", "dropped", "out")}
    rule = {**counts, "rule": "boilerplate", "what": "headers removed", "bytes_in": 5_318_858, "bytes_out": 5_300_858}
    card = {
        "source": "some plays",
        "splits": {"train": {"documents": 34, "bytes": 4_743_940}, "validation": {"documents": 4, "bytes": 574_918}},
        "funnel": [rule, {**rule, "what": NASTY}],
        "held_out": ["Hamlet", NASTY],
        "overlap": {"paragraph_characters": 200, "paragraphs": {"held_out": 624, "also_in_training": 7}},
    }
    write(run / "documents" / "card.json", card)
    comparison = {
        "ours": {"available": True, "vocab_size": 4096, "bytes_per_token": 2.843},
        "gpt2": {"available": False, "why": "vocab.bpe was not found"},
        "cl100k": {"available": True, "vocab_size": 100277, "bytes_per_token": 3.41},
    }
    write(
        run / "tokens" / "receipt.json", {"seconds": 4, "summary": {"comparison": comparison, "seconds": {"train": 3}}}
    )
    for stage in ("base", "chat"):
        rows = [{"event": "step", "step": i, "loss": 5 / i, "tokens": i, "seconds": 2.0 * i} for i in range(1, 20)]
        marks = [{"bits_per_byte": 3 - i, "sample": f"{NASTY} sample {stage} {i}"} for i in range(3)]
        rows += [{"event": "evaluation", "step": i, "seconds": 10.0 * i, **mark} for i, mark in enumerate(marks)]
        write(run / stage / "metrics.jsonl", events(*rows))
    summary = {"tokens": 13_107_200, "training_seconds": 110.0, "bits_per_byte": 2.1}
    write(run / "base" / "receipt.json", {"seconds": 120.0, "summary": summary, "identity": {"seconds": 5}})
    write(run / "chat" / "receipt.json", {"seconds": 60.0, "summary": {"training_seconds": 55.0}})
    write(run / "chat" / "config.json", {})
    turns = [{"role": "user", "content": NASTY}, {"role": "assistant", "content": "Ay, my lord", "ended": False}]
    results = {
        "bits_per_byte": {"base": 1.9, "chat": 2.1},
        "baselines": [*BASELINES, {"name": NASTY, "bits_per_byte": 3.0, "how": NASTY}],
        "samples": [{"prompt": NASTY, "text": NASTY}],
        "conversations": [turns],
        "turns_ended": {"ended": 3, "of": 4},
    }
    write(run / "evaluation" / "results.json", results)
    return run


def report(run):
    out = run / "report.html"
    write_report(run, out)
    return Page(out.read_text(encoding="utf-8"))


def change(run, **changes):
    path = run / "evaluation" / "results.json"
    write(path, {**json.loads(path.read_text()), **changes})


def test_every_section_is_there_and_says_what_the_records_say(run):
    page = report(run)
    assert page.ids == [
        *("score", "curves", "plan", "data", "tokens", "samples", "conversations", "use", "settings", "environment")
    ]
    for words in (
        "my-run",
        "language model of 12.3 million parameters, trained from nothing on text from some plays",
        "Training time, base model 1 min 40 s 1 min 50 s +10.0 %",
        "Bits per byte, base model 2.000 1.800 to 2.200 1.900 -5.0 %",
        "Peak memory, base model 1 GB not recorded",
        "3 min 4 s",  # all stages, by their receipts
        "Train 34 4.74 MB Validation 4 575 kB",
        "headers removed 38 38 38 38 18 kB",
        "Held out, never trained on: Hamlet;",
        "Of 624 held-out paragraphs of at least 200 characters, 7 also stand in the training text.",
        "this tokenizer 4,096 2.84",
        "GPT-2 is not shown: vocab.bpe was not found.",
        "sample base 2",
        "3 of 4 replies",
        "cut off at the length limit",
        "hidden_size 384",
        "Memory 25 GB",
        "best baseline, 8-gram bytes: 2.035",
        "step 3, 6 s: 1.667",
    ):
        assert words in page.text, words


def test_text_of_data_and_models_is_inert(run):
    page = report(run)
    assert page.text.count("<script>alert(1)</script>") > 10  # shown as text
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_check_for_inert_text_would_notice_a_script():
    assert "script" in Page(f"<p>{NASTY}</p>").tags


def test_nothing_is_loaded_from_anywhere(run):
    page = report(run)
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href", "srcset", "action", "xlink:href")]
    assert "url(" not in page.source and "@import" not in page.source
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_says_plainly_which_baseline_is_not_beaten(run):
    page = report(run)
    assert "the base model needs 1.900 bits for each byte. It beats all 4 baselines" in page.text
    assert "It does NOT beat 8-gram bytes (2.035); it beats the other 3" in page.text  # the assistant, at 2.1
    change(run, bits_per_byte={"base": 2.035}, baselines=BASELINES)
    page = report(run)  # a tie is not a win
    assert "It does NOT beat 8-gram bytes (2.035); it beats the other 2" in page.text
    assert "beats all" not in page.text
    change(run, bits_per_byte={"base": 9.0}, baselines=BASELINES)
    assert "It does NOT beat any of the 3 baselines: 8-gram bytes (2.035), xz" in report(run).text


def test_what_did_not_happen_is_left_out(run, tmp_path):
    full = report(run).text
    assert "Assistant" in full and "assistant" in full
    for path in (run / "chat").iterdir():
        path.unlink()
    (run / "chat").rmdir()
    change(run, bits_per_byte={"base": 1.9}, conversations=[], turns_ended=None)
    page = report(run)
    assert "ssistant" not in page.text and "conversations" not in page.ids and "use" not in page.ids
    alone = tmp_path / "only-recipe"
    write(alone / "recipe.toml", 'name = "only"')
    page = report(alone)
    assert page.ids == ["settings"]
    for invented in ("None", "nan", "undefined", "not recorded"):
        assert invented not in page.text


def test_a_base_model_is_used_as_one(run):
    write(run / "base" / "config.json", {})
    for path in (run / "chat").iterdir():
        path.unlink()
    text = report(run).text
    assert "lalia generate" in text and "lalia chat" not in text


def test_excerpts_are_called_excerpts(run):
    assert "before an excerpt" not in report(run).text
    rows = [
        {"event": "evaluation", "step": i, "seconds": i, "bits_per_byte": 3, "all_of_validation": i == 2}
        for i in (1, 2)
    ]
    write(run / "base" / "metrics.jsonl", events(*rows))
    assert "the last point is all of it, those before an excerpt" in report(run).text


def test_steps_logged_again_after_a_resume_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        events(*({"event": "step", "step": s, "loss": loss} for s, loss in [(2, 4), (3, 9), (1, 5), (3, 3)]))
    )
    metrics = read_metrics(path)
    assert metrics and [(e["step"], e["loss"]) for e in metrics.steps] == [(1, 5), (2, 4), (3, 3)]


def test_a_loss_that_is_not_finite_is_mentioned(run):
    rows = [{"event": "step", "step": i, "loss": float("nan") if i == 3 else 1.0, "seconds": i} for i in range(9)]
    write(run / "base" / "metrics.jsonl", events(*rows))
    assert "1 points without a finite loss are not drawn" in report(run).text


def test_damage_is_an_error_but_a_killed_run_is_not(run):
    metrics = run / "base" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"event": "st')
    assert "curves" in report(run).ids
    metrics.write_text('{"event": "st\n' + whole)
    with pytest.raises(CorruptFile, match="line 1"):
        report(run)
    metrics.write_text(whole)
    (run / "plan" / "plan.json").write_text("[]")
    with pytest.raises(CorruptFile, match=r"plan\.json"):
        report(run)


def test_an_empty_folder_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no records"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
