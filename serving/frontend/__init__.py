"""A frontend process: the public service, and its link to the engine process. No JAX.

The life of a call, by module:

    main        the process: an engine to serve, orders from its parent
    server      its port: bound, serving, draining (transport, tls: how it talks)
    admission   may the call come in, and can its message be read
    service     the method that is called (calls counts it, and ends it with a status)
    reading     its message (wire) becomes a request, or several; what is large on threads (workers)
    answering   the request is sent, and followed to its end; embedding does so for a call of Embed
    remote_link   over the stream to the engine process; engine_link says what of that others see
    pending       what the engine gave and has not been read
    wire        what is known goes out as messages (model_info: what is served)
"""
