"""Settings of every test: properties are drawn the same way each time, and a busy machine is no failure."""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# What a shell starts in its background ignores ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
