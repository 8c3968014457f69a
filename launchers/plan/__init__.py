"""Predict what a run needs, before it starts: memory, FLOPs, traffic, time. Only a trace imports torch."""
