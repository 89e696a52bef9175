"""expertd: the routed experts of MoE models as a service."""

__version__ = "0.1.0"
