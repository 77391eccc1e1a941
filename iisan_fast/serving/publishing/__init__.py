"""Publish a run on the hub, without what belongs to users."""
