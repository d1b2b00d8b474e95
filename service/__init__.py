"""Serve many task adapters from one frozen vision-language backbone."""
