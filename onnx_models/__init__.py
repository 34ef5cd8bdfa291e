"""Model definitions, their cards and small exported bundles without weights."""
