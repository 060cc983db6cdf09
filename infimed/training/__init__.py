"""Lightning lives here: the module wires and logs, one concern a callback; no maths."""
