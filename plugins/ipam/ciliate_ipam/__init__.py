"""Address allocation providers."""
