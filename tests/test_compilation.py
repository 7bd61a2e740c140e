"""One compile each: values that change between calls are arguments, not constants."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import bnncert as bc

SIZE, CLASSES, BATCH = 4, 3, 6
KEY = jax.random.key(0)


def apply(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x)


def weights(seed, count=()):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w": jax.random.normal(keys[0], (*count, 5, SIZE)),
        "v": jax.random.normal(keys[1], (*count, CLASSES, 5)),
    }


def inputs(seed):
    x = jax.random.uniform(jax.random.key(seed), (BATCH, SIZE))
    return x, jnp.arange(BATCH) % CLASSES


@pytest.fixture(autouse=True)
def fresh_counters():
    chex.clear_trace_counter()
    yield
    chex.clear_trace_counter()


def once(f):
    """Jitted; a second trace raises."""
    return jax.jit(chex.assert_max_traces(lambda *args: f(*args), n=1))


def test_the_counter_counts():
    f = once(lambda x: x)
    f(jnp.zeros(2))
    with pytest.raises(AssertionError, match="traced"):
        f(jnp.zeros(3))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_bounds(method):
    bounded = bc.bound(apply, method)
    run = once(lambda p, x, eps: bounded(p, bc.ball(x, eps)))
    boxes = [run(weights(i), inputs(i)[0][0], jnp.float32(0.1 * i)) for i in range(3)]
    assert (boxes[2].upper > boxes[2].lower).all()


def test_bounds_over_weights():
    bounded = bc.ibp(apply)
    run = once(lambda p, x, eps: bounded(jax.tree.map(lambda v: bc.ball(v, eps), p), x))
    for i in range(3):
        run(weights(i), inputs(i)[0][0], jnp.float32(0.1 * i))


@pytest.mark.parametrize(("name", "eps"), [("svi", 0.1), ("map", [0.1, 0.2]), ("swag", 0.1)])
def test_updates_take_a_schedule_without_a_recompile(name, eps):
    algorithm = getattr(bc.infer, name).build(
        bc.likelihood.robust_categorical(apply),
        bc.prior.normal(weights(0)),
        num_data=100,
        optimizer=optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-2)),
    )
    state = algorithm.init(KEY, weights(0))
    run = once(algorithm.update)
    for i in range(4):
        threat = bc.Threat(*(jnp.asarray(v, jnp.float32) for v in (eps, 1 - 0.2 * i, 0.1 * i)))
        threat = threat._replace(eps=i * threat.eps)
        x, y = inputs(i)
        mask = jnp.ones(BATCH).at[:i].set(0.0)
        state, info = run(jax.random.key(i), state, bc.Batch(x, y, mask), threat)
        assert jnp.isfinite(info.loss)


def test_a_python_number_in_the_threat_does_retrace():
    """The documented limit: a schedule is arrays; this is what it costs otherwise."""
    f = once(lambda threat: threat.eps * 1.0)
    f(bc.Threat(jnp.float32(0.1), jnp.float32(0.5), jnp.float32(0.0)))
    with pytest.raises(AssertionError, match="traced"):
        f(bc.Threat(0.1, 0.5, 0.0))


def test_certificates():
    def both(samples, x, eps):
        box = bc.ball(x, eps, clip=(0.0, 1.0))
        found = bc.certify.decision(apply, samples, box, x=x)
        return found, bc.certify.predictive(apply, samples, box)

    run = once(jax.vmap(both, in_axes=(None, 0, None)))
    for i in range(3):
        found, _ = run(weights(i, (4,)), inputs(i)[0], jnp.float32(0.1 * i))
        assert jnp.isfinite(found.margins).all()


def test_attacks():
    def one(key, samples, x, y, eps):
        found = bc.attack.pgd(key, apply, samples, x, y, eps, steps=3, restarts=2)
        return found, bc.attack.fgsm(apply, samples, x, y, eps)

    run = once(jax.vmap(one, in_axes=(0, None, 0, 0, None)))
    for i in range(3):
        x, y = inputs(i)
        run(
            jax.random.split(jax.random.key(i), BATCH), weights(i, (4,)), x, y, jnp.float32(0.1 * i)
        )


def test_posterior_samples():
    q = bc.MeanField(weights(0), jax.tree.map(jnp.ones_like, weights(0)))
    run = once(lambda key, q: q.sample(key, 4))
    for i in range(3):
        run(jax.random.key(i), q)
