"""One model over several ranks: who holds which slice, the two collectives, measuring a step."""
