"""Metrics: what is measured (meter, memory, devices), where it goes (the sinks), and the table at the end (results)."""
