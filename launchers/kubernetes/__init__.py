"""Kubernetes: objects.py says what, lint.py sees what no schema does, submit.py creates it, jobs.py follows it."""
