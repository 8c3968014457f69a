"""Kubernetes: objects.py says what, lint.py what no schema sees, submit.py renders and creates, jobs.py follows."""
