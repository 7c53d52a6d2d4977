"""Weights of averages: by the paper's formulas, by hand, by files that people write."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingconv.errors import UsageError
from lingconv.plans import checkpoint_weights as weighting
from lingconv.plans.checkpoint_weights import Decay, Weighting

DECAYS = list(Decay)


@given(decay=st.sampled_from(DECAYS), count=st.integers(1, 64))
def test_decays_give_weights(decay, count):
    found = weighting.by_decay(decay, count)
    assert len(found.weights) == count
    assert math.fsum(found.weights) == pytest.approx(1, abs=1e-12)
    assert all(weight >= 0 for weight in found.weights)
    ladder = (1.0, *found.decay, 0.0)
    assert all(before >= after for before, after in pairwise(ladder))


@given(values=st.lists(st.floats(0, 1), max_size=12))
def test_the_average_is_what_a_decayed_run_reaches(values):
    """Theta_n - sum of w_i g_(n+i-1) is sum of c_j theta_(n+j), whatever the decay."""
    decay = sorted(values, reverse=True)
    found = Weighting.of_decay("mine", decay)
    rng = np.random.default_rng(len(values))
    gradients = rng.standard_normal((len(decay), 7))
    thetas = rng.standard_normal(7) - np.vstack([np.zeros(7), gradients]).cumsum(0)
    decayed = thetas[0] - sum(
        (w * g for w, g in zip(decay, gradients, strict=True)), start=np.zeros(7)
    )
    assert np.allclose(np.array(found.weights) @ thetas, decayed, atol=1e-12)
    assert weighting.decay_of(found.weights) == pytest.approx(decay, abs=1e-12)


def test_the_linear_decay_is_the_plain_mean():
    assert weighting.by_decay(Decay.LINEAR, 8).weights == pytest.approx([1 / 8] * 8, abs=1e-15)
    assert weighting.mean(8).weights == (1 / 8,) * 8


def test_a_constant_rate_is_the_last_checkpoint():
    assert Weighting.of_decay("constant", [1.0] * 5).weights == (0.0,) * 5 + (1.0,)
    assert weighting.by_decay(Decay.COSINE, 4, end=1.0).weights == (0.0, 0.0, 0.0, 1.0)


# w_1, w_2, w_3 at t = 1/4, 1/2, 3/4, by hand.
BY_HAND = {
    Decay.LINEAR: (0.75, 0.5, 0.25),
    Decay.COSINE: ((1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2),
    Decay.ONE_MINUS_SQRT: (0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)),
    Decay.INVERSE_SQRT: (math.sqrt(1 / 2), math.sqrt(1 / 3), math.sqrt(1 / 4)),
    Decay.EXPONENTIAL: (10**-0.25, 10**-0.5, 10**-0.75),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_formulas(decay):
    found = weighting.by_decay(decay, 4)
    one, two, three = BY_HAND[decay]
    assert found.decay == pytest.approx(BY_HAND[decay], abs=1e-15)
    assert found.weights == pytest.approx([1 - one, one - two, two - three, three], abs=1e-15)


def test_a_decay_that_ends_above_zero():
    found = weighting.by_decay(Decay.LINEAR, 4, end=0.2)
    assert found.decay == pytest.approx([0.8, 0.6, 0.4])
    assert weighting.by_decay(Decay.EXPONENTIAL, 2, end=0.01).decay == pytest.approx([0.1])
    for decay, end in ((Decay.LINEAR, 1.5), (Decay.COSINE, -0.1), (Decay.EXPONENTIAL, 0.0)):
        with pytest.raises(UsageError, match="`decay_to="):
            weighting.by_decay(decay, 4, end)


def test_weights_by_hand():
    assert weighting.by_hand("1/3, 1/3,1/3", 3).weights == (1 / 3,) * 3
    assert weighting.by_hand("0.25,0.75", 2).decay == (0.75,)
    for text, match in {
        "0.5,0.4": "sum to 0.9",
        "0.333,0.333,0.333": "sum to 0.999",
        "1.5,-0.5": "a weight is -0.5",
        "1": "has 1 numbers",
        "a,b": "not a number",
        "nan,1": "not a number",
        "inf,0": "not a number",
        "1/0,1": "not a number",
    }.items():
        count = 3 if text.count(",") == 2 else 2
        with pytest.raises(UsageError, match=match):
            weighting.by_hand(text, count)


def test_decays_from_a_file(tmp_path):
    path = tmp_path / "decay.txt"
    path.write_text("# shares of 3.4e-4\n0.9  # one\n\n1/2\n0\n")
    assert weighting.by_file(path, 4).weights == pytest.approx([0.1, 0.4, 0.5, 0.0])
    for text, match in {
        "0.5\n0.4\n": "has 2 values, 4 checkpoints need 3",
        "0.4\n0.5\n0.1\n": "is 0.5, after 0.4",
        "1.5\n0.5\n0.1\n": "is 1.5, after 1",
        "0.5\n0.1\n-0.1\n": "after -0.1",
        "0.5\nhalf\n0.1\n": "not a number",
    }.items():
        path.write_text(text)
        with pytest.raises(UsageError, match=match):
            weighting.by_file(path, 4)
    with pytest.raises(UsageError, match="cannot be read"):
        weighting.by_file(tmp_path / "none", 4)


def test_the_best_by_their_scores(tmp_path):
    names = ["runs/iter_1", "runs/iter_2", "runs/iter_3", "runs/iter_4"]
    scores = tmp_path / "scores.csv"
    scores.write_text("checkpoint,score\niter_1,0.5\nruns/iter_2,0.7\niter_4,0.7\niter_3,0.6\n")
    assert weighting.best(names, scores, 2) == [1, 3]
    assert weighting.best(names, scores, 3) == [1, 2, 3]
    assert weighting.best(names, scores, 1) == [3]  # of equal ones the later
    assert weighting.best(names, scores, 2, lower_is_better=True) == [0, 2]
    scores.write_text("name,step,score\niter_1,10,3\niter_2,20,1\niter_3,30,2\niter_4,40,0\n")
    assert weighting.best(names, scores, 2) == [0, 2]


@pytest.mark.parametrize(
    ("text", "count", "match"),
    [
        ("iter_1,0.5\n", 1, "no score for iter_2"),
        ("iter_1,0.5\niter_2,0.6\n", 3, "there are 2"),
        ("iter_1,0.5\niter_1,0.6\niter_2,1\n", 1, "two scores for iter_1"),
        ("iter_1,0.5\niter_2,good\n", 1, "not a number"),
        ("iter_1\niter_2\n", 1, "no checkpoint with its score"),
    ],
)
def test_scores_that_do_not_fit(tmp_path, text, count, match):
    scores = tmp_path / "scores.csv"
    scores.write_text(text)
    with pytest.raises(UsageError, match=match):
        weighting.best(["iter_1", "iter_2"], scores, count)
