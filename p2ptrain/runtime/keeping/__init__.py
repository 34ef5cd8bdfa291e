"""What a member keeps of a run from view to view: states, replicas, the data, weights."""
