"""Times: every unit that logs write, exact to the microsecond."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.data.records import parse_time

MICROS = st.integers(31_536_000_000_001, 7_258_118_399_999_999)


#: Below, a number of ns reads as one of µs, and one of µs as one of ms.
@given(st.integers(10**14, 7_258_118_399_999_999), st.integers(0, 999))
def test_whole_numbers_are_exact(micros: int, nanos: int) -> None:
    assert parse_time(micros * 1000 + nanos) == micros
    assert parse_time(str(micros * 1000 + nanos)) == micros
    assert parse_time(micros) == micros
    assert parse_time(micros // 1_000_000) == micros // 1_000_000 * 1_000_000


@given(MICROS)
def test_iso_is_exact(micros: int) -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
    assert parse_time(moment.isoformat()) == micros


@pytest.mark.parametrize(
    ("value", "micros"),
    [
        (1_700_000_000, 1_700_000_000_000_000),
        ("998706187200800000", 998_706_187_200_800),  # nanoseconds, and no day of the year 9987
        ("20260131", 1_769_817_600_000_000),
        (1_700_000_000.25, 1_700_000_000_250_000),
        ("1700000000.25", 1_700_000_000_250_000),
        (1_700_000_000_123, 1_700_000_000_123_000),
        (1_700_000_000_123_456_789, 1_700_000_000_123_456),
        (True, None), (float("nan"), None), (float("inf"), None), (10**30, None), ("soon", None), ("9" * 5000, None),
        (-1_700_000_000, None), (0, None), (None, None), ([], None),
    ],
)  # fmt: skip
def test_units_and_what_is_no_time(value: Any, micros: int | None) -> None:
    assert parse_time(value) == micros
