"""What several scripts share around their technique: setting up, sweeps, typed prompts, breakdowns."""
