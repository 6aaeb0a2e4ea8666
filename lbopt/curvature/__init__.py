r"""Layer-wise curvature of a model's loss.

For a layer with parameters ``W [in, out]`` (kernel with the bias as last row), inputs a
(with a 1 for the bias) and gradients g of one example's loss at the outputs:

* A, the second moment of the inputs, ``[in, in]``, is a mean over rows (examples ×
  locations);
* G, the second moment of the output gradients, ``[out, out]``, is a sum over locations
  and a mean over examples;
* F ≈ A ⊗ G is the layer's block of the Fisher matrix, acting on W in row-major order.

Inputs and output gradients arrive in the weight-sharing format
``[*stack, batch, shared, features]``: ``stack`` numbers independent copies (convolution
groups), ``batch`` examples, ``shared`` the locations, tokens or calls that share one
kernel.  The backward signal of a loss that averages n terms is δ = g / n; all divisions
are in ``curvature.block``.

Modules, in the order in which data passes through them:

* ``discovery`` (with ``observation``, ``arrivals``, ``derivatives``, ``lifted_axes``)
  finds the layers of a loss, ``terms_search`` (with ``loss_head``, ``head_experiment``,
  ``weights_search``) its terms; ``registry`` builds the table, ``verification`` tests
  it;
* ``tap_rules`` and ``flax_layers`` define the block and the residual of each layer;
* ``capture`` taps the layers;
* ``kronecker``, ``embedding``, ``doubly_factored``, ``unit_wise`` and ``diagonal`` are
  the blocks, ``eigen_moments`` the EKFAC form, ``factor`` and ``linear_maps`` their
  parts;
* ``tapped_pass`` and ``evaluation`` evaluate a loss with taps, in ``Totals`` that add
  up over parts of a batch; ``fisher`` returns loss, gradient and statistics,
  ``fisher_products`` products with the exact Fisher matrix;
* ``likelihood`` declares the outputs' distribution;
* ``refresh`` schedules statistics and inverses.
"""
