"""What a run will need, before anything starts: memory, FLOPs, traffic, time. Imports no torch."""
