"""One module a lab: its cases, its float64 oracle, and the wrong formulas that it recognises."""
