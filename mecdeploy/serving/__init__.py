"""Serving over HTTP: the Open Inference Protocol, images, a page. The extra `serve` installs what it needs; no torch.

config.py      ServeConfig: models, address, limits
models.py      ServedModel: a file, loaded; knows nothing of HTTP
app.py         build_app(config): the ASGI application
service.py     what a process serves: models, admission, threads
batching.py    rows of several requests run as one
repository.py  where models come from, and which version is served
protocol.py    requests and answers of the protocol, as bytes
tensors.py     its tensors, as JSON and as bytes
bodies.py      reading a body, within limits
images.py      the image in a body
page.py        the page at /
metrics.py     what Prometheus is told
errors.py      Refusal: why a request gets no answer
server.py      run(config): the process, or several, around the application
"""
