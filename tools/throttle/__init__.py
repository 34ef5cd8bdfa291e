"""Real peers that are slower than this machine: CPU quotas, memory limits, links with a rate."""
