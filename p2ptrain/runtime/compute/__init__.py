"""What computes: segments, stages and shards; blocking, for a worker thread, no network."""
