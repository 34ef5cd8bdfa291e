"""One view of a run at one member: get its states back, work, hand over."""
