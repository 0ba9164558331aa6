"""Telemetry: a line a step, with what was moved and computed, how close that is to the device's ceilings, and what
binds. `engine` measures, `recorder` writes, `lines` reads; `live` and `timeline` show."""
