"""Trees of tensors as immutable values.

`tree` has frozen mappings and functions on nested containers, `module` views live modules, `forward` calls a model with
the weights of a state, `donation` lets the next update write to a tree. A line here may use out-of-place torch; only
`module` and `donation` write to tensors, which they are given for that.
"""
