"""Builders of a job's children: pure functions from the job, its runtime and an attempt to manifests."""
