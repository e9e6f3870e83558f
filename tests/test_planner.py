"""From a budget to a plan, on a machine whose speed the test decides."""

from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.exc import TorchDynamoException

from lalia.devices import cgroup_memory_limit, peak_memory_bytes, reset_peak_memory
from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.planner import make_plan
from lalia.planning.layout import FILL
from lalia.planning.memory import COMPILER_BYTES, STATE_BYTES, parameters, training_memory
from lalia.planning.rules import batch_tokens, scale_optimizer
from lalia.planning.sizes import WIDTHS
from lalia.planning.speed import measure_step
from lalia.progress import Progress
from lalia.recipe import Recipe
from lalia.training.config import Amount, OptimizerConfig, TrainingConfig, parse_budget, parse_time
from lalia.training.optimizers import learning_rates
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.pretrain import uncompiled_seconds_per_step

TRAIN_BYTES = 5_000_000
MANIFEST = {
    "vocab_size": 4096,
    "splits": {"train": {"num_bytes": TRAIN_BYTES, "num_tokens": 1_500_000, "num_documents": 40}},
}
WEB = {
    "vocab_size": 32_768,
    "splits": {"train": {"num_bytes": 400_000_000_000, "num_tokens": 100_000_000_000, "num_documents": 10**8}},
}
FLOPS_PER_SECOND = 5e10
H100 = {"device": "NVIDIA H100", "devices": 8}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """A machine of constant speed; the shapes that were measured on it."""
    shapes: list[ModelConfig] = []

    def step_seconds(
        shape: ModelConfig, rows: int, length: int, precision: str, steps: int, parts: float, *_: Any
    ) -> float:
        shapes.append(shape)
        return shape.flops_per_token(length) * rows * parts * length / FLOPS_PER_SECOND

    monkeypatch.setattr("lalia.planning.speed.measure_step", step_seconds)
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr("lalia.planner.find_compiler", lambda: None)
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
    assert parse_budget(text) == (pytest.approx(seconds), "seconds")
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1e18 FLOPs", Amount(1e18, "FLOPs")),
        ("2.5E17 flops", Amount(2.5e17, "FLOPs")),
        ("300M tokens", Amount(3e8, "tokens")),
        ("1.5 billion tokens", Amount(1.5e9, "tokens")),
        ("4096 tokens", Amount(4096, "tokens")),
        ("5 dollars", Amount(5, "dollars")),
        ("$2.50", Amount(2.5, "dollars")),
        ("1k USD", Amount(1000, "dollars")),
    ],
)
def test_budgets_that_are_no_time(text: str, amount: Amount) -> None:
    assert parse_budget(text) == amount
    with pytest.raises(UserError, match="is not a time"):
        parse_time(text)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "6", "minutes", "-1 minutes", "0 minutes", "6 parsecs", "6 minutes 5", "1e3 s", "nan s", "inf s",
     "6,5 s", "1:30", "9" * 400 + " s", "1e999 FLOPs", "5 M M tokens", "0 dollars", "-$5", "3 x tokens"],
)  # fmt: skip
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match="is not a time, nor an amount of FLOPs, .*'6 minutes'"):
        parse_budget(text)


def test_a_budget_is_there_unless_steps_are() -> None:
    assert (
        TrainingConfig.parse({"seed": 3}).budget == TrainingConfig().budget == Recipe().pretrain.budget == "6 minutes"
    )
    assert TrainingConfig.parse({"steps": 3}).budget is None
    assert Recipe.parse({"pretrain": {"seed": 3}}).pretrain.budget == "6 minutes"


def test_more_budget_gives_more_computation_and_not_worse_quality(measured: list[ModelConfig]) -> None:
    made = [plan({"budget": f"{seconds} seconds"}) for seconds in (10, 30, 60, 180, 360, 1800, 7200)]
    flops = [one["predicted"]["flops"] for one in made]
    quality = [one["predicted"]["bits_per_byte"] for one in made]
    widths = [values(one)["hidden_size"] for one in made]
    assert flops == sorted(flops)
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


def test_a_micro_batch_that_fits_the_memory(measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"hidden_size": 512, "num_hidden_layers": 8}
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    whole = plan({"steps": 10, "batch_size": 64}, model=model)
    assert values(whole)["micro_batch_size"] == 4  # 1,024 tokens
    odd = plan({"steps": 10, "batch_size": 7, "sequence_length": 300}, model=model)
    assert values(odd)["micro_batch_size"] == 1
    limit = whole["calibration"]["memory_estimate_bytes"] - 1
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: limit / FILL)
    parts = plan({"steps": 10, "batch_size": 64}, model=model)
    assert 0 < values(parts)["micro_batch_size"] < 4
    assert parts["calibration"]["memory_estimate_bytes"] <= limit
    assert parts["predicted"]["seconds"] == pytest.approx(whole["predicted"]["seconds"])
    made = plan({"budget": "10 hours"})  # where the planner chooses the size, it chooses one that fits
    assert made["calibration"]["memory_estimate_bytes"] <= limit


def test_the_memory_expected_is_what_measuring_the_step_took(
    measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lalia.planning.speed.peak_memory_bytes", lambda: 700 * 2**20)
    settings, model = {"steps": 10, "compile": True}, {"hidden_size": 64, "num_hidden_layers": 1}
    made = plan(settings, model=model)
    weights = values(made)["parameters"]  # each 4 bytes, and as many of Muon's or twice as many of AdamW's state
    copy = made["predicted"]["memory_bytes"] - 700 * 2**20
    assert 8 * weights < copy <= 12 * weights
    several = plan({**settings, "batch_size": 8}, model=model, plan={"devices": 2})  # no measurement of such a step
    estimated = several["predicted"]["memory_bytes"]
    monkeypatch.setattr("lalia.planning.speed.peak_memory_bytes", lambda: 900 * 2**20)
    assert plan(settings, model=model)["predicted"]["memory_bytes"] == made["predicted"]["memory_bytes"] + 200 * 2**20
    again = plan({**settings, "batch_size": 8}, model=model, plan={"devices": 2})
    assert again["predicted"]["memory_bytes"] == estimated
    eager = plan({**settings, "batch_size": 8, "compile": False}, model=model, plan={"devices": 2})
    assert eager["predicted"]["memory_bytes"] == estimated - COMPILER_BYTES


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_stages_of_the_batch_count(measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    model = {"hidden_size": 256, "num_hidden_layers": 4}
    whole = plan({"budget": "2 minutes", "batch_size": 16}, model=model)
    staged = plan({"budget": "2 minutes", "batch_size": 16, "batch_stages": [[0, 0.25], [0.5, 1]]}, model=model)
    steps, more = values(whole)["steps"], values(staged)["steps"]
    assert more == pytest.approx(steps * 16 / 10, rel=0.05)  # half of them of 4 rows
    assert values(staged)["tokens"] == pytest.approx(values(whole)["tokens"], rel=0.05)
    assert staged["predicted"]["seconds"] == pytest.approx(whole["predicted"]["seconds"], rel=0.05)
    tokens = {"budget": "100000 tokens", "batch_size": 1, "batch_stages": [[0, 0.25], [0.5, 1]]}
    assert values(plan(tokens, model=model))["tokens"] == pytest.approx(1e5, rel=0.01)  # no step has less than a row


def test_the_speed_is_that_of_deterministic_algorithms(
    measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("lalia.planner.make_deterministic", lambda: seen.append(len(measured)))
    plan({"steps": 10, "deterministic": True}, model={"hidden_size": 64, "num_hidden_layers": 1})
    assert seen == [0]  # before anything was measured
    assert measured


def test_more_memory_than_the_machine_has_is_refused_before_it_is_used(
    measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"hidden_size": 512, "num_hidden_layers": 8}
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 2**30)
    with pytest.raises(UserError, match=r"needs about .* GiB of memory and the machine has 1\.0 GiB; set a smaller"):
        plan({"steps": 10, "batch_size": 64, "micro_batch_size": 64}, model=model)
    monkeypatch.setattr("lalia.planner.memory_bytes", lambda: 2**20)
    for pretrain in ({"steps": 10}, {"budget": "10 hours"}):
        with pytest.raises(UserError, match="GiB of memory even row by row"):
            plan(pretrain, model=model if "steps" in pretrain else {})
    assert not measured


def test_data_too_short_for_a_batch(measured: list[ModelConfig]) -> None:
    small = {"vocab_size": 320, "splits": {"train": {"num_bytes": 30_000, "num_tokens": 10_000, "num_documents": 3}}}
    assert values(plan({"budget": "1 minute"}, small))["batch_size"] < 16  # planned to fit
    before = len(measured)
    with pytest.raises(
        UserError, match=r"10000 tokens, at most 42 rows of 256, but a batch takes 64; .* to 42 or less"
    ):
        plan({"budget": "1 minute", "batch_size": 64}, small)
    assert len(measured) == before  # refused without a measurement


def test_rows_longer_than_the_context(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="max_position_embeddings = 128 is shorter than the training rows"):
        plan({"budget": "1 minute", "sequence_length": 256}, model={"max_position_embeddings": 128})
    assert values(plan({"budget": "1 minute"}, model={"max_position_embeddings": 128}))["sequence_length"] == 128
    made = plan({"budget": "1 minute"}, model={"max_position_embeddings": 512})
    assert made["model"]["max_position_embeddings"] == 512


def test_neither_budget_nor_steps(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="pretrain needs a budget"):
        plan({"budget": None})
    with pytest.raises(UserError, match="set model.hidden_size and model.num_hidden_layers too"):
        plan({"steps": 10})
    with pytest.raises(UserError, match="finetune: needs a budget"):
        plan({"budget": "1 minute"}, finetune=Recipe().finetune.model_copy(update={"budget": None}).model_dump())


def test_steps_that_are_asked_for_are_not_fewer(measured: list[ModelConfig]) -> None:
    """With a budget for choosing the size, however often they repeat the text."""
    steps = 4_000  # of 2,048 tokens: 5.5 passes
    made = plan({"budget": "1 hour", "steps": steps})
    assert values(made)["steps"] == steps
    assert "expected to get worse on other text" in made["values"]["epochs"]["reason"]


def test_what_is_not_measured_whole_is_estimated(measured: list[ModelConfig]) -> None:
    model = {"hidden_size": 64, "num_hidden_layers": 1}
    whole = plan({"steps": 10}, model=model)
    assert "memory_estimate_bytes" in whole["calibration"]
    for setting in ({"average_decay": 0.9}, {"activation_checkpointing": "full"}):
        assert "memory_estimate_bytes" not in plan({"steps": 10, **setting}, model=model)["calibration"]


def test_repetition_ends(measured: list[ModelConfig]) -> None:
    made = plan({"budget": "1000 hours"}, model={"hidden_size": 64})
    assert 2 < values(made)["epochs"] < 10
    assert "learns the text by heart" in made["values"]["steps"]["reason"]
    assert made["predicted"]["seconds"] < 1000 * 3600


# Budgets that are no time, and devices that are not here


def test_a_budget_of_tokens_trains_on_them_with_the_compute_optimal_size(measured: list[ModelConfig]) -> None:
    made = plan({"budget": "1M tokens"})
    assert 0.99e6 < values(made)["tokens"] <= 1e6
    # Given that size's computation, no other does better (Hoffmann et al. 2022): asking for the FLOPs gives it again.
    again = plan({"budget": f"{made['predicted']['flops']} FLOPs"})
    assert values(again)["hidden_size"] == values(made)["hidden_size"]
    assert values(plan({"budget": "8M tokens"}))["hidden_size"] > values(made)["hidden_size"]


def test_a_budget_of_flops_is_spent(measured: list[ModelConfig]) -> None:
    for flops in (1e13, 1e14):
        made = plan({"budget": f"{flops:.0e} FLOPs"})
        assert 0.99 * flops < made["predicted"]["flops"] <= flops


def test_a_budget_of_dollars_needs_a_price_and_is_time(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match=r"needs a price: set plan\.price_per_hour"):
        plan({"budget": "0.02 dollars"})
    made = plan({"budget": "0.02 dollars"}, plan={"price_per_hour": 0.2, "watts": 100})
    assert values(made) == values(plan({"budget": "6 minutes"}))
    assert made["predicted"]["cost_dollars"] == 0.02
    assert made["predicted"]["energy_kwh"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("budget", ["100 tokens", "1e6 FLOPs", "0.00001 dollars", "0.1 seconds"])
def test_any_budget_too_small_names_one_that_is_enough(measured: list[ModelConfig], budget: str) -> None:
    with pytest.raises(UserError, match=r"too small for any model: the smallest \(width 64, 2 layers\)") as refused:
        plan({"budget": budget}, plan={"price_per_hour": 1.0})
    enough = str(refused.value).split("'")[1]
    assert values(plan({"budget": enough}, plan={"price_per_hour": 1.0}))["steps"] >= 20


def test_devices_that_are_not_here(measured: list[ModelConfig]) -> None:
    made = plan({"budget": "2 hours", "precision": "auto"}, WEB, plan={**H100, "price_per_hour": 3, "watts": 700})
    assert not measured
    predicted, value = made["predicted"], values(made)
    assert value["precision"] == "bfloat16"
    assert "data sheet" in made["values"]["steps"]["reason"]
    assert value["parallel"]["replicate"] == 8
    # 40 % of 989 TFLOP/s on each of eight.
    assert predicted["flops"] / predicted["seconds"] == pytest.approx(0.4 * 989e12 * 8, rel=0.02)
    low, high = predicted["seconds_interval"]
    assert low < 0.85 * predicted["seconds"] < 1.3 * predicted["seconds"] < high
    assert predicted["cost_dollars"] == pytest.approx(48, rel=0.01)
    assert predicted["energy_kwh"] == pytest.approx(11.2, rel=0.01)
    assert predicted["extrapolation"] > 100
    assert value["matrix_learning_rate"] < 0.05
    with pytest.raises(UserError, match=r"plan\.device = 'H1000' is in no table .* known are .*H100 SXM"):
        plan({"budget": "2 hours"}, WEB, plan={"device": "H1000"})


def test_no_speed_is_made_up_for_a_precision_without_a_peak(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match=r"no peak in float32 for H100 SXM .* set pretrain.precision to auto"):
        plan({"budget": "2 hours", "precision": "float32"}, WEB, plan=H100)


def test_what_is_exchanged_in_the_layers_takes_time_too(measured: list[ModelConfig]) -> None:
    def seconds(width: int = 4096, **axes: int) -> float:
        settings = {"steps": 100, "batch_size": 64, "sequence_length": 4096, "precision": "bfloat16"}
        model = {"hidden_size": width, "num_hidden_layers": 8}
        machine = {"device": "NVIDIA H100", "devices": 8}
        made = plan({**settings, "parallel": {"replicate": 1} | axes}, WEB, model=model, plan=machine)
        return made["predicted"]["seconds"]

    copies = seconds(replicate=8)
    # Of 16 heads' keys and values, half the tokens are another's; gathered forward, scattered backward.
    gathers = 100 * 8 * 2 * (2**18 / 8) * 2 * 4096 * 2 / 450e9
    assert seconds(replicate=4, context=2) - copies == pytest.approx(gathers, rel=0.05)
    assert copies < seconds(replicate=4, context=2) < seconds(context=8)
    assert copies < seconds(replicate=4, tensor=2) < seconds(tensor=8)
    # Two sums forward and two backward in 8 layers, of 2^18 tokens / 4 x 4,096 values of 2 bytes, at 450 GB/s.
    sums = 100 * 8 * 4 * 2 * (1 / 2) * (2**18 / 4) * 4096 * 2 / 450e9
    assert seconds(replicate=4, tensor=2) - copies == pytest.approx(sums, rel=0.05)


def test_experts_are_not_planned_into_what_they_cannot_do(
    measured: list[ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a byte less than each choice takes, the next one is taken."""
    chosen: dict[str, list[str]] = {"qwen3": [], "qwen3_moe": []}
    for family, found in chosen.items():
        limit = 2.0**40
        while True:
            monkeypatch.setattr("lalia.planner.memory_bytes", lambda limit=limit: limit / FILL)
            try:
                made = plan(
                    {"steps": 10, "batch_size": 1, "sequence_length": 2048},
                    model={"family": family, "hidden_size": 256, "num_hidden_layers": 8},
                )
            except UserError:
                break
            found.append(values(made)["activation_checkpointing"])
            calibration = made["calibration"]
            limit = calibration.get("memory_estimate_bytes", made["predicted"]["memory_bytes"]) - 1
    assert chosen == {"qwen3": ["none", "selective", "full"], "qwen3_moe": ["none", "full"]}
    with pytest.raises(UserError, match="selective knows no mixture of experts; set full"):
        asked = {"steps": 10, "activation_checkpointing": "selective"}
        plan(asked, model={"family": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2})


def test_layouts_grow_with_the_model(measured: list[ModelConfig]) -> None:
    def made(width: int, layers: int, devices: int, length: int = 2048) -> dict[str, Any]:
        pretrain = {"budget": "300B tokens", "precision": "bfloat16", "sequence_length": length, "batch_size": 64}
        machine = {"device": "NVIDIA H100", "devices": devices}
        result = plan(pretrain, WEB, model={"hidden_size": width, "num_hidden_layers": layers}, plan=machine)
        assert result["predicted"]["memory_bytes"] < 80 * 2**30
        return values(result)

    assert made(768, 12, 8)["parallel"] == {"replicate": 8, "shard": 1, "context": 1, "tensor": 1, "expert": 1}
    assert made(4096, 36, 8)["parallel"]["shard"] > 1
    large = made(8192, 51, 64)
    assert large["parallel"]["shard"] > 8
    long = made(8192, 51, 64, 131_072)
    assert long["activation_checkpointing"] == "full"
    assert long["parallel"]["tensor"] * long["parallel"]["context"] > 1
    with pytest.raises(UserError, match="GiB of memory even row by row and each device has 80"):
        made(8192, 51, 1)


def test_layouts_that_do_not_fit(measured: list[ModelConfig]) -> None:
    with pytest.raises(UserError, match="= 6 does not fit the 8 processes"):
        plan({"budget": "1 hour", "parallel": {"shard": 3}}, WEB, plan=H100)
    model = {"hidden_size": 768, "num_hidden_layers": 12}
    with pytest.raises(UserError, match=r"12 query heads cannot be divided by parallel\.tensor = 8"):
        plan({"budget": "1 hour", "parallel": {"tensor": 8}}, WEB, plan=H100, model=model)
    with pytest.raises(UserError, match="a batch of 12 rows cannot be divided among 8 groups"):
        plan({"budget": "1 hour", "parallel": {"shard": 8}, "batch_size": 12}, WEB, plan=H100, model=model)
    with pytest.raises(UserError, match="a batch of 3 rows cannot be divided among 8 devices"):
        plan({"budget": "1 hour", "batch_size": 3, "sequence_length": 2047}, WEB, plan=H100, model=model)
    with pytest.raises(UserError, match=r"a batch of 2 or 16 rows cannot be divided among 8 groups .*batch_stages"):
        stages = {"batch_size": 16, "batch_stages": [[0, 0.125], [0.5, 1]]}
        plan({"budget": "1 hour", "parallel": {"shard": 8}, **stages}, WEB, plan=H100, model=model)
    with pytest.raises(UserError, match=r"rows of 12 or 48 tokens cannot be divided by 2 x parallel\.context = 16"):
        stages = {"sequence_length": 48, "batch_size": 8, "sequence_stages": [[0, 0.25], [0.5, 1]]}
        plan({"budget": "1 hour", "parallel": {"context": 8}, **stages}, WEB, plan=H100, model=model)
    with pytest.raises(UserError, match="'adamw8bit' takes whole weights"):
        small = {"budget": "1 hour", "parallel": {"shard": 8}, "optimizer": {"kind": "adamw8bit"}}
        plan(small, WEB, plan=H100, model=model)
    half = {"precision": "bfloat16"}
    eight_bits = {"budget": "300B tokens", "optimizer": {"kind": "adamw8bit"}, **half}
    chosen = values(plan(eight_bits, WEB, plan=H100, model=model))
    assert chosen["parallel"]["shard"] == 1  # what it chooses by itself can be trained
    with pytest.raises(UserError, match="'adamw8bit' takes whole weights"):
        later = {"optimizer": {"kind": "adamw8bit"}}
        plan({"budget": "1 hour", "parallel": {"shard": 8}}, WEB, plan=H100, model=model, finetune=later)
    planned = {"budget": "300B tokens", "parallel": {"shard": 8}, "batch_stages": [[0, 0.25], [0.2, 1]], **half}
    assert values(plan(planned, WEB, plan=H100, model=model))["batch_size"] % 32 == 0
    asked = {"budget": "1 hour", "parallel": {"shard": 2, "tensor": 2}, "activation_checkpointing": "full", **half}
    value = values(plan(asked, WEB, plan=H100, model=model))
    assert value["parallel"] == {"replicate": 2, "shard": 2, "context": 1, "tensor": 2, "expert": 1}
    assert value["activation_checkpointing"] == "full"


# Rules


def test_batches_grow_with_the_tokens() -> None:
    assert [batch_tokens(tokens, False)[0] for tokens in (1e5, 3.1e6, 7e6, 1e8)] == [2048, 2048, 2048, 8192]
    assert batch_tokens(1.32e9, True)[0] == 2**19  # nanochat's depth 12
    assert batch_tokens(8.76e9, True)[0] == 2**20  # its depth 24


def test_the_demo_keeps_its_learning_rates_and_larger_batches_get_scaled_ones() -> None:
    asked = OptimizerConfig()
    assert scale_optimizer(asked, 2048, 192, 3e6, False)[0] == asked
    scaled, why = scale_optimizer(asked, 8192, 1024, 1e8, False)
    assert scaled.matrix_learning_rate == pytest.approx(2 * asked.matrix_learning_rate)
    assert scaled.embedding_learning_rate == pytest.approx(2 * asked.embedding_learning_rate)
    assert "Malladi" in why["matrix_learning_rate"].reason
    own = asked.model_copy(update={"matrix_learning_rate": 0.05, "weight_decay": 0.2})
    kept, why = scale_optimizer(own, 8192, 1024, 1e8, False)
    assert (kept.matrix_learning_rate, kept.weight_decay) == (0.05, 0.2)
    assert why["weight_decay"].reason == "set in the recipe"
    large, _ = scale_optimizer(asked, 2**19, 768, 1.32e9, True)  # at nanochat's reference: its values
    assert (large.matrix_learning_rate, large.head_learning_rate, large.weight_decay) == (0.02, 0.008, 0.28)
    adamw, why = scale_optimizer(asked.model_copy(update={"kind": "adamw"}), 2**19, 768, 1.32e9, True)
    assert learning_rates(adamw, 768)["matrix"] == pytest.approx(6e-4)  # GPT-3's of that width
    assert "at this width" in why["adamw_matrix_learning_rate"].reason


def test_the_plan_holds_the_whole_optimizer(measured: list[ModelConfig]) -> None:
    made = values(plan({"budget": "2 minutes", "optimizer": {"head_learning_rate": 0.01, "momentum": 0.9}}))
    settings = OptimizerConfig.parse(made["optimizer"])
    assert (settings.head_learning_rate, settings.momentum) == (0.01, 0.9)
    assert settings.matrix_learning_rate == made["matrix_learning_rate"]


# Memory


def shape_of(width: int = 128, layers: int = 4, length: int = 256, **settings: Any) -> ModelConfig:
    architecture = Recipe.parse({"model": settings}).model
    return architecture.build(4096, length, width, layers)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"family": "nanochat"}])
def test_parameters_are_those_of_the_model(settings: dict[str, Any]) -> None:
    shape = shape_of(64, 2, **settings)
    vectors = sum(p.numel() for p in Transformer(shape).parameters() if p.ndim < 2)
    assert parameters(shape) == Transformer(shape).num_parameters() - vectors


def test_memory_grows_with_everything() -> None:
    def needed(width: int = 128, rows: int = 4, length: int = 256, precision: str = "float32") -> int:
        return training_memory(shape_of(width, length=length), rows, length, precision).total

    assert needed() < min(needed(width=256), needed(rows=8), needed(length=512))
    assert needed(precision="bfloat16") < needed()
    tied, own = (training_memory(shape_of(tie_word_embeddings=tied), 1, 256, "float32") for tied in (True, False))
    table = 4096 * 128
    assert own.weights - tied.weights == own.gradients - tied.gradients == 4 * table
    assert own.optimizer - tied.optimizer == 8 * table


def test_what_each_way_of_saving_memory_saves() -> None:
    shape = shape_of(512, 8, 1024)

    def needed(checkpointing: Any = "none", rows: int = 16, **axes: int) -> Any:
        return training_memory(shape, rows, 1024, "bfloat16", checkpointing, ParallelConfig(**axes), accelerator=True)

    none, selective, full = (needed(level).activations for level in ("none", "selective", "full"))
    assert full < selective < none
    alone, shared, divided = needed(), needed(shard=4), needed(tensor=4)
    for part in ("optimizer", "gradients"):
        assert getattr(divided, part) == pytest.approx(getattr(alone, part) / 4)
    assert shared.optimizer == pytest.approx(alone.optimizer / 4)
    assert alone.gradients / 4 < shared.gradients < alone.gradients  # a gathered layer's comes on top
    assert shared.activations == alone.activations > divided.activations
    assert needed(context=4).activations == pytest.approx(alone.activations / 4)
    assert needed(replicate=4) == alone
    states = [training_memory(shape, 1, 1024, "float32", optimizer=kind).optimizer for kind in STATE_BYTES]
    assert states[2] == states[1] / 4 < states[0] < states[1]


def test_the_peak_counts_from_where_it_was_reset() -> None:
    block = b"1" * (256 * 2**20)
    with_it = peak_memory_bytes()
    assert with_it > len(block)
    del block
    assert peak_memory_bytes() > with_it - 8 * 2**20  # until it is reset; the count is off by some pages
    if not reset_peak_memory():
        pytest.skip("this system cannot")
    assert peak_memory_bytes() < with_it - 200 * 2**20


def test_a_control_group_limits_the_memory(tmp_path: Path) -> None:
    groups, mounted = tmp_path / "cgroup", tmp_path / "fs"
    inner = mounted / "jobs" / "mine"
    inner.mkdir(parents=True)
    groups.write_text("0::/jobs/mine\n")
    assert cgroup_memory_limit(groups, mounted) is None
    (inner / "memory.max").write_text("max\n")
    assert cgroup_memory_limit(groups, mounted) is None
    (mounted / "jobs" / "memory.max").write_text("3000\n")
    assert cgroup_memory_limit(groups, mounted) == 3000  # that of a group around it holds too
    (inner / "memory.max").write_text("2000\n")
    assert cgroup_memory_limit(groups, mounted) == 2000
    old = mounted / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1000\n")
    (mounted / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    groups.write_text("4:cpu,cpuacct:/jobs/mine\n7:memory:/docker\n")
    assert cgroup_memory_limit(groups, mounted) == 1000
    groups.write_text("7:memory:/elsewhere\n")
    assert cgroup_memory_limit(groups, mounted) is None
    assert cgroup_memory_limit(tmp_path / "none", mounted) is None


def test_a_real_step_takes_time() -> None:
    shape = Recipe().model.build(320, 16, 32, 1)
    assert 0 < measure_step(shape, rows=1, length=16, precision="float32", steps=1) < 30
    assert 0 < measure_step(shape, rows=1, length=16, precision="float32", steps=1, parts=3) < 30


def compiling(monkeypatch: pytest.MonkeyPatch, factor: float, error: RuntimeError | None = None) -> None:
    """A machine with a C++ compiler whose compiled steps take `factor` times as long."""

    def step_seconds(*arguments: Any) -> float:
        shape, rows, length, _, _, parts, _, config = arguments
        if config.compile and error is not None:
            raise error
        seconds = shape.flops_per_token(length) * rows * parts * length / FLOPS_PER_SECOND
        return seconds * (factor if config.compile else 1.0)

    monkeypatch.setattr("lalia.planning.speed.measure_step", step_seconds)
    monkeypatch.setattr("lalia.planner.find_compiler", lambda: "g++")


@pytest.mark.usefixtures("measured")
def test_layers_are_compiled_where_that_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, 0.8)
    plain, short = plan({"budget": "6 minutes", "compile": False}), plan({"budget": "1 minute"})
    made = plan({"budget": "6 minutes"})
    assert values(made)["compile"] is True
    assert "20% less time" in made["values"]["compile"]["reason"]
    assert values(made)["steps"] == pytest.approx(values(plain)["steps"] / 0.8, rel=0.01)
    assert uncompiled_seconds_per_step(made) == pytest.approx(uncompiled_seconds_per_step(plain), rel=0.01)
    assert values(short)["compile"] is False
    assert values(plain)["compile"] is False
    asked = plan({"budget": "6 minutes", "compile": True})
    assert uncompiled_seconds_per_step(asked) == pytest.approx(uncompiled_seconds_per_step(plain), rel=0.01)
    compiling(monkeypatch, 1.1)
    slower = plan({"budget": "6 minutes"})
    assert values(slower)["compile"] is False
    assert values(slower)["steps"] == values(plain)["steps"]


@pytest.mark.usefixtures("measured")
def test_without_a_working_compiler_the_plan_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, 0.8, TorchDynamoException("no Python.h"))
    made = plan({"budget": "6 minutes"})
    assert values(made)["compile"] is False
    assert "no Python.h" in made["values"]["compile"]["reason"]
    compiling(monkeypatch, 0.8, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        plan({"budget": "6 minutes"})
    compiling(monkeypatch, 0.8)
    monkeypatch.setattr("lalia.planner.find_compiler", lambda: None)
    assert "no C++ compiler" in plan({"budget": "6 minutes"})["values"]["compile"]["reason"]
