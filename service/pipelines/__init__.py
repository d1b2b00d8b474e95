"""What a request is made of: one module per kind of request, over the stages the engine runs."""
