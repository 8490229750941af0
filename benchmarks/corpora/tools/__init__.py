"""Each module here runs one tool: `check(case, seed)` returns its claims, the worst first."""
