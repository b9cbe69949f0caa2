import gc
from collections import Counter

import pytest

from acs_triton.timing import Timing, interleaved


def test_every_round_runs_each_engine_once_and_after_others_than_before() -> None:
    ran: list[str] = []
    names = "abcdefghijkl"
    engines = {name: (lambda name=name: ran.append(name)) for name in names}
    timings = interleaved(engines, repeats=6, warmup=0)
    rounds = ["".join(ran[start : start + 12]) for start in range(0, 72, 12)]
    assert all(sorted(of_round) == list(names) for of_round in rounds) and len(set(rounds)) == 6
    assert {len(timing.samples) for timing in timings.values()} == {6}
    # In fewer rounds than there are engines.
    for name in names:
        assert len({of_round[of_round.index(name) - 1] for of_round in rounds if of_round[0] != name}) >= 3


def test_warmup_and_calls_are_counted() -> None:
    ran: Counter[str] = Counter()
    engines = {name: (lambda name=name: ran.update([name])) for name in "ab"}
    timings = interleaved(engines, repeats=5, warmup=2, calls=3)
    assert ran == {"a": (2 + 5) * 3, "b": (2 + 5) * 3}
    assert len(timings["a"].samples) == 5


def test_the_time_budget_ends_after_a_whole_round() -> None:
    shares: list[float] = []
    timings = interleaved({"a": int, "b": int}, repeats=1000, warmup=0, seconds=1e-9, progress=shares.append)
    assert [len(timing.samples) for timing in timings.values()] == [1, 1]
    assert shares == [1.0]


def test_another_clock_takes_the_samples() -> None:
    timings = interleaved({"a": int, "b": int}, repeats=3, calls=4, clock=lambda engine, calls: 10.0 * calls)
    assert {timing.samples for timing in timings.values()} == {(40.0, 40.0, 40.0)}


def test_progress_grows_to_one() -> None:
    shares: list[float] = []
    interleaved({"a": int}, repeats=4, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_percentiles() -> None:
    timing = Timing.of([float(value) for value in reversed(range(11))])
    assert (timing.p10, timing.median, timing.p90) == (1.0, 5.0, 9.0)
    assert timing.samples[0] == 10.0
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, (2.0,))


def test_garbage_collection_waits_and_comes_back_even_after_an_error() -> None:
    states: list[bool] = []

    def engine() -> None:
        states.append(gc.isenabled())
        if len(states) == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleaved({"a": engine}, repeats=5, warmup=1)
    assert states == [True, False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 0}, "repeats"), ({"warmup": -1}, "warmup"), ({"calls": 0}, "calls"), ({"seconds": 0}, "seconds")],
)
def test_counts_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"interleaved: {message} must be"):
        interleaved({"a": int}, **options)


def test_no_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="engines is empty"):
        interleaved({})
