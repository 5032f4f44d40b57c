"""One config-driven decoder and the families that configure it."""
