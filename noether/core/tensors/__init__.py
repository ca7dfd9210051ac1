"""Trees of tensors as values: frozen mappings, views of live modules, donation. Out-of-place torch only."""
