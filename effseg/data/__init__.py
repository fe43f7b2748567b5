"""Scans, labels and cases: from files to what the networks take, and back."""
