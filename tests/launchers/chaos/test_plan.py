"""Which strikes a seed means."""

from launchers.chaos.plan import BLOWS, FAULTS_OF_DISK, FAULTS_OF_S3, WHEN, plan


def test_the_plan_is_a_function_of_its_seed() -> None:
    assert plan(5, 50, 200, 4) == plan(5, 50, 200, 4) != plan(6, 50, 200, 4)


def test_a_long_plan_strikes_everyone_everywhere_in_rising_steps() -> None:
    strikes = plan(0, 3000, 500, 4)
    assert [strike.step for strike in strikes] == sorted(strike.step for strike in strikes)
    assert {strike.step for strike in strikes} <= set(range(1, 499))
    assert {strike.rank for strike in strikes} == {0, 1, 2, 3}
    seen = {(strike.whom, strike.when) for strike in strikes}
    assert seen == {(whom, when) for whom in BLOWS for when in WHEN if whom != "freeze" or when == "step"}
    assert {strike.damage for strike in strikes} == {"", "cut", "flip"}
    assert {strike.fault for strike in strikes} == {""}


def test_the_storage_is_struck_with_what_it_can_be_struck_with_and_nobody_else_then() -> None:
    for faults in (FAULTS_OF_DISK, FAULTS_OF_S3):
        strikes = [strike for strike in plan(0, 3000, 500, 4, faults) if strike.fault]
        assert {strike.fault for strike in strikes} == set(faults)
        assert {strike.whom for strike in strikes} == {"storage"} and not any(strike.damage for strike in strikes)
        assert 200 < len(strikes) < 500
        assert {strike.when for strike in strikes} <= {"step", "start"}


def test_every_strike_can_be_said() -> None:
    said = {str(strike) for strike in plan(0, 3000, 20, 2, (*FAULTS_OF_DISK, *FAULTS_OF_S3))}
    assert "SIGKILL to rank 1 before a manifest, from step 5, then a shard cut short" in said
    assert "the disk is full at step 7" in said and "S3 takes half of each upload at the start" in said
    assert not any("{" in line for line in said)
