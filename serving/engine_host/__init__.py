"""The engine process: an engine, and the service that frontends attach to."""
