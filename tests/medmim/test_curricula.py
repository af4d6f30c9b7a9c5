"""Weights of the levels over the epochs."""

import pytest

from medmim.losses import curriculum_factors


@pytest.mark.parametrize(
    ("epoch", "coarse", "fine"), [(0, 2, 0), (200, 1.9239, 0.3827), (400, 1.7071, 0.7071), (800, 1, 1)]
)
def test_checked_values_of_800_epochs(epoch, coarse, fine):
    assert curriculum_factors("coarse_to_fine", epoch, 800) == pytest.approx((coarse, 1, fine), abs=5e-5)
    assert curriculum_factors("fine_to_coarse", epoch, 800) == pytest.approx((fine, 1, coarse), abs=5e-5)
    assert curriculum_factors("concurrent", epoch, 800) == (1, 1, 1)


def test_start_leaves_one_level_out_exactly():
    assert curriculum_factors("coarse_to_fine", 0, 10)[2] == 0
    assert curriculum_factors("fine_to_coarse", 0, 10)[0] == 0


@pytest.mark.parametrize("n_levels", [2, 4])
def test_other_numbers_of_levels(n_levels):
    factors = curriculum_factors("coarse_to_fine", 5, 10, n_levels)
    assert len(factors) == n_levels
    assert factors[0] == pytest.approx(1.7071, abs=5e-5)
    assert factors[-1] == pytest.approx(0.7071, abs=5e-5)
    assert set(factors[1:-1]) <= {1.0}
    assert curriculum_factors("concurrent", 5, 10, 1) == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("easy_first", 0, 10),
            "curriculum must be one of concurrent, coarse_to_fine, fine_to_coarse, found 'easy_first'",
        ),
        (("concurrent", 11, 10), "epoch 11 lies outside a training of 10 epochs"),
        (("concurrent", -1, 10), "epoch -1 lies outside"),
        (("concurrent", 0, 0), "training of 0 epochs"),
        (("fine_to_coarse", 0, 10, 1), "curriculum fine_to_coarse needs two levels or more, found 1: take concurrent"),
    ],
)
def test_what_is_no_curriculum_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        curriculum_factors(*arguments)
