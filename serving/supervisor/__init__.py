"""The parent process of a server: starts the engine and the frontends, and keeps them. No JAX."""
