"""Methods that join models and samplers: one folder per topic."""
