import math
import random
from typing import Any, cast

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from lalia.errors import UserError
from lalia.inference import sampling
from lalia.inference.sampling import RowState, Sampler, SamplingParams, describe, draw, penalise

PROBABILITIES = torch.tensor([0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
NUM_DRAWS = 3000


def draws(num: int = NUM_DRAWS, seed: int = 0, logits: torch.Tensor | None = None, **params) -> torch.Tensor:
    """Counts of tokens drawn by `num` requests with different seeds, all in one batch."""
    rows = [SamplingParams(seed=seed * num + i, **params) for i in range(num)]
    logits = PROBABILITIES.log() if logits is None else logits
    states = [RowState(row, [], len(logits)) for row in rows]
    drawn = Sampler(rows)(logits.repeat(num, 1), states)
    return torch.bincount(torch.tensor(drawn), minlength=len(logits))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """Pearson's statistic, and its 99.99 % quantile (Wilson and Hilferty 1931); infinite if the impossible came."""
    possible = probabilities > 0
    if counts[~possible].any():
        return math.inf, 0.0
    expected = probabilities[possible] * counts.sum()
    degrees = max(int(possible.sum()) - 1, 1)
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    return ((counts[possible] - expected) ** 2 / expected).sum().item(), limit


def kept(probabilities: torch.Tensor, num: int) -> torch.Tensor:
    """The first `num` probabilities, renormalised."""
    rest = probabilities.clone()
    rest[num:] = 0
    return rest / rest.sum()


# 0.30 + 0.22 + 0.16 = 0.68: top_p = 0.69 needs a fourth token, 0.67 does not. 0.2 * 0.30 = 0.06 keeps six tokens.
# After top_k = 5 (0.88 in all), top_p = 0.76 is 0.669 of the whole: three tokens, not the four it takes without.
DISTRIBUTIONS = [
    ({}, PROBABILITIES),
    ({"temperature": 2.0}, PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
    ({"top_k": 3}, kept(PROBABILITIES, 3)),
    ({"top_k": 100}, PROBABILITIES),
    ({"top_p": 0.67}, kept(PROBABILITIES, 3)),
    ({"top_p": 0.69}, kept(PROBABILITIES, 4)),
    ({"min_p": 0.199}, kept(PROBABILITIES, 6)),
    ({"min_p": 0.201}, kept(PROBABILITIES, 5)),
    ({"top_k": 5, "top_p": 0.76}, kept(PROBABILITIES, 3)),
    ({"top_k": 5, "top_p": 0.9, "min_p": 0.5}, kept(PROBABILITIES, 3)),
]


@pytest.mark.parametrize(("params", "expected"), DISTRIBUTIONS, ids=str)
def test_draws_follow_the_distribution(params, expected):
    counts = draws(**{"temperature": 1.0, **params})
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit
    others = [other for _, other in DISTRIBUTIONS if not torch.equal(other, expected)]
    for other in others:  # control: the test tells these distributions apart
        statistic, limit = chi_square(counts, other)
        assert statistic > limit


def test_rows_of_one_batch_keep_their_own_settings():
    settings = [{"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}, {}] * 400
    rows = [SamplingParams(**{"temperature": 1.0, **values}, seed=i) for i, values in enumerate(settings)]
    drawn = Sampler(rows)(PROBABILITIES.log().repeat(len(rows), 1), [RowState(row, [], 8) for row in rows])
    by_setting = [set(drawn[i::5]) for i in range(5)]
    assert by_setting == [{0}, {0, 1}, {0, 1}, {0}, set(range(8))]


@pytest.mark.parametrize("first_candidates", [2, 128])
def test_thresholds_equal_transformers(monkeypatch, first_candidates):
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", first_candidates)
    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, min_p in [(0, 0.3, 0.0), (7, 0.8, 0.0), (0, 0.99, 0.05), (40, 0.5, 0.1), (1, 1.0, 0.0)]:
        logits = torch.randn(5, 60, generator=generator) * 3
        expected = logits.clone()
        for warper in (
            TopKLogitsWarper(top_k) if top_k else None,
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p) if min_p else None,
        ):
            if warper is not None:
                expected = warper(
                    cast(torch.LongTensor, torch.zeros(5, 1, dtype=torch.long)), cast(torch.FloatTensor, expected)
                )
        sampler = Sampler([SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)] * 5)
        threshold = sampler._threshold(logits)
        assert threshold is not None
        assert torch.equal(logits >= threshold, expected > -math.inf)


def test_repetition_penalty_equals_transformers():
    logits, prompt = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), [3, 7, 7, 49]
    states = [RowState(SamplingParams(repetition_penalty=p), prompt, 50) for p in (1.7, 0.6)]
    states[0].add(11)
    seen = torch.stack([state.seen for state in states if state.seen is not None])
    penalised = penalise(logits, seen, torch.tensor([[1.7], [0.6]]))
    for row, penalty, ids in ((0, 1.7, [*prompt, 11]), (1, 0.6, prompt)):
        known = cast(torch.LongTensor, torch.tensor([ids]))
        scores = cast(torch.FloatTensor, logits[row : row + 1].clone())
        expected = RepetitionPenaltyLogitsProcessor(penalty)(known, scores)
        torch.testing.assert_close(penalised[row : row + 1], expected)
        assert not torch.allclose(penalised[row], logits[row])


def test_only_rows_with_a_repetition_penalty_are_penalised():
    logits = torch.tensor([[2.0, 1.9, -1.0]]).repeat(2, 1)
    rows = [SamplingParams(temperature=0, repetition_penalty=1.5), SamplingParams(temperature=0)]
    assert Sampler(rows)(logits, [RowState(row, [0], 3) for row in rows]) == [1, 0]


def test_the_smallest_and_largest_settings_give_numbers():
    logits = torch.tensor([[80.0, 79.9, -300.0, 0.0, -math.inf]])
    settings: tuple[dict[str, Any], ...] = (
        {"temperature": 1e-300},
        {"temperature": 5.0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e-300, "temperature": 1e-300},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 2**31 - 1},
    )
    for values in settings:
        row = SamplingParams(seed=1, **values)
        (drawn,) = Sampler([row])(logits.clone(), [RowState(row, [0, 1, 2, 3], 5)])
        assert drawn != 4
        if "temperature" in values and values["temperature"] < 1:
            assert drawn == 0 or "repetition_penalty" in values


def test_equal_logits_stay_together():
    assert (draws(logits=torch.zeros(6), num=600, temperature=1.0, top_k=2) > 0).all()
    assert (draws(logits=torch.tensor([2.0, 1.0, 0.0]), num=600, temperature=1.0, top_k=2) > 0).tolist() == [1, 1, 0]


def test_ids_without_text_are_never_drawn():
    never = torch.tensor([True, False] * 4)
    for temperature in (0.0, 5.0):
        rows = [SamplingParams(temperature=temperature, seed=i) for i in range(300)]
        drawn = Sampler(rows, never)(PROBABILITIES.log().repeat(300, 1), [RowState(row, [], 8) for row in rows])
        assert set(drawn) <= {1, 3, 5, 7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_an_error_and_takes_no_random_number(temperature):
    row = SamplingParams(temperature=temperature, seed=5)
    state = RowState(row, [], 3)
    with pytest.raises(FloatingPointError, match="weights are broken"):
        Sampler([row])(torch.tensor([[1.0, math.nan, 0.0]]), [state])
    assert state.random.random() == random.Random(5).random()


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(2))

    def drawn(seeds: list[int | None], row: int, repeat: int = 8) -> list[int]:
        rows = [SamplingParams(temperature=1.0, seed=seed) for seed in seeds]
        states = [RowState(params, [], 500) for params in rows]
        sampler = Sampler(rows)
        return [sampler(logits[: len(rows)].clone(), states)[row] for _ in range(repeat)]

    alone = drawn([9], 0)
    assert drawn([9, None, 3], 0) == alone
    assert drawn([8], 0) != alone
    assert drawn([-9], 0) != alone  # Python's generator would take -9 for 9
    assert drawn([None], 0) != drawn([None], 0)


def test_draw_never_takes_probability_zero():
    class Edge(random.Random):
        value = 0.0

        def random(self) -> float:
            return self.value

    for value, expected in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 2**-53, 2)):  # the last is 1 in float32
        edge = Edge()
        edge.value = value
        assert int(draw(torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]]), [edge])) == expected


def test_describe():
    log_probs = PROBABILITIES.log().flip(0).repeat(2, 1)
    first, second = describe(log_probs, [7, 0], [2, 0])
    assert first[0] == pytest.approx(math.log(0.30)) and second[0] == pytest.approx(math.log(0.02))
    assert [token for token, _ in first[1]] == [7, 6] and second[1] == []
    assert first[1][1][1] == pytest.approx(math.log(0.22))
    assert describe(log_probs[:1], [3], [20])[0][1][-1][0] == 0  # more than there are


OUT_OF_RANGE = [
    ("max_tokens", (0, -1, 1.5, "1", True, math.inf)),
    ("temperature", (-0.1, 5.1, math.nan, math.inf, -math.inf, "1", None)),
    ("top_k", (-1, 2**31, 1.5, "1", True, None)),
    ("top_p", (0.0, -0.5, 1.01, math.nan, math.inf, None)),
    ("min_p", (-0.1, 1.1, math.nan, math.inf)),
    ("repetition_penalty", (0.0, -1.0, 10.1, math.nan, math.inf)),
    ("stop", (("",), ("a",) * 17, ("a" * 1001,), (1,), 5)),
    ("seed", (1.5, "1", True, 2**64, -(2**63) - 1)),
    ("logprobs", (-1, 21, 1.5, True)),
    ("ignore_eos", (1, "yes", None)),
]


@pytest.mark.parametrize(("field", "values"), OUT_OF_RANGE, ids=[field for field, _ in OUT_OF_RANGE])
def test_out_of_range_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(UserError, match=field):
            SamplingParams.parse({field: value}, "sampling")
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})


def test_the_ends_of_the_ranges_are_accepted():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=10, seed=0, logprobs=0, stop=())
    SamplingParams(temperature=5, top_p=1e-9, min_p=1, repetition_penalty=1e-9, seed=-(2**63), logprobs=20)
    assert SamplingParams.parse({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.parse({"stop": "word"}).stop == ("word",)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        SamplingParams.parse({"temprature": 1.0}, "sampling")
