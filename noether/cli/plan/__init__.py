"""`noether plan`: the plan of a run as text, JSON or a picture."""
