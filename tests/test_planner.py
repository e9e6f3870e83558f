"""From a budget to a plan, on a machine whose speed the test decides."""

from typing import Any

import pytest

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.planner import WIDTHS, expected_bits_per_byte, make_plan, measure_step, training_bytes
from lalia.progress import Progress
from lalia.recipe import Recipe
from lalia.training.config import parse_budget

TRAIN_BYTES = 5_000_000
MANIFEST = {
    "vocab_size": 4096,
    "splits": {"train": {"num_bytes": TRAIN_BYTES, "num_tokens": 1_500_000, "num_documents": 40}},
}
FLOPS_PER_SECOND = 5e10


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """A machine of constant speed; the shapes that were measured on it."""
    shapes: list[ModelConfig] = []

    def step_seconds(shape: ModelConfig, rows: int, length: int, precision: str, steps: int) -> float:
        shapes.append(shape)
        return shape.flops_per_token(length) * rows * length / FLOPS_PER_SECOND

    monkeypatch.setattr("lalia.planner.measure_step", step_seconds)
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 16 * 2**30)
    return shapes


def plan(pretrain: dict[str, Any], manifest: dict[str, Any] = MANIFEST, **sections: Any) -> dict[str, Any]:
    recipe = Recipe.parse({"pretrain": {"precision": "float32", **pretrain}, **sections})
    return make_plan(recipe, manifest, Progress(quiet=True))


def values(made: dict[str, Any]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in made["values"].items()}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6 minutes", 360),
        ("1 minute", 60),
        ("90 s", 90),
        ("90s", 90),
        ("1.5 hours", 5400),
        (".5 h", 1800),
        ("2 days", 172_800),
        ("3 Min", 180),
        ("  10   SECONDS ", 10),
        ("5 mins", 300),
        ("0.001 seconds", 0.001),
    ],
)
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "6", "minutes", "-1 minutes", "0 minutes", "6 parsecs", "6 minutes 5", "1e3 s", "nan s", "inf s",
     "6,5 s", "1:30", "9" * 400 + " s"],
)  # fmt: skip
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match="is not a time; write for example '6 minutes'"):
        parse_budget(text)


def test_more_budget_gives_more_tokens_and_not_worse_quality(measured: list[ModelConfig]) -> None:
    made = [plan({"budget": f"{seconds} seconds"}) for seconds in (10, 30, 60, 180, 360, 1800, 7200)]
    tokens = [values(one)["tokens"] for one in made]
    quality = [one["predicted"]["bits_per_byte"] for one in made]
    widths = [values(one)["hidden_size"] for one in made]
    assert tokens == sorted(tokens)
    assert quality == sorted(quality, reverse=True)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert quality[-1] < quality[0]
    for one, seconds in zip(made, (10, 30, 60, 180, 360, 1800, 7200), strict=True):
        assert 0.9 * seconds <= one["predicted"]["seconds"] <= seconds


def test_every_value_has_its_reason(measured: list[ModelConfig]) -> None:
    made = plan({"budget": "6 minutes"})
    for name, entry in made["values"].items():
        assert set(entry) == {"value", "reason"}, name
        assert entry["reason"], name
    low, high = made["predicted"]["bits_per_byte_interval"]
    assert low < made["predicted"]["bits_per_byte"] < high
    assert ModelConfig.parse(made["model"]).hidden_size == values(made)["hidden_size"]
    assert (
        values(made)["tokens"] == values(made)["steps"] * values(made)["batch_size"] * values(made)["sequence_length"]
    )


def test_what_the_recipe_fixes_is_kept(measured: list[ModelConfig]) -> None:
    fixed = {"steps": 77, "sequence_length": 96, "batch_size": 5}
    made = plan(fixed, model={"hidden_size": 160, "num_hidden_layers": 7, "family": "llama", "head_dim": 32})
    wanted = fixed | {"hidden_size": 160, "num_hidden_layers": 7, "family": "llama"}
    assert values(made).items() >= wanted.items()
    for name in ("steps", "sequence_length", "batch_size", "hidden_size"):
        assert made["values"][name]["reason"] == "set in the recipe"
    assert all(shape.hidden_size == 160 for shape in measured)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ({"hidden_size": 192}, {"hidden_size": 192}),
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 3}),
        ({"family": "llama"}, {"family": "llama"}),
    ],
)
def test_what_the_recipe_fixes_in_part_is_kept(
    measured: list[ModelConfig], model: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert values(plan({"budget": "2 minutes"}, model=model)).items() >= wanted.items()


def test_widths_that_do_not_suit_the_heads_are_passed_over(measured: list[ModelConfig]) -> None:
    for model in ({"head_dim": 48}, {"num_key_value_heads": 3}):
        made = ModelConfig.parse(plan({"budget": "2 minutes"}, model=model)["model"])
        assert made.hidden_size in WIDTHS
        assert made.model_dump().items() >= model.items()
    with pytest.raises(UserError, match=r"no width among .* suits the recipe: .*head_dim = 7002"):
        plan({"budget": "2 minutes"}, model={"head_dim": 7002})


def test_a_budget_too_small_names_one_that_is_enough(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="too small for any model") as refused:
        plan({"budget": "0.1 seconds"})
    enough = str(refused.value).split("'")[1]
    assert values(plan({"budget": enough}))["steps"] >= 20


def test_more_memory_than_the_machine_has_is_refused_before_it_is_used(
    measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"hidden_size": 512, "num_hidden_layers": 8}
    assert plan({"steps": 10, "batch_size": 64}, model=model)["predicted"]["memory_bytes"] > 2**30
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 2**30)
    measured.clear()
    with pytest.raises(UserError, match=r"needs about .* GiB of memory and the machine has 1\.0 GiB; set a smaller"):
        plan({"steps": 10, "batch_size": 64}, model=model)
    assert not measured
    made = plan({"budget": "10 hours"})  # where the planner chooses, it chooses what fits
    assert made["predicted"]["memory_bytes"] <= 2**30
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 2**20)
    with pytest.raises(UserError, match="GiB of memory"):
        plan({"budget": "10 hours"})


def test_micro_batches_need_less_memory(measured: list[ModelConfig]) -> None:
    model = {"hidden_size": 256, "num_hidden_layers": 4}
    whole, parts = (
        plan({"steps": 10, "batch_size": 32, **micro}, model=model) for micro in ({}, {"micro_batch_size": 2})
    )
    assert parts["predicted"]["memory_bytes"] < whole["predicted"]["memory_bytes"]
    assert parts["predicted"]["seconds"] == pytest.approx(whole["predicted"]["seconds"])


def test_data_too_short_for_a_batch(measured: list[ModelConfig]) -> None:
    small = {"vocab_size": 320, "splits": {"train": {"num_bytes": 30_000, "num_tokens": 10_000, "num_documents": 3}}}
    assert values(plan({"budget": "1 minute"}, small))["batch_size"] < 16  # planned to fit
    with pytest.raises(
        UserError, match=r"10000 tokens, at most 42 rows of 256, but a batch takes 64; .* to 42 or less"
    ):
        plan({"budget": "1 minute", "batch_size": 64}, small)
    assert not [shape for shape in measured if shape.hidden_size > max(WIDTHS)]


def test_rows_longer_than_the_context(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="max_position_embeddings = 128 is shorter than the training rows"):
        plan({"budget": "1 minute"}, model={"max_position_embeddings": 128})
    made = plan({"budget": "1 minute"}, model={"max_position_embeddings": 512})
    assert made["model"]["max_position_embeddings"] == 512


def test_neither_budget_nor_steps(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="pretrain needs a budget"):
        plan({})
    with pytest.raises(UserError, match="set model.hidden_size and model.num_hidden_layers too"):
        plan({"steps": 10})
    with pytest.raises(UserError, match="finetune: needs a budget"):
        plan({"budget": "1 minute"}, finetune=Recipe().finetune.model_copy(update={"budget": None}).model_dump())


def test_expected_quality_of_repeated_data() -> None:
    """Muennighoff et al. 2023: repeats help, less and less, never as much as fresh text, and never without end."""
    once, four, forty, endless = (expected_bits_per_byte(10**6, n * 10**6, 10**6) for n in (1, 4, 40, 10**6))
    fresh = expected_bits_per_byte(10**6, 4 * 10**6, 4 * 10**6)
    assert endless < forty < four < once
    assert fresh < four
    assert expected_bits_per_byte(10**6, 1e9, 1e6) == pytest.approx(endless, abs=1e-3)
    assert expected_bits_per_byte(10**7, 10**6, 10**6) < once


def test_memory_grows_with_everything() -> None:
    def needed(hidden_size: int = 128, tokens: int = 1024, length: int = 256, num_bytes: int = 4) -> int:
        shape = Recipe().model.build(4096, length, hidden_size, 4)
        return training_bytes(shape, tokens, length, num_bytes)

    assert needed() < min(needed(hidden_size=256), needed(tokens=2048), needed(length=512))
    assert needed(num_bytes=2) < needed()


def test_a_real_step_takes_time() -> None:
    shape = Recipe().model.build(320, 16, 32, 1)
    assert 0 < measure_step(shape, rows=1, length=16, precision="float32", steps=1) < 30
