"""What several records of one person cost, beside what the accountant says of one."""

import pytest

from dplora_jax.privacy import accounting, group_privacy


def test_group_privacy_of_one_record_is_the_accountants_and_of_more_is_more():
    """The control: what rows in place of units cost a person with four of them, less than the rule for groups of rows says."""
    one, four = (group_privacy.epsilon(0.1, 4.0, 20, 1e-5, count) for count in (1, 4))
    assert one == pytest.approx(accounting.epsilon(accounting.Mechanism(400, 0.1, 400, 4.0), 20, 1e-5), rel=2e-2)
    assert 3 * one < four < 6 * one
