"""The figure of a training draws what it is given."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import StepInfo, plot_info


def info_of(steps, **changes):
    """An info of so many steps in one, and of each step by itself."""
    fields = {name: jnp.linspace(1.0, 2.0, steps) for name in StepInfo._fields}
    fields |= {"skipped_steps": jnp.zeros(steps, jnp.int32), "reduction_ratio": jnp.zeros(steps), **changes}
    stacked = StepInfo(**fields)
    return stacked, [StepInfo(*(field[i] for field in stacked)) for i in range(steps)]


def drawn(axes):
    return [np.asarray(line.get_ydata()) for line in axes.lines]


def test_it_draws_the_fields_that_it_names():
    loss, residual = jnp.array([8.0, 4.0, 2.0]), jnp.array([0.5, 0.25, 0.125])
    ratio = jnp.array([1.0, 0.5, -0.5])
    _, history = info_of(3, loss=loss, cg_residual_norm=residual, reduction_ratio=ratio)
    axes = plot_info(history, title="three steps").axes
    assert axes[0].figure.get_suptitle() == "three steps"
    np.testing.assert_array_equal(drawn(axes[0])[0], loss)
    np.testing.assert_array_equal(drawn(axes[0])[1], history[0].smoothed_loss + np.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(drawn(axes[1])[0], [1.0, 1.5, 2.0])
    np.testing.assert_array_equal(drawn(axes[2])[0], residual)
    np.testing.assert_array_equal(drawn(axes[3])[0], ratio)
    assert [a.get_yscale() for a in axes] == ["log", "log", "log", "linear"]
    assert not axes[3].texts


def test_a_stacked_history_and_a_list_are_the_same_figure():
    stacked, history = info_of(4)
    for one, other in zip(plot_info(stacked).axes, plot_info(history).axes, strict=True):
        for first, second in zip(drawn(one), drawn(other), strict=True):
            np.testing.assert_array_equal(first, second)


def test_skipped_steps_are_marked():
    _, history = info_of(5, skipped_steps=jnp.array([0, 1, 1, 2, 2]))
    for axes in plot_info(history).axes:
        marks = [segment[0, 0] for segment in axes.collections[-1].get_segments()]
        assert marks == [2, 4]


def test_a_ratio_that_no_step_measured_is_said_to_be_so():
    assert plot_info(info_of(2)[1]).axes[3].texts[0].get_text() == "not measured"


def test_losses_without_a_logarithm_are_drawn_too(tmp_path):
    _, history = info_of(2, loss=-jnp.ones(2), smoothed_loss=-jnp.ones(2), cg_residual_norm=jnp.zeros(2))
    figure = plot_info(history)
    assert [axes.get_yscale() for axes in figure.axes[::2]] == ["linear", "linear"]
    figure.savefig(tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 0


def test_one_step_is_a_history():
    assert drawn(plot_info(info_of(1)[1][0]).axes[0])[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [([], ValueError, "at least one step"), ([1.0], TypeError, r"StepInfo of each step, got float")],
)
def test_what_is_no_history_is_refused(history, error, message):
    with pytest.raises(error, match=message):
        plot_info(history)
