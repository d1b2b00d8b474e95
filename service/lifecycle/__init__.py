"""What a running server does besides answering: validation, rollouts, migration, restoration, sweeping."""
