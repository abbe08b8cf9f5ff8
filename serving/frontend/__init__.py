"""A frontend process: the public service, and its link to the engine process. No JAX."""
