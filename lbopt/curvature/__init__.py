r"""The curvature of a model's loss, layer by layer.

For a layer with parameters ``W [in, out]`` (kernel with the bias as last row), inputs
``a`` (with a 1 for the bias) and gradients ``g`` of one example's loss at the outputs:

* ``A``, the second moment of the inputs, ``[in, in]``, a mean over rows (examples ×
  locations);
* ``G``, the second moment of the output gradients, ``[out, out]``, a sum over locations
  and a mean over examples;
* ``F ≈ A ⊗ G``, the layer's block of the Fisher matrix, which acts on ``W`` in
  row-major order.

Inputs and output gradients arrive in the weight-sharing format
``[*stack, batch, shared, features]``: ``stack`` numbers independent copies (convolution
groups), ``batch`` examples, ``shared`` the locations, tokens or uses that share one
kernel.  The backward signal of a loss that averages n terms is ``δ = g / n``; every
division stands in ``curvature.block``.

The rooms, in the order in which data passes through them: ``tap_rules`` and
``flax_layers`` (what a layer is), ``capture`` (the tap), ``kronecker``,
``doubly_factored``, ``unit_wise`` and ``diagonal`` (the blocks), ``fisher`` (loss,
gradient and statistics at once), ``fisher_products`` (the exact Fisher between
vectors), ``refresh`` (when statistics are renewed).
``discovery`` and ``registry`` make the table of layers; ``verification`` tests it.
"""
