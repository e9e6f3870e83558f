"""Meters: operations against PyTorch's counter, speeds against a clock that is told what time it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lalia.model.transformer
from lalia.model.attention import Pattern
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.training.meters import Meters, first_start, meters_of
from lalia.training.parallel.world import World
from lalia.training.trainer import initialize
from tests.model.test_families import CONFIGS

LENGTH, ROWS = 24, 2
DECODERS = {name: c for name, c in CONFIGS.items() if c.causal and c.head == "language_model"}
MORE = {
    "tied": CONFIGS["qwen3"].model_copy(update={"tie_word_embeddings": True}),
    "not tied": CONFIGS["qwen3"].model_copy(update={"tie_word_embeddings": False}),
    "one key-value head": CONFIGS["qwen3"].model_copy(update={"num_key_value_heads": 1}),
    "window in every layer": CONFIGS["mistral"].model_copy(update={"sliding_window": 5}),
    "window that is wider than the row": CONFIGS["mistral"].model_copy(update={"sliding_window": 64}),
}
CPU = torch.device("cpu")


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern | None,
    causal: bool = True,
    softcap: float = 0.0,
) -> Tensor:
    """Attention by products over as many keys per query as the formula counts: all, or those of the window."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    length = query.shape[2]
    window = length if pattern is None or pattern.window is None else min(pattern.window, length)
    band_key, band_value = (F.pad(t, (0, 0, window - 1, 0)).unfold(2, window, 1) for t in (key, value))
    if window == length:  # (batch, heads, seq, head_dim) x (batch, heads, head_dim, seq)
        scores = query @ key.transpose(2, 3)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
    else:  # (batch, heads, seq, 1, head_dim) x (batch, heads, seq, head_dim, window)
        scores = (query.unsqueeze(3) @ band_key).squeeze(3)
        seen = torch.arange(window) + torch.arange(length)[:, None] >= window - 1
    scores = scores * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    if window == length:
        return weights @ value
    return (band_value @ weights.unsqueeze(4)).squeeze(4)


def step_loss(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model.logits(model(tokens[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def counted(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> float:
    """Operations per token of a forward and backward pass by plain products, as PyTorch counts them."""
    model = Transformer(config)
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # the layers begin as the identity, which hides how attention is computed
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    expected = step_loss(model, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(lalia.model.transformer, "attend", plain_attention)
        with FlopCounterMode(display=False) as counter:
            loss = step_loss(model, tokens)
            loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # what was counted is what the model computes
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize("config", (DECODERS | MORE).values(), ids=DECODERS | MORE)
def test_operations_are_those_that_pytorch_counts(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.flops_per_token(LENGTH) == pytest.approx(counted(config, monkeypatch), rel=0.01)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gemma3_text", {"sliding_window": None, "layer_types": None}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("mixtral", {"num_experts_per_token": 4}),
        ("qwen3_moe", {"dense_layers": ()}),
        ("qwen3", {"head": "none"}),
    ],
)
def test_a_wrong_account_is_more_than_a_percent_off(
    name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: windows, shared keys, chosen experts, dense layers and the head each show."""
    account = CONFIGS[name].model_copy(update=wrong).flops_per_token(LENGTH)
    assert account != pytest.approx(counted(CONFIGS[name], monkeypatch), rel=0.01)


class Clock:
    """Time that passes when it is told to; the device works in the background until somebody waits for it."""

    def __init__(self) -> None:
        self.now, self.device_busy = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.device_busy = max(0.0, self.device_busy - seconds)

    def synchronize(self) -> None:
        self.sleep(self.device_busy)


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


FLOPS = 1e6
"""Per token, of the runs below."""


def make(clock: Clock, wall: float = 5000.0, **changes: Any) -> Meters:
    values: dict[str, Any] = {"peaks": {"datasheet": 4e9}, "warmup_steps": 2}
    meters = Meters(
        lambda length: FLOPS,
        CPU,
        clock=clock,
        wall_clock=lambda: wall + clock.now - 100.0,
        synchronize=clock.synchronize,
        **(values | changes),
    )
    return meters


def run(meters: Meters, clock: Clock, steps: int, seconds: float = 0.5, wait: float = 0.0, trained: Any = 750) -> None:
    """Steps of 1,000 tokens that keep the device busy for `seconds` each; giving them to it takes no time."""
    for _ in range(steps):
        with meters.waiting():
            clock.sleep(wait)
        clock.device_busy += seconds
        meters.step(10, 100, trained)


def test_a_run_of_known_work_and_time(clock: Clock) -> None:
    meters = make(clock)
    meters.start()
    run(meters, clock, 2, seconds=7.0)  # compilation
    run(meters, clock, 10)
    with meters.phase("evaluation"):
        clock.sleep(30.0)
    run(meters, clock, 10)
    with meters.phase("checkpoint"):
        clock.sleep(10.0)
    found = meters.read()
    assert found["tokens"] == 22 * 750
    assert found["processed_tokens"] == 22_000
    assert found["tokens_per_second"] == pytest.approx(1500, rel=0.01)
    assert found["processed_tokens_per_second"] == pytest.approx(2000, rel=0.01)
    assert found["flops_per_second"] == pytest.approx(2e9, rel=0.01)
    assert found["mfu"] == pytest.approx(0.5, rel=0.01)
    assert found["seconds"] == pytest.approx(24.0)
    assert (found["evaluation_seconds"], found["checkpoint_seconds"]) == (30.0, 10.0)
    assert found["goodput"] == pytest.approx(24 / 64, rel=0.01)
    summary = meters.summary()
    assert summary["warmup_steps_not_in_speed"] == 2
    assert summary["warmup_seconds"] == pytest.approx(14.0)
    assert "not halved" in summary["flops_formula"]


def test_without_waiting_for_the_device_speed_would_be_far_off(clock: Clock) -> None:
    """Negative control: the same run, read while the device still works."""
    meters = make(clock)
    meters.synchronize = lambda: None
    meters.start()
    run(meters, clock, 22)
    clock.sleep(0.1)
    assert meters.read()["tokens_per_second"] > 10 * 1500


def test_counts_may_stay_on_the_device(clock: Clock) -> None:
    meters = make(clock)
    meters.start()
    weight = torch.tensor(750)
    run(meters, clock, 8, trained=weight)
    assert meters.read()["tokens"] == 8 * 750
    assert int(weight) == 750


def test_waiting_for_data(clock: Clock) -> None:
    meters = make(clock)
    meters.start()
    for _ in range(12):  # the device has nothing to do while the loop waits
        run(meters, clock, 1, seconds=0.3, wait=0.1)
        clock.synchronize()
    found = meters.read()
    assert found["data_wait_share"] == pytest.approx(0.25, rel=0.01)
    assert found["goodput"] == pytest.approx(0.75, rel=0.01)


def test_recent_speed_shows_a_slowdown_that_the_mean_hides(clock: Clock) -> None:
    meters = make(clock)
    meters.start()
    run(meters, clock, 102)
    meters.read()
    run(meters, clock, 10, seconds=2.0)
    found = meters.read()
    assert found["recent_tokens_per_second"] == pytest.approx(375)
    assert found["tokens_per_second"] > 1000


def test_a_device_without_a_known_peak_has_no_utilisation_but_a_reason(clock: Clock) -> None:
    meters = make(clock, peaks={}, no_peak="no datasheet figure for 'Abacus 9' in float32")
    meters.start()
    run(meters, clock, 5)
    assert not any(name.startswith("mfu") for name in meters.read())
    assert meters.summary()["no_mfu"] == "no datasheet figure for 'Abacus 9' in float32"
    assert "no_mfu" not in make(clock).summary()


def test_utilisation_of_several_devices_against_two_peaks(clock: Clock) -> None:
    meters = make(clock, num_devices=2, peaks={"datasheet": 4e9, "measured": 2e9})
    meters.start()
    run(meters, clock, 10)
    found = meters.read()
    assert (found["mfu"], found["mfu_measured"]) == (0.25, 0.5)


def test_goodput_after_a_kill(clock: Clock) -> None:
    """20 s of steps and a checkpoint; 10 s of steps are lost; 100 s later the run goes on for 10 s."""
    first = make(clock)
    first.start()
    run(first, clock, 40)
    state = json.loads(json.dumps(first.state()))
    run(first, clock, 20)
    clock.synchronize()
    clock.sleep(100.0)
    second = make(clock)
    second.load(state)
    second.start()
    run(second, clock, 20)
    found = second.read()
    assert found["tokens"] == 60 * 750
    assert found["goodput"] == pytest.approx(30 / 140, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(1500, rel=0.01)
    forgetful = make(clock)  # negative control
    forgetful.start()
    run(forgetful, clock, 20)
    assert forgetful.read()["goodput"] == 1.0


def test_goodput_counts_from_the_first_start_even_before_any_checkpoint(clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert first_start(log) is None
    log.write_text('{"event": "start", "time": 4990.0}\n{"event": "step", "time": 4999.0}\n')
    meters = make(clock)
    meters.start(first_start(log))
    run(meters, clock, 20)
    assert meters.read()["goodput"] == 0.5
    for damaged in ("", "{", "[]", '{"time": "noon"}'):
        log.write_text(damaged)
        assert first_start(log) is None


def test_going_back_inside_a_process_counts_what_is_done_again_once(clock: Clock) -> None:
    meters = make(clock)
    meters.start()
    run(meters, clock, 20)
    state = meters.state()
    run(meters, clock, 20)
    clock.synchronize()
    meters.load(state)
    meters.start()
    run(meters, clock, 20)
    found = meters.read()
    assert found["tokens"] == 40 * 750
    assert found["seconds"] == pytest.approx(20.0)
    assert found["goodput"] == pytest.approx(20 / 30, rel=0.01)


@pytest.mark.parametrize("wall", [0.0, 4000.0, 5019.0])
def test_a_clock_that_goes_backwards(clock: Clock, wall: float) -> None:
    first = make(clock, wall=5000.0)
    first.start()
    run(first, clock, 40)
    state = first.state()
    second = make(clock, wall=wall - 20.0)
    second.load(state)
    second.start()
    run(second, clock, 40)
    clock.now -= 3.0  # not even a monotonic clock is trusted to give a time below zero
    found = second.read()
    assert 0.0 < found["goodput"] <= 1.0
    assert second.first_started == 5000.0
    assert all(value >= 0 for value in found.values())


def test_peaks_of_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(CONFIGS["qwen3"])
    meters = meters_of(model, World.alone(), "float32")
    assert meters.peaks.keys() == {"measured"}  # no datasheet has a processor
    assert 1e8 < meters.peaks["measured"] < 1e14
    assert "no datasheet peak is known for" in meters.summary()["no_mfu"]
    monkeypatch.setattr("lalia.training.meters.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert meters_of(model, World.alone(), "bfloat16").peaks["datasheet"] == 989e12
    monkeypatch.setattr("lalia.training.meters.device_name", lambda device: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert "datasheet" not in meters_of(model, World.alone(), "bfloat16").peaks
