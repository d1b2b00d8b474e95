"""One router per subject; each handler translates a request, calls the layer below and translates the answer."""
