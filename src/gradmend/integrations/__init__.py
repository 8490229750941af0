"""Integrations: gradmend inside training loops and trackers of others. They are strangers to each other."""
