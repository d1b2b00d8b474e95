"""What an adapter is: families, packages, registry, importers, training. Never imports `service`."""
