"""The OpenAI-compatible HTTP server: JSON in, `AsyncEngine` calls, JSON or SSE out.

app.py          create_app(engine, config): routes, middleware, error handlers
protocol.py     request bodies; an unknown or unserved field is refused by name
sampling.py     body -> SamplingParams
selection.py    `model` and `lora` -> adapters
generation.py   the answers of one HTTP request, merged; leaving it cancels them
completions.py, chat.py, models.py, admin.py, health.py   the routes
embeddings.py, classify.py   those that generate nothing; pooling.py and pooling_protocol.py serve both
logprobs.py     log-probabilities in OpenAI's two shapes
sse.py          events on the wire; disconnect.py notices that the client has gone
gate.py         API key and body size, before anything is read; access.py: what a key may do
residency.py, pushed.py   /v1/adapters: where versions are, and those that come in a body
quotas.py       limits of adapters: how many answers, how fast, how many tokens
adapter_paths.py  which names and folders a client may load
errors.py       the one table from exceptions to HTTP
metrics.py      Prometheus
run.py          the process: bind, load, listen, drain
"""
