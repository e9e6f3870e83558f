"""The n-gram baseline against a dictionary implementation of the same formulas, and against the axioms."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lalia.errors import UserError
from lalia.evaluation import ngram
from lalia.evaluation.ngram import NgramModel

CORPUS = [
    b"to be, or not to be, that is the question",
    b"to sleep, perchance to dream",
    b"ay, there's the rub",
    b"t",
    b"",
]
UNSEEN = [b"to be or not to dream of the rub", b"zounds!", b"the", b"that is the rub, to sleep", b""]


def reference_probability(documents, order, alphabet_size, context, symbol):
    """Interpolated modified Kneser-Ney by the book: strings in dictionaries, recursion, no arrays."""
    counts = defaultdict(Counter)
    for n in range(1, order + 1):
        for document in documents:
            for i in range(len(document) - n + 1):
                counts[n][document[i : i + n]] += 1
    adjusted = {order: counts[order]}
    for n in range(1, order):
        left = defaultdict(set)
        for document in documents:
            for i in range(len(document) - n + 1):
                left[document[i : i + n]].add(document[i - 1] if i else "start")
        adjusted[n] = Counter({gram: len(before) for gram, before in left.items()})

    def discount(n, count):
        n1, n2, n3, n4 = (sum(1 for c in adjusted[n].values() if c == k) for k in (1, 2, 3, 4))
        found = (0.5, 1.0, 1.5)
        if min(n1, n2, n3, n4) > 0:
            y = n1 / (n1 + 2 * n2)
            estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if all(0 <= d <= k for k, d in zip((1, 2, 3), estimate, strict=True)):
                found = estimate
        return found[min(count, 3) - 1]

    def probability(n, history):
        if n == 0:
            return 1 / alphabet_size
        history = history[len(history) - (n - 1) :] if n > 1 else history[:0]
        following = {gram: c for gram, c in adjusted[n].items() if gram[:-1] == history}
        below = probability(n - 1, history[1:])
        total = sum(following.values())
        if not total:
            return below
        own = following.get((*history, symbol), 0)
        freed = sum(discount(n, c) for c in following.values())
        return ((own - discount(n, own)) if own else 0) / total + freed / total * below

    return probability(min(order, len(context) + 1), context)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_agrees_with_a_dictionary_implementation(order):
    model = NgramModel.fit(CORPUS, order)
    documents = [tuple(document) for document in CORPUS]
    for text in UNSEEN[:3]:
        found = model.probabilities(text)
        for i, symbol in enumerate(text):
            expected = reference_probability(documents, order, 256, tuple(text[:i]), symbol)
            assert found[i] == pytest.approx(expected, rel=1e-9)


def test_agrees_on_ids_where_all_discounts_are_estimated(monkeypatch):
    monkeypatch.setattr(ngram, "FALLBACK_DISCOUNTS", (math.nan, math.nan, math.nan))
    rng = np.random.default_rng(5)  # counts of 1 to 4 at every length; where not, the NaN above would show
    documents = [tuple(int(v) for v in np.minimum(rng.zipf(1.5, 400), 199)) for _ in range(4)]
    model = NgramModel.fit(documents, 3, alphabet_size=200)
    text = tuple(int(v) for v in np.minimum(rng.zipf(1.5, 30), 199))
    expected = [reference_probability(documents, 3, 200, text[:i], symbol) for i, symbol in enumerate(text)]
    np.testing.assert_allclose(model.probabilities(text), expected, rtol=1e-9)


def test_the_reference_would_notice_another_discount(monkeypatch):
    monkeypatch.setattr(ngram, "FALLBACK_DISCOUNTS", (0.6, 1.0, 1.5))
    model = NgramModel.fit(CORPUS, 3)
    expected = reference_probability([tuple(d) for d in CORPUS], 3, 256, tuple(b"the"), ord(" "))
    assert abs(model.distribution(b"the")[ord(" ")] / expected - 1) > 1e-6


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_probabilities_sum_to_one_after_any_context(order):
    model = NgramModel.fit(CORPUS, order)
    rng = np.random.default_rng(1)
    joined = b" ".join(CORPUS)
    contexts = [bytes(rng.integers(0, 256, rng.integers(0, 12)).tolist()) for _ in range(20)]
    contexts += [joined[i : i + 6] for i in rng.integers(0, len(joined), 40)] + [b"", *CORPUS]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.sum() == pytest.approx(1, abs=1e-9)
        assert distribution.min() > 0


def test_the_sum_would_notice_mass_that_is_not_passed_on():
    model = NgramModel.fit(CORPUS, 5)
    level = model._levels[2]
    model._levels[2] = level._replace(backoff=level.backoff * 0.99)
    assert abs(model.distribution(b"to").sum() - 1) > 1e-4


def test_bits_are_those_of_the_distributions():
    model = NgramModel.fit(CORPUS, 4)
    for text in UNSEEN:
        step_by_step = -sum(math.log2(model.distribution(text[:i])[symbol]) for i, symbol in enumerate(text))
        assert model.bits(text) == pytest.approx(step_by_step, abs=1e-9)


def test_a_model_of_nothing_is_uniform():
    assert NgramModel.fit([], 5).bits(b"anything") == pytest.approx(8 * 8)
    assert NgramModel.fit([b""], 3, alphabet_size=4).bits([0, 1, 3]) == pytest.approx(6)


def test_context_helps_and_documents_do_not_leak_into_each_other():
    texts = [b"abcabcabcabcabcabc"] * 5
    assert NgramModel.fit(texts, 3).bits(texts[0]) < 0.3 * NgramModel.fit(texts, 1).bits(texts[0])
    pairs = NgramModel.fit([b"ab"] * 20, 2)  # b is never followed: only the boundary is
    assert pairs.distribution(b"b")[ord("a")] == pairs.distribution(b"")[ord("a")]
    joined = NgramModel.fit([b"ab" * 20], 2)
    assert joined.distribution(b"b")[ord("a")] > 0.9


def test_both_ways_of_sorting_number_alike():
    keys = np.random.default_rng(2).integers(0, 50, 300)
    for small, large in zip(ngram._unique(keys), ngram._unique(keys + 2**62), strict=True):
        np.testing.assert_array_equal(small % 2**62, large % 2**62)


def test_says_what_is_out_of_range():
    with pytest.raises(UserError, match="order 9"):
        NgramModel.fit(CORPUS, 9)
    with pytest.raises(UserError, match="symbol 300"):
        NgramModel.fit([[1, 300]], 2)
    with pytest.raises(UserError, match="symbol -1"):
        NgramModel.fit([b"ab"], 2).bits([-1])
