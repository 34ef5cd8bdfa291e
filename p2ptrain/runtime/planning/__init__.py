"""From what peers measured of themselves to plans, at a run's start and later."""
