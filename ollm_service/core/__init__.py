"""What should happen? Pure decisions: standard library only; no clock, environment, log, disk or network."""
