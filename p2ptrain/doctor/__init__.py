"""Look at this device and at the addresses of others: thin probes for `diagnosis` to judge."""
