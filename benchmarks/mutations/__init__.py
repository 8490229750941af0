"""Sound programs, and what is left of them after a single change: does gradmend find it, and mend it?"""
