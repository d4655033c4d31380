"""CNI: the executable shim and the chaining modes."""
