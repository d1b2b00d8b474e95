"""The HTTP API: schemas, errors, limits, routes and the console. `service.http.app.create_app` ties them together."""
