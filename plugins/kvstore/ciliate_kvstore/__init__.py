"""Key-value store providers and the identity backend over them."""
