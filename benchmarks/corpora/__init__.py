"""What gradmend and its peers find in programs whose faults are known."""
