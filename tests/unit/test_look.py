from finetune_operator.look import Memory


def asked(about: str, seconds: range) -> list[int]:
    """When it is asked about a child that stays stuck, by an operator that looks every second."""
    memory = Memory()
    return [second for second in seconds if memory.is_due(about, 1_800_000_000.0 + second)]


def test_a_stuck_child_is_asked_about_at_once_and_then_ever_less_often() -> None:
    assert asked("pod-uid", range(260)) == [0, 15, 45, 105, 165, 225]


def test_the_next_child_is_asked_about_at_once() -> None:
    memory = Memory()
    assert memory.is_due("prepare-uid", 1000.0)
    assert memory.is_due("ray-job-uid", 1001.0)
    assert not memory.is_due("ray-job-uid", 1002.0)


def test_a_clock_that_was_set_back_silences_nobody() -> None:
    memory = Memory()
    assert memory.is_due("pod-uid", 1000.0)
    assert memory.is_due("pod-uid", 400.0)
