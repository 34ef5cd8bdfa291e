"""How members reach each other in a run: blobs, meetings, questions, and where tensors land."""
