"""What everything else stands on: errors, checks, the registry, draws, flows, configuration and weights."""
