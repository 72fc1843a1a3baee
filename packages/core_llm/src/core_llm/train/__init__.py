"""One training loop for everything: see `fit`."""
