"""Schedules: when something is due, counted in closed form. A line here may touch its arguments only."""
