import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbopt import checks

WAY_OUT = "0.5 is usual"
BOUNDS = {
    checks.positive: ("be positive", [1e-30, 3, 1e30], [0, -1]),
    checks.not_negative: ("be 0 or positive", [0, 0.0, 3], [-1e-30]),
    checks.below_one: (r"lie in \[0, 1\)", [0, 0.999], [1, -1e-9]),
    checks.share: (r"lie in \(0, 1\]", [1e-9, 1], [0, 1.001]),
    checks.whole: ("be a whole number, ≥ 1", [1, 10**12], [0, -1]),
}
NUMPY = {checks.whole: np.int32}


@pytest.mark.parametrize("check", BOUNDS, ids=lambda check: check.__name__)
def test_numbers_within_bounds_pass_and_others_are_refused_by_name(check):
    wanted, sound, unsound = BOUNDS[check]
    of_numpy = NUMPY.get(check, np.float64)
    for value in sound:
        check("x", value, WAY_OUT)
        check("x", of_numpy(value) if value < 2**31 else value, WAY_OUT)
    for value in unsound:
        for same in (value, of_numpy(value)):
            with pytest.raises(ValueError, match=rf"^x=.* must {wanted}; {WAY_OUT}$"):
                check("x", same, WAY_OUT)


@pytest.mark.parametrize("check", BOUNDS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "value", ["0.1", None, True, float("nan"), float("inf"), np.float32("nan"), [0.5]]
)
def test_what_is_no_number_is_refused(check, value):
    with pytest.raises(ValueError, match=r"^x=.*; 0.5 is usual$"):
        check("x", value, WAY_OUT)


@pytest.mark.parametrize("check", BOUNDS, ids=lambda check: check.__name__)
def test_arrays_of_jax_are_read_where_they_have_a_value(check):
    _, sound, unsound = BOUNDS[check]
    check("x", jnp.asarray(sound[0]), WAY_OUT)
    for value in (unsound[0], True, 1j, float("nan"), sound[:1]):
        with pytest.raises(ValueError, match=r"^x=.*; 0.5 is usual$"):
            check("x", jnp.asarray(value), WAY_OUT)


@pytest.mark.parametrize("check", BOUNDS, ids=lambda check: check.__name__)
def test_of_traced_arrays_shape_and_type_are_checked(check):
    def trace(value):
        jax.eval_shape(lambda x: check("x", x, WAY_OUT), jnp.asarray(value))

    trace(-1)  # of a value that is not known here
    if check is not checks.whole:
        trace(jnp.nan)
    for value in (True, 1j, [1]) + (0.5,) * (check is checks.whole):
        with pytest.raises(ValueError, match=r"^x=.*; 0.5 is usual"):
            trace(value)


def test_an_array_of_numpy_that_holds_one_number_is_that_number():
    checks.positive("x", np.asarray(2.0), WAY_OUT)
    with pytest.raises(ValueError, match="must be positive"):
        checks.positive("x", np.asarray(-2.0), WAY_OUT)
    with pytest.raises(ValueError, match="must be a number, positive"):
        checks.positive("x", np.ones(3), WAY_OUT)


@pytest.mark.parametrize("check", [checks.positive, checks.not_negative])
def test_schedules_pass_only_where_they_may(check):
    falling = optax.linear_schedule(1.0, -1.0, transition_steps=1)
    check("x", falling, WAY_OUT, schedule=True)
    jax.eval_shape(lambda k: check("x", lambda _: k, WAY_OUT, schedule=True), 1.0)
    with pytest.raises(ValueError, match=r"^x=.* must be a number, .*; 0.5 is usual$"):
        check("x", falling, WAY_OUT)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, "1", None, jnp.ones(2)])
def test_a_schedule_is_a_number_at_its_first_step(value):
    with pytest.raises(ValueError, match=r"^x\(0\)=.* must be .*; 0.5 is usual$"):
        checks.positive("x", lambda _: value, WAY_OUT, schedule=True)


def test_a_share_may_be_zero_where_that_is_said():
    for value in (0, 1, np.float32(0.5)):
        checks.share("x", value, WAY_OUT, zero=True)
    for value in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"x=.* must lie in \[0, 1\]; 0.5 is us"):
            checks.share("x", value, WAY_OUT, zero=True)


def test_a_number_on_which_shapes_depend_is_no_array():
    checks.whole("x", np.int64(3), WAY_OUT, static=True)
    with pytest.raises(ValueError, match=r"x=3 must be a Python int, because shapes"):
        checks.whole("x", jnp.asarray(3), WAY_OUT, static=True)


def test_whole_numbers_are_whole():
    checks.whole("x", 0, WAY_OUT, least=0)
    for value in (1.0, np.float64(2), 0.5):
        with pytest.raises(ValueError, match=r"must be a whole number, ≥ 0; 0\.5"):
            checks.whole("x", value, WAY_OUT, least=0)


def test_one_of_a_few():
    checks.one_of("x", "a", ["a", "b"])
    checks.one_of("x", None, ["a", None])
    for value in ("d", None, 1, np.zeros(2)):
        with pytest.raises(ValueError, match=r"x=.* must be 'a', 'b' or 'c'"):
            checks.one_of("x", value, ["a", "b", "c"])
