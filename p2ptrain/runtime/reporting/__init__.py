"""What a run has cost and planned, as programs and people read it."""
