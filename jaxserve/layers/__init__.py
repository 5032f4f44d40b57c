"""Building blocks of the decoder: pure functions and small nnx modules, on arrays only."""
