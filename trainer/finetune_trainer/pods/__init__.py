"""What the pods of a job run: each works in local scratch and exchanges files through the job's work prefix."""
