"""Pictures: pure functions from names and arrays to plotly figures."""
