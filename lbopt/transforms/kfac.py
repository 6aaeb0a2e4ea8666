r"""K-FAC as a gradient transformation.

.. math:: U_\ell = (A_\ell + \pi_\ell \sqrt{\lambda} I)^{-1}\, \nabla W_\ell\,
          (G_\ell + \tfrac{1}{\pi_\ell} \sqrt{\lambda} I)^{-1}

with the factors' running averages A and G.  An update is a pipeline through the state:
statistics → factors (``statistics``) → inverses (``renewal``, ``inversion``) → natural
gradient (``natural_gradient``, ``placement``).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from lbopt import checks, explicit_axes, sharding
from lbopt._typing import Array, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.collectives import Axis
from lbopt.curvature import layer_table
from lbopt.curvature import refresh as clocks
from lbopt.curvature.refresh import Due
from lbopt.curvature.registry import Layer, Layers
from lbopt.settings import Periods, Placement
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import eigen_moments, inversion, kfac_state, renewal, validation
from lbopt.transforms.inversion import Inverted
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.natural_gradient import insert, precondition
from lbopt.transforms.statistics import Findings, Running, fold, nothing_found, weight


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

    .. math:: A \leftarrow (1 - w_k) A + w_k A_{\text{batch}}, \qquad
              w_k = \frac{1 - \beta}{1 - \beta^k}

    is the running average after k statistics (debiased: the first is taken whole), and
    likewise for every other statistic; the natural gradient is as in the module's
    equation, with the trace-norm π of ``linalg.pi_damping``.

    A statistic that is all zeros is of no row, as where ``nn.switch`` left a layer out:
    it is no statistic, and stays due.  One that is not finite leaves its average
    unchanged.  An inverse that is not finite leaves the old inverse in effect, and the
    layer's damping grows tenfold until one is.  A λ of a schedule or of
    ``update(damping=)`` that is not positive and finite leaves the last one in effect
    that was.  ``rejected`` counts all three by layer.  With ``update(due=)`` what was
    refused waits until it is due again.

    With ``placement``, under ``jax.shard_map`` or ``jax.pmap`` over its axis, the
    gradients and statistics are those of each device's examples; the transformation
    averages them.  Factors are cut into equal shares over the devices, and each unit (a
    copy or diagonal block of a factor) is inverted by one device (``lbopt.sharding``).

    Args:
      layers: the result of ``trace_layers``.
      damping: λ, in units of the curvature of the loss; a number or a schedule of the
        step.
      norm_damping: factor by which λ is multiplied for normalisation layers.
      factor_decay: β, in [0, 1); 0 keeps the last statistic alone.
      periods: steps between statistics and between inversions (``lbopt.Periods``).
      stale_threshold: α of SP-NGD's adaptive refresh (``curvature.refresh``), which
        replaces the periods: each statistic is renewed, and its factor inverted, at
        intervals that follow how much it changes.  None for the periods.
      block_size: the largest number of rows of a factor that is kept whole; larger ones
        are cut into equal diagonal blocks.  None keeps all whole.
      eigenvalues: ``"kronecker"``: the products of the factors' eigenvalues.
        ``"corrected"`` is EKFAC: a layer with two symmetric factors gets their
        eigenbases, and in these the second moments s of the gradients for eigenvalues,
        :math:`U_A [(U_A^\top \nabla W U_G) / (s + \lambda)] U_G^\top`.  They are
        renewed at the period of statistics, so that bases may be renewed rarely.
        Evaluate curvature with ``due=lbopt.refresh(opt_state)``.  Bases and s are
        replicated on every device.
      placement: the devices over which examples are spread, and where inverses live
        (``lbopt.Placement``).

    Returns:
      A transformation whose ``update`` takes ``curvature=``, the statistics of
      ``value_grad_and_curvature``, and optionally ``damping=``, the λ of this step, and
      ``due=``, what this step renews (``Periods.due``): the program then holds no more
      than that.  Without it flags in the state decide.

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
        layers, damping, norm_damping, factor_decay, periods, placement, block_size
    )
    validation.check_stale_threshold(stale_threshold, factor_decay, periods)
    validation.check_eigenvalues(eigenvalues, placement, periods, stale_threshold)
    known = layer_table.configured(
        layers.preconditioned,
        block_size=block_size,
        corrected=eigenvalues == "corrected",
    )
    own = _Settings(
        known, norm_damping, factor_decay, periods, stale_threshold, placement
    )
    axis = own.axis
    # The host knows neither what has changed nor which bases there are.
    by_flags = own.adaptive or eigenvalues == "corrected"

    # optax.tree_map_params asks for a state without saying which layers are masked:
    # those of the last init are.
    last = {"present": known}

    def init_fn(params: Params) -> KfacState:
        if validation.is_placeholder(params):
            present = last["present"]
        else:
            present = last["present"] = validation.present_layers(known, params)
        state = kfac_state.init_state(
            present,
            own.owners(present),
            axis,
            own.adaptive,
            bool(periods.delay),
            (0, 0) if by_flags else periods.counted(),
        )
        first = damping(state.count) if callable(damping) else damping
        state = state._replace(last_damping=jnp.array(first, float))  # may be donated
        if eigenvalues == "kronecker":
            return state
        return state._replace(
            moments=eigen_moments.init_moments(present, state.inverses)
        )

    def placed(due: Due, *args: Any) -> tuple[Updates, KfacState]:
        # The updates are laid out as the gradients.
        layouts = explicit_axes.specs_of(args[:2])
        step = functools.partial(own.step, due)
        return explicit_axes.on_auto_axes(step, args, layouts)

    # One program outside of jit too: there each loop would be compiled at every call.
    compiled = jax.jit(placed, static_argnums=0)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        curvature: Mapping[str, Any] | None = None,
        due: Due = Due(),
        **extra_args: Any,
    ) -> tuple[Updates, KfacState]:
        del params
        validation.require_no_multi_steps()
        axis.require()
        kfac_state.require_state(state)
        present = {path: known[path] for path in plain(state.factors)}
        validation.check_due(due, by_flags)
        given: Any = ({}, {})
        if due.statistics is not False:
            given = validation.checked_statistics(present, curvature, state.moments)
        validation.check_gradients(present, updates)
        validation.check_shares(present, state.factors, axis)
        value = _damping_now(state, extra_args.get("damping", damping))
        args = (updates, state, given, value)
        if axis.name is None:
            validation.require_same_on_devices((updates, given))
        return (placed if _is_traced(args) else compiled)(due, *args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Settings(NamedTuple):
    """The arguments of ``scale_by_kfac`` that an update needs."""

    known: Mapping[str, Layer]
    norm_damping: Scalar
    factor_decay: Scalar
    periods: Periods
    stale_threshold: Scalar | None
    placement: Placement

    @property
    def axis(self) -> Axis:
        """The devices."""
        return Axis(self.placement.axis_name, int(self.placement.axis_size))

    @property
    def adaptive(self) -> bool:
        """Whether the refresh is adaptive."""
        return self.stale_threshold is not None

    def owners(self, present: Mapping[str, Layer]) -> Owners:
        """Assigns the units of layers to devices."""
        return _owners(present, self.axis, self.periods, self.placement)

    def step(
        self,
        due: Due,
        updates: Updates,
        state: KfacState,
        given: tuple[Any, Any],
        damping: Any,
    ) -> tuple[Updates, KfacState]:
        """One update, given the statistics and squares of the batch and λ."""
        axis, periods, adaptive = self.axis, self.periods, self.adaptive
        statistics, squares = given
        # Sorted, as JAX sorts the keys of a dictionary: clocks are numbered by leaves.
        present = {path: self.known[path] for path in sorted(plain(state.factors))}
        owners = self.owners(present)
        # At this step; _clocks sets that of the next.
        flags = state.refresh.due
        wanted = flags if due.statistics is None else due.statistics
        state, findings = _average(
            present,
            state,
            statistics,
            wanted,
            self.factor_decay,
            self.stale_threshold,
            axis,
        )
        state, empty = eigen_moments.average(
            present, state, squares, self.factor_decay, axis
        )
        state = _with_damping(state, damping)
        before = state  # whose bases the moments are in
        state, inverted = self._invert(due, present, owners, state, findings)
        state = eigen_moments.carry(present, owners, before, state, inverted.accepted)
        updates, natural = precondition(present, owners, state, updates, axis)
        state = eigen_moments.scheduled(
            present, owners, state, periods.statistics, empty
        )
        state = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            refresh=_clocks(state, findings, periods.statistics, adaptive),
            report=kfac_state.report(
                present,
                owners,
                jnp.broadcast_to(jnp.asarray(wanted), flags.shape),
                inverted,
                not adaptive,
                axis,
                before.moments,
            ),
        )
        return insert(present, updates, natural), state

    def _invert(
        self,
        due: Due,
        present: Mapping[str, Layer],
        owners: Owners,
        state: KfacState,
        findings: Findings,
    ) -> tuple[KfacState, Inverted]:
        """Renews the inverses that are due."""
        periods = self.periods
        # BackgroundInversion takes the damping of every step.
        if due.inverses is False and periods.inverses is not None and not periods.delay:
            return state, inversion.nothing_inverted(owners)
        amounts = renewal.amounts(present, state, state.last_damping, self.norm_damping)
        state = state._replace(damping=amounts.astype(state.damping.dtype))
        if periods.delay:
            scheduled = _units_due(due, owners, state, findings, periods, self.adaptive)
            return renewal.invert_later(
                present, owners, state, scheduled, amounts, self.axis, periods.delay
            )
        if due.inverses is False:
            return state, inversion.nothing_inverted(owners)
        scheduled = None
        if due.inverses is not True:
            scheduled = _units_due(due, owners, state, findings, periods, self.adaptive)
        return renewal.invert(present, owners, state, scheduled, amounts, self.axis)


def _is_traced(tree: Any) -> bool:
    """Whether a tree holds arrays of a function that is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _owners(
    layers: Mapping[str, Layer], axis: Axis, periods: Periods, placement: Placement
) -> Owners:
    """Assigns units to devices, and to the steps of a staggered period."""
    gathered = None  # all inverses are replicated
    if axis.name is not None:
        inverses = placement.inverses
        inverses = inverses if isinstance(inverses, str) else float(inverses)
        gathered = sharding.gathered_layers(layers, inverses)
    period: Any = periods.inverses if periods.stagger else 1
    units = sharding.units_of(layers)
    return sharding.owners_of(units, axis.size, period=period, gathered=gathered)


def _damping_now(state: KfacState, damping: Any) -> Any:
    """Returns λ of this step."""
    if callable(damping):
        return damping(state.count)
    # Of ``update(damping=)`` as of the setting: refused here if its value is known.
    own = "leave it out of update for the optimizer's own"
    checks.positive("damping", damping, own)
    return damping


def _with_damping(state: KfacState, damping: Any) -> KfacState:
    """Returns the state with λ of this step, or with the last sound one."""
    value, sound = renewal.sound_damping(damping, state.last_damping)
    return state._replace(last_damping=value, rejected=state.rejected + ~sound)


def _units_due(
    due: Due,
    owners: Owners,
    state: KfacState,
    findings: Findings,
    periods: Periods,
    adaptive: bool,
) -> Bool[Array, " units"]:
    """Returns which units the schedule wants inverted at this step."""
    if due.inverses is not None:
        return jnp.broadcast_to(jnp.asarray(due.inverses), (len(owners.units),))
    if periods.inverses is None:  # all but the first are BackgroundInversion's
        return jnp.zeros(len(owners.units), bool)
    if adaptive:  # a unit is due with its statistic
        return findings.accepted[np.asarray([u.statistic for u in owners.units])]
    return clocks.is_due(state.count, periods.inverses, np.asarray(owners.phase))


def _average(
    layers: Mapping[str, Layer],
    state: KfacState,
    statistics: Mapping[str, Any],
    due: Any,
    factor_decay: Any,
    stale_threshold: Any,
    axis: Axis,
) -> tuple[KfacState, Findings]:
    """Folds the statistics that are due and finite into the factors of the state."""
    renewals = state.refresh.renewals
    if due is False:
        return state, nothing_found(len(renewals))
    if due is not True:
        due = jnp.broadcast_to(due, renewals.shape)
    weights = weight(factor_decay, renewals)
    kinds = kfac_state.kinds(layers)
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
            before or factors,  # of equal length; not read if the refresh is periodic
            jax.tree.leaves(state.traces),
            kinds,
            strict=True,
        )
    ]

    # Functions, because a statistic that is not due is not even packed.
    def packer(path: str, number: int) -> Callable[[], Array]:
        block = layers[path].block
        size = block.factors[number].size
        return lambda: block.pack(statistics[path])[number].reshape(-1, size)

    packed = [
        packer(path, i)
        for path in layers
        for i in range(len(layers[path].block.factors))
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
        rejected=state.rejected
        + kfac_state.by_layer(due & ~findings.accepted & ~findings.empty, layers),
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
    """Returns the clocks after this step, with the statistics due at the next."""
    refresh, coming = state.refresh, state.count + 1
    never = refresh.renewals == 0  # such a statistic is due at once
    if not adaptive:
        due = clocks.is_due(coming, stats_period) | never | findings.empty
        return refresh._replace(due=due)
    accepted, last = findings.accepted, refresh.interval
    interval = clocks.next_interval(
        findings.similar, findings.similar_before, last, refresh.previous_interval
    )
    interval = jnp.where(accepted, interval, last)
    return refresh._replace(
        interval=interval,
        previous_interval=jnp.where(accepted, last, refresh.previous_interval),
        # After one that was refused or empty this still holds: it stays due.
        due=(coming >= refresh.statistic_step + interval) | never,
    )
