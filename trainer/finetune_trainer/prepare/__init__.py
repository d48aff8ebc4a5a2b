"""Prepare: read, check, deduplicate, render, mask, tokenise, pack; ends bad data before a GPU is taken."""
