"""What a service tells about itself: metrics, one log line a request, traces. No JAX here.

    engine's thread:    Telemetry.on_outputs(a step's outputs) ─ended ones─> queue
    telemetry thread:   queue -> Report -> RequestMetrics, RequestLog, RequestSpans
    scrape's thread:    EngineCollector reads the engine's counters as they are then

Lives in the process that has the engine: it sees the requests of all frontends, on one port.
"""
