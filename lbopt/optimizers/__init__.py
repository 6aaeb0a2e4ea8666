"""Ready optimizers: chains of transformations with defaults, no arithmetic."""
