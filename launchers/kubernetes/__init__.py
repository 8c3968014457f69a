"""Kubernetes launcher: objects.py renders, lint.py checks beyond schemas, submit.py creates, jobs.py monitors."""
