r"""K-FAC as a gradient transformation.

.. math:: U_\ell = (A_\ell + \pi_\ell \sqrt{\lambda} I)^{-1}\, \nabla W_\ell\,
          (G_\ell + \tfrac{1}{\pi_\ell} \sqrt{\lambda} I)^{-1}

with the factors' running averages A and G.  The transformation is a pipeline of the
curvature blocks' functions: statistics → factors → inverses → natural gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from lbopt import sharding
from lbopt._typing import Array, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.collectives import Axis
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer, Layers
from lbopt.settings import Periods, Placement
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import eigen_moments, kfac_state, renewal, validation
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.natural_gradient import precondition, put
from lbopt.transforms.statistics import Findings, Running, fold


def scale_by_kfac(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 1e-3,
    norm_damping: Scalar = 1.0,
    factor_decay: Scalar = 0.95,
    periods: Periods = Periods(),
    stale_threshold: Scalar | None = None,
    block_size: int | None = None,
    eigenvalues: Literal["kronecker", "corrected"] = "kronecker",
    placement: Placement = Placement(),
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of the layers' damped curvature.

    .. math:: A \leftarrow A + \frac{1 - \beta}{1 - \beta^k} (A_{\text{batch}} - A)

    is the running average after k statistics (debiased: the first is taken whole), and
    likewise for every other statistic; the natural gradient is as in the module's
    equation, with the trace-norm π of ``linalg.pi_damping``.

    Where a statistic is not finite the old average stays; where an inverse is not
    finite the old inverse stays and the layer's damping grows tenfold until one is.
    Both are counted in ``rejected``.

    With ``placement``, under ``jax.shard_map`` or ``jax.pmap`` over its axis, the
    gradients and statistics are those of each device's examples; the transformation
    averages them.  Factors are cut into equal shares over the devices, and each unit is
    inverted by one device (``lbopt.sharding``).

    Args:
      layers: the result of ``trace_layers``.
      damping: λ, in units of the curvature of the loss; a number or a schedule of the
        step.
      norm_damping: factor by which λ is multiplied for normalisation layers.
      factor_decay: β, in [0, 1); 0 keeps the last statistic alone.
      periods: steps between statistics and between inversions (``lbopt.Periods``).
      stale_threshold: α of SP-NGD's adaptive refresh (``curvature.refresh``), which
        takes the place of the periods: a statistic is renewed, and its factor inverted,
        when its own clock says so.  None for the periods.
      block_size: the largest number of rows of a factor that is kept whole; larger ones
        are cut into equal diagonal blocks.  None keeps all whole.
      eigenvalues: ``"kronecker"``: the products of the factors' eigenvalues.
        ``"corrected"`` is EKFAC: a layer with two symmetric factors gets their
        eigenbases, and in these the second moments s of the gradients for eigenvalues,
        :math:`U_A [(U_A^\top \nabla W U_G) / (s + \lambda)] U_G^\top`.  They are
        renewed at the period of statistics, so that bases may grow old.  Curvature has
        to be evaluated with ``due=lbopt.refresh(opt_state)``, and every device keeps
        bases and s.
      placement: the devices over which examples are spread, and where inverses live
        (``lbopt.Placement``).

    Returns:
      A transformation whose ``update`` takes ``curvature=``, the statistics of
      ``value_grad_and_curvature``, and ``damping=``, a λ for this step in the place of
      the setting.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import lbopt, optax
      >>> def make(layers):
      ...     return optax.chain(lbopt.scale_by_kfac(layers), optax.scale(-0.1))

    Source: Martens & Grosse 2015, §2–6; Ba, Grosse & Martens 2017; the adaptive refresh
    and the distribution: Osawa et al. 2022, §4.3 and §5; corrected eigenvalues: George
    et al. 2018.  The papers leave open how numbers that are not finite are treated;
    refusing them is our choice.  Until a layer's first statistic its gradient passes
    unchanged.  SP-NGD reduces each statistic to one device; here each device keeps a
    share of every statistic, which moves the same bytes without padding them to the
    largest owner.  Where only one factor of a layer is renewed, only that one is
    inverted, with π from the latest traces of both.
    """
    validation.check_settings(
        layers, damping, norm_damping, factor_decay, periods, block_size
    )
    validation.check_stale_threshold(stale_threshold, factor_decay, periods)
    validation.check_eigenvalues(eigenvalues, placement, periods, stale_threshold)
    axis = Axis(placement.axis_name, placement.axis_size)
    known = sharding.configured(
        layers.preconditioned,
        block_size=block_size,
        corrected=eigenvalues == "corrected",
    )
    adaptive = stale_threshold is not None

    def owners_of(own: Mapping[str, Layer]) -> Owners:
        gathered = None
        if axis.name is not None:
            gathered = sharding.gathered_layers(own, placement.inverses)
        phases: Any = periods.inverses if periods.stagger else 1
        units = sharding.units_of(own)
        return sharding.owners_of(units, axis.size, period=phases, gathered=gathered)

    def init_fn(params: Params) -> KfacState:
        own = validation.present_layers(known, params)
        state = kfac_state.init_state(
            own, owners_of(own), axis, adaptive, bool(periods.delay)
        )
        if eigenvalues == "kronecker":
            return state
        return state._replace(moments=eigen_moments.init_moments(own, state.inverses))

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        curvature: Mapping[str, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, KfacState]:
        del params
        axis.require()
        # JAX sorts the keys of a dictionary, and the clocks are numbered by its leaves.
        own = {path: known[path] for path in sorted(plain(state.factors))}
        statistics, squares = validation.checked_statistics(
            own, curvature, state.moments
        )
        validation.check_shares(own, plain(state.factors), axis)
        owners = owners_of(own)
        due = state.refresh.due
        state, findings = _average(
            own, state, statistics, factor_decay, stale_threshold, axis
        )
        state = eigen_moments.average(own, state, squares, factor_decay, axis)
        turn = _units_due(owners, state, findings, periods, adaptive)
        value = extra_args.get("damping", damping)
        value = value(state.count) if callable(value) else value
        amounts = renewal.amounts(own, state, value, norm_damping)
        before = state
        state, inverted = renewal.invert(
            own, owners, state, turn, amounts, axis, periods.delay
        )
        state = eigen_moments.carry(own, owners, before, state, inverted.accepted)
        updates, natural = precondition(own, owners, state, updates, axis)
        state = eigen_moments.scheduled(own, owners, state, periods.statistics)
        state = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            damping=amounts.astype(state.damping.dtype),
            refresh=_clocks(state, findings, periods.statistics, adaptive),
            report=kfac_state.report(
                own, owners, due, inverted, not adaptive, axis, before.moments
            ),
        )
        return put(own, updates, natural), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _units_due(
    owners: Owners,
    state: KfacState,
    findings: Findings,
    periods: Periods,
    adaptive: bool,
) -> Bool[Array, " units"]:
    """Returns which units the schedule wants inverted at this step."""
    if periods.inverses is None:  # BackgroundInversion makes them
        return jnp.zeros(len(owners.units), bool)
    if adaptive:
        return findings.accepted[np.asarray([u.statistic for u in owners.units])]
    return clocks.is_due(state.count, periods.inverses, np.asarray(owners.phase))


def _average(
    own: Mapping[str, Layer],
    state: KfacState,
    statistics: Mapping[str, Any],
    factor_decay: Any,
    stale_threshold: Any,
    axis: Axis,
) -> tuple[KfacState, Findings]:
    """Folds the statistics that are due and finite into the factors."""
    due, renewals = state.refresh.due, state.refresh.renewals
    weights = (1 - factor_decay) / (1 - factor_decay ** (renewals + 1.0))
    kinds = kfac_state.kinds(own)
    factors, tree = jax.tree.flatten(plain(state.factors))
    before = jax.tree.leaves(plain(state.before))
    running = [
        Running(
            kfac_state.rows(x, f, axis),
            kfac_state.rows(b, f, axis) if before else (),
            t,
        )
        for x, b, t, f in zip(
            factors,
            before or factors,
            jax.tree.leaves(state.traces),
            kinds,
            strict=True,
        )
    ]

    def packer(path: str, number: int) -> Callable[[], Array]:
        block = own[path].block
        size = block.factors[number].size
        return lambda: block.pack(statistics[path])[number].reshape(-1, size)

    packed = [
        packer(path, i) for path in own for i in range(len(own[path].block.factors))
    ]
    running, findings = fold(
        kinds, running, packed, due, weights, stale_threshold, axis
    )

    def rebuilt(rows: list[Array]) -> Any:
        shaped = [r.reshape(x.shape) for r, x in zip(rows, factors, strict=True)]
        whole = jax.tree.unflatten(tree, shaped)
        return Sharded(whole) if isinstance(state.factors, Sharded) else whole

    state = state._replace(
        factors=rebuilt([r.factor for r in running]),
        before=rebuilt([r.before for r in running]) if before else (),
        traces=jax.tree.unflatten(tree, [r.traces for r in running]),
        rejected=state.rejected + kfac_state.by_layer(due & ~findings.accepted, own),
        refresh=state.refresh._replace(
            renewals=renewals + findings.accepted,
            statistic_step=jnp.where(
                findings.accepted, state.count, state.refresh.statistic_step
            ),
        ),
    )
    return state, findings


def _clocks(
    state: KfacState, findings: Findings, stats_period: Any, adaptive: bool
) -> clocks.Refresh:
    """The clocks after this step, with what is due at the next."""
    refresh, coming = state.refresh, state.count + 1
    never = refresh.renewals == 0
    if not adaptive:
        return refresh._replace(due=clocks.is_due(coming, stats_period) | never)
    accepted, last = findings.accepted, refresh.interval
    interval = clocks.next_interval(
        findings.similar, findings.similar_before, last, refresh.previous_interval
    )
    interval = jnp.where(accepted, interval, last)
    return refresh._replace(
        interval=interval,
        previous_interval=jnp.where(accepted, last, refresh.previous_interval),
        # A statistic that was refused stays due.
        due=(coming >= refresh.statistic_step + interval) | never,
    )
