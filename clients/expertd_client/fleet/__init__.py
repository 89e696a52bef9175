"""What a pool knows of its replicas: where they are, what they hold, how they fare."""
