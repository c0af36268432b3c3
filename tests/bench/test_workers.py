"""Tasks in processes: what fails or dies costs its own task alone. Tasks are expressions for `eval`."""

from functools import partial
from typing import Any

from clric_encoder.bench.workers import TaskError, do_all, timed_alone

PID = "__import__('os').getpid()"


def test_what_dies_costs_its_own_task_alone() -> None:
    tasks = [f"1, {PID}", "__import__('os')._exit(9)", "1 / 0", f"2, {PID}", f"3, {PID}"]
    started: list[Any] = []
    outcomes = dict(do_all(eval, tasks, 1, started.append))
    assert started == tasks
    first, died, failed, second, third = (outcomes[task] for task in tasks)
    assert isinstance(died, TaskError)
    assert "code 9" in str(died)
    assert str(failed) == "ZeroDivisionError: division by zero"
    assert (first[0], second[0], third[0]) == (1, 2, 3)
    assert first[1] != second[1] == third[1]  # another process after the death, and no more than that


def test_a_fresh_process_tells_its_seconds_and_its_peak() -> None:
    sleeps_while_it_opens = partial(eval, "__import__('time').sleep(4) or (lambda size: len(b'x' * size))")
    result, seconds, peak = timed_alone(sleeps_while_it_opens, 300_000_000)
    assert result == 300_000_000
    assert seconds < 4  # its opening is not counted
    assert peak is None or 300 < peak < 450
