"""What a run is: its settings, data, networks, schedules and inference methods."""
