"""Grids of hand-made optimizers, and learned ones as contenders."""

import jax
import numpy as np
import optax
import pytest
from blobs import TASK
from experiment import find_meta_params
from optax import contrib

from mlhf_optax import gauss_newton, load_pretrained
from mlhf_optax.experiments import (
    Contender,
    compare,
    constant_contender,
    default_adam,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.experiments.cli import commands, list_command, train_command
from mlhf_optax.learned import LEARNED
from mlhf_optax.tasks import get_task

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_the_grid_is_that_of_the_paper():
    contenders = grid_contenders()
    assert [len(one.names) for one in contenders] == [9, 9, 27]
    assert len({name for one in contenders for name in one.names}) == 45
    decays = {"sgd": {"momentum"}, "rmsprop": {"decay"}, "adam": {"b1", "b2"}}
    for one in contenders:
        for setting in one.settings:
            values = dict(setting)
            assert values.pop("learning_rate") in (0.1, 0.01, 0.001)
            assert values.keys() == decays[one.family]
            assert set(values.values()) <= {0.9, 0.99, 0.999}


def test_learning_rates_of_the_paper_grow_with_the_batch():
    (sgd,) = grid_contenders(["sgd"], batch_size=64, baseline_batch_size=256)
    assert {setting["learning_rate"] for setting in sgd.settings} == {0.025, 0.0025, 0.00025}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sgd", optax.sgd(0.5, momentum=0.9)),
        ("rmsprop", optax.rmsprop(0.5)),
        ("adam", optax.adam(0.5)),
        ("muon", contrib.muon(0.5)),
    ],
)
def test_with_rates_all_else_is_as_optax_has_it(family, expected):
    (contender,) = grid_contenders([family], rates=[0.1, 0.5])
    ours = contender.make_optimizer(**{name: values[1] for name, values in contender.stacked.items()})
    params = TASK.init_fn(jax.random.key(0))
    updates = [tx.update(params, tx.init(params), params)[0] for tx in (ours, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *updates)


def test_all_families_train_side_by_side():
    grids = grid_contenders(["sgd", "adam", "muon"], rates=rates_per_decade(0.01, 0.1))
    frame = compare(TASK, [*grids, default_adam()], [1, 9], seeds=[0], timed=False).frame
    assert frame["optimizer"].n_unique() == 13
    first, last = (frame.filter(step=step)["train_loss"].to_numpy() for step in (1, 9))
    assert (last < first).all()
    adam = frame.filter(optimizer="adam defaults")["train_loss"].to_list()
    found = grid_contenders(["adam"], rates=[1e-3])
    again = compare(TASK, found, [1, 9], seeds=[0], timed=False).frame["train_loss"].to_list()
    assert again == pytest.approx(adam)


def test_constants_train_side_by_side_as_they_do_alone():
    contender = constant_contender(TASK, [1.0, 10.0], metric="diagonal", learning_rate=0.5)
    assert contender.settings[1] == {"damping": 10.0, "metric": "diagonal", "learning_rate": 0.5}
    frame = compare(TASK, [contender], [3], seeds=[0], timed=False).frame
    alone = gauss_newton(0.5, TASK.predict_fn, TASK.loss_fn, damping=10.0, metric="diagonal")
    single = Contender("alone", ("alone",), ({},), lambda: alone)
    expected = compare(TASK, [single], [3], seeds=[0], timed=False).frame["train_loss"][0]
    assert frame["train_loss"][1] == pytest.approx(expected, rel=1e-5)
    assert frame["train_loss"][0] != frame["train_loss"][1]


def test_the_command_line_knows_the_constants_by_name(capsys):
    asked = commands.parse(["train", "--optimizers", "gauss_newton"]).optimizers
    (contender,) = train_command._other_contenders(TASK, asked)
    assert contender.names == tuple(f"gauss_newton damping={damping}" for damping in (1, 3, 10))
    assert train_command._describe([contender]) == "3 constants of gauss_newton"
    list_command.list_all()
    assert "constant (1, 3 or 10): gauss_newton" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.parse(["train", "--help"])
    assert "gauss_newton is the control" in " ".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["adam", "lion"]}, r"must be among \['sgd', 'rmsprop', 'adam'\], got \['lion'\]"),
        ({"families": ["muon"]}, r"must be among .*, got \['muon'\]"),
        ({"families": ["lion"], "rates": [0.1]}, r"'adam', 'muon'\], got \['lion'\]"),
        ({"rates": []}, "`rates` is empty"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"baseline_batch_size": 0}, "`baseline_batch_size` must be at least 1, got 0"),
    ],
)
def test_arguments_of_the_grid_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_contenders(**arguments)


def test_a_learned_contender_is_what_its_record_recommends_unless_told_otherwise():
    task, learned = get_task("digits-mlp"), load_pretrained("digits")
    changes = {"num_cg_steps": 2, "learning_rate": 0.5}
    contender = learned_contender(task, learned, name="CG 2", source="digits", **changes)
    name = next(iter(LEARNED))
    assert (contender.family, contender.names) == (name, (f"{name} CG 2",))
    (settings,) = contender.settings
    assert settings["max_update_ratio"] == learned.record["max_update_ratio"]
    assert (changes | {"meta_params": "digits"}).items() <= settings.items()
    other = learned._replace(meta_params=jax.tree.map(lambda leaf: leaf + 1, learned.meta_params))
    digests = {learned_contender(task, one).settings[0]["meta_params_digest"] for one in (learned, other)}
    assert len(digests) == 2


def test_a_learned_optimizer_trains_a_task():
    contender = learned_contender(TASK, find_meta_params(TASK, "untrained")[1])
    first, last = compare(TASK, [contender], [1, 5], seeds=[0], timed=False).frame["train_loss"]
    assert last < 0.8 * first
