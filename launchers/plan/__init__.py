"""What a run will need, before anything starts: memory, FLOPs, traffic, time. Torch is imported only by a trace."""
