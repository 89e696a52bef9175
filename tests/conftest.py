"""What every test shares: hypothesis without deadlines, because nothing here asserts a time."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "expertd", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("expertd")
